"""The Gaussian noise baseline, and knowledge distillation into untrained students."""

import pytest
import torch

import distill
import finetune
import kd
import pretrain
from analysis.tables import format_tables, gather_results
from data.distilled import load_distilled
from distillers import gaussian, method
from evaluation import results
from tests.conftest import DISTILL, make_stopping_steps
from utils import run
from utils.errors import UserError

STUDENT = ["--weights", "none", "--width", "0.125", "--dataset", "digits"]


@pytest.fixture
def make_noise(roots, tmp_path):
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
    """Train a teacher for one step; return the flags of kd.py for an untrained student."""
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


def test_noise_is_standard_normal_and_has_no_targets(make_noise):
    d = load_distilled(make_noise())
    assert (
        d.images.shape == (30, 3, 32, 32) and d.targets.shape == (30, 0) and d.target_kind == "none"
    )
    assert (
        abs(d.images.mean()) < 0.02 and abs(d.images.std() - 1) < 0.02
    )  # 92,160 draws: 6 and 8 standard errors
    assert torch.equal(d.images, load_distilled(make_noise(top="again")).images)
    assert not torch.equal(d.images, load_distilled(make_noise(seed=1)).images)


def test_pretraining_on_noise_is_an_error(make_noise, roots):
    with pytest.raises(UserError, match=r"without targets.*kd\.py"):
        pretrain.main(["--distilled", str(make_noise()), "--width", "0.125"])


def record_batches(flags, monkeypatch):
    """Run kd.py with `flags` and return the batches (steps, b, 3, S, S) before augmentation."""
    batches = []
    monkeypatch.setattr(kd, "diff_augment", lambda x, generator: batches.append(x.clone()) or x)
    kd.main(flags)
    return torch.stack(batches)


def test_noise_is_redrawn_at_each_step(make_noise, student, monkeypatch):
    flags, _ = student
    batches = record_batches(
        [*flags, "--distilled", str(make_noise()), "--epochs", "4"], monkeypatch
    )
    assert batches.shape == (4, 30, 3, 32, 32)  # as for a set of 30 images
    assert (
        len(torch.cat([*batches, load_distilled(make_noise()).images]).flatten(1).unique(dim=0))
        == 5 * 30
    )
    assert abs(batches.mean()) < 0.01 and abs(batches.std() - 1) < 0.01


def test_other_images_are_not_redrawn(distilled, student, monkeypatch):
    flags, _ = student
    batches = record_batches([*flags, "--distilled", str(distilled)], monkeypatch)
    images = load_distilled(distilled).images.flatten(1).unique(dim=0)
    assert all(torch.equal(batch.flatten(1).unique(dim=0), images) for batch in batches)


def test_stopped_student_of_noise_resumes_to_the_same_weights(make_noise, student, monkeypatch):
    flags, folder = student
    flags = [*flags, "--distilled", str(make_noise()), "--epochs", "4"]
    kd.main(flags)
    [artefact] = folder.glob("digits_kd_gaussian-*_seed0/model.pt")
    whole = torch.load(artefact, weights_only=True)["network"]
    artefact.unlink()
    (folder / "results.jsonl").unlink()
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", make_stopping_steps([("train student", 1)]))
        kd.main(flags)
    kd.main(flags)
    parts = torch.load(artefact, weights_only=True)["network"]
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())


def test_untrained_students_on_different_images_have_different_folders(
    make_noise, distilled, student, roots, capsys
):
    """Use noise, and two sets that differ only in their settings."""
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
    for path in (make_noise(), distilled, other / "digits" / "krr_st" / "seed0" / "distilled.pt"):
        kd.main([*flags, "--distilled", str(path)])
    assert "scratch convnet3 -> digits (kd on gaussian images):" in capsys.readouterr().out
    assert len(list(folder.glob("digits_kd_gaussian-*_seed0/model.pt"))) == 1
    assert len(list(folder.glob("digits_kd_krr_st-*_seed0/model.pt"))) == 2
    lines = [line for line in results.read(folder / "results.jsonl") if line["protocol"] == "kd"]
    assert [line["images"]["method"] for line in lines] == ["gaussian", "krr_st", "krr_st"]
    assert [line["images"]["num_images"] for line in lines] == [30, 20, 20]
    shown = format_tables(gather_results([folder]))["digits"]
    assert (
        "| no pre-training (convnet3-x0.125 at 32 px; on 30 images of Gaussian noise, digits) "
        in shown
    )
    assert "| no pre-training (convnet3-x0.125 at 32 px; on 20 images of KRR-ST, digits) " in shown
