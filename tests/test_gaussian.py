"""Noise in place of images, and distillation of knowledge from scratch on whatever images."""

import pytest
import torch

import distill
import finetune
import kd
import pretrain
from analysis.tables import document, gather_results
from data.distilled import load_distilled
from distillers import gaussian, method
from evaluation import results
from tests.conftest import DISTILL, stopping_at
from utils import run
from utils.errors import UserError

STUDENT = ["--weights", "none", "--width", "0.125", "--dataset", "digits"]


@pytest.fixture
def made(roots, tmp_path):
    def call(seed=0, top="runs"):
        places = [*roots[:2], "--run-root", str(tmp_path / top)]
        method.main(
            gaussian.METHOD,
            ["--source", "digits", *places, "--num-images", "30", "--seed", str(seed)],
        )
        return tmp_path / top / "digits" / "gaussian" / f"seed{seed}" / "distilled.pt"

    return call


@pytest.fixture
def student(roots, tmp_path):
    """Flags of kd.py from scratch under a run root of its own, with a teacher that has hardly been
    trained."""
    flags = [*STUDENT, *roots[:2], "--run-root", str(tmp_path)]
    finetune.main([*flags, "--steps", "1"])
    folder = tmp_path / "scratch" / "convnet3-x0.125_32px"
    return [
        *flags,
        "--teacher",
        str(folder / "digits_full_seed0" / "model.pt"),
        "--epochs",
        "2",
    ], folder


def test_noise_is_standard_normal_and_has_no_targets(made):
    d = load_distilled(made())
    assert (
        d.images.shape == (30, 3, 32, 32) and d.targets.shape == (30, 0) and d.target_kind == "none"
    )
    assert (
        abs(d.images.mean()) < 0.02 and abs(d.images.std() - 1) < 0.02
    )  # 92,160 draws: 6 and 8 standard errors
    assert torch.equal(d.images, load_distilled(made(top="again")).images)
    assert not torch.equal(d.images, load_distilled(made(seed=1)).images)


def test_nothing_can_be_pretrained_on_it(made, roots):
    with pytest.raises(UserError, match=r"without targets.*kd\.py"):
        pretrain.main(["--distilled", str(made()), "--width", "0.125"])


def seen_by(student, monkeypatch):
    """The batches that kd.py hands to augmentation, while it runs with the flags `student`."""
    batches = []
    monkeypatch.setattr(kd, "diff_augment", lambda x, generator: batches.append(x.clone()) or x)
    kd.main(student)
    return torch.stack(batches)


def test_noise_is_drawn_anew_at_each_step(made, student, monkeypatch):
    flags, _ = student
    batches = seen_by(
        [*flags, "--distilled", str(made()), "--epochs", "4"], monkeypatch
    )  # (steps, b, 3, S, S)
    assert batches.shape == (4, 30, 3, 32, 32)  # as many steps and images as for a set of 30
    assert (
        len(torch.cat([*batches, load_distilled(made()).images]).flatten(1).unique(dim=0)) == 5 * 30
    )
    assert abs(batches.mean()) < 0.01 and abs(batches.std() - 1) < 0.01


def test_other_images_stay_as_they_are(distilled, student, monkeypatch):
    flags, _ = student
    batches = seen_by([*flags, "--distilled", str(distilled)], monkeypatch)
    images = load_distilled(distilled).images.flatten(1).unique(dim=0)
    assert all(torch.equal(batch.flatten(1).unique(dim=0), images) for batch in batches)


def test_stopped_student_of_noise_goes_on_to_the_same_weights(made, student, monkeypatch):
    flags, folder = student
    flags = [*flags, "--distilled", str(made()), "--epochs", "4"]
    kd.main(flags)
    [artefact] = folder.glob("digits_kd_gaussian-*_seed0/model.pt")
    whole = torch.load(artefact, weights_only=True)["network"]
    artefact.unlink()
    (folder / "results.jsonl").unlink()
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", stopping_at([("train student", 1)]))
        kd.main(flags)
    kd.main(flags)
    parts = torch.load(artefact, weights_only=True)["network"]
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())


def test_students_from_scratch_on_different_images_do_not_collide(
    made, distilled, student, roots, capsys
):
    """Noise, and two sets of the same method and seed that differ in their settings."""
    flags, folder = student
    other = folder.parents[1] / "other"
    distill.main(
        [
            "--source",
            "digits",
            *DISTILL,
            "--outer-steps",
            "1",
            *roots[:2],
            "--run-root",
            str(other),
            "--target-network",
            str(distilled.parents[2] / "target" / "seed0" / "target.pt"),
        ]
    )
    for path in (made(), distilled, other / "digits" / "krr_st" / "seed0" / "distilled.pt"):
        kd.main([*flags, "--distilled", str(path)])
    assert "scratch convnet3 -> digits (kd on gaussian images):" in capsys.readouterr().out
    assert len(list(folder.glob("digits_kd_gaussian-*_seed0/model.pt"))) == 1
    assert len(list(folder.glob("digits_kd_krr_st-*_seed0/model.pt"))) == 2
    lines = [line for line in results.read(folder / "results.jsonl") if line["protocol"] == "kd"]
    assert [line["images"]["method"] for line in lines] == ["gaussian", "krr_st", "krr_st"]
    assert [line["images"]["num_images"] for line in lines] == [30, 20, 20]
    shown = document(gather_results([folder]))["digits"]
    assert (
        "| no pre-training (convnet3-x0.125 at 32 px; on 30 images of Gaussian noise, digits) "
        in shown
    )
    assert "| no pre-training (convnet3-x0.125 at 32 px; on 20 images of KRR-ST, digits) " in shown
