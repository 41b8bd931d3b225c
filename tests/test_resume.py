"""Every training loop, stopped and resumed, gives the same weights as an uninterrupted one."""

import pytest
import torch

import finetune
import kd
import pretrain
import pretrain_target
from tests.conftest import TARGET
from utils import files, run


@pytest.fixture
def stop_next_loop(monkeypatch):
    """Return a function that makes the next training loop stop after its second step."""

    def arm():
        whole = run.Run.steps

        def steps(self, phase, total):
            monkeypatch.setattr(run.Run, "steps", whole)
            for step in whole(self, phase, total):
                yield step
                if step == 1:
                    self.done[phase] = 2
                    self.checkpoint()
                    raise run.Stopped("test")

        monkeypatch.setattr(run.Run, "steps", steps)

    return arm


def load_weights(path, kind):
    return files.load(path, kind)["network"]


def check_resuming(main, flags, artefact, kind, stop_next_loop, expected):
    stop_next_loop()
    with pytest.raises(run.Stopped):
        main(flags)
    assert not artefact.exists() and (artefact.parent / "checkpoint.pt").exists()
    main(flags)
    resumed = load_weights(artefact, kind)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


@pytest.mark.parametrize("script", ["pretrain_target", "pretrain", "finetune", "kd"])
def test_stopped_training_resumes_to_the_same_weights(
    script, roots, distilled, weights, tmp_path, stop_next_loop
):
    data, teacher = (
        roots[:2],
        ["--weights", "none", "--width", "0.125", "--dataset", "digits", "--steps", "1"],
    )
    copies = {}
    for name in ("whole", "parts"):  # the results go beside these weights
        copies[name] = tmp_path / name / "model.pt"
        copies[name].parent.mkdir()
        copies[name].write_bytes(weights.read_bytes())
        (tmp_path / name / "distilled.pt").write_bytes(distilled.read_bytes())
    if script == "kd":
        finetune.main([*teacher, *data, "--run-root", str(tmp_path)])

    def call(name):
        top, augment = tmp_path / name, "--augment"
        flags = {
            "pretrain_target": ["--source", "digits", *TARGET],
            "pretrain": [
                "--distilled",
                str(top / "distilled.pt"),
                "--epochs",
                "4",
                "--width",
                "0.125",
                augment,
                "--batch-size",
                "7",
            ],
            "finetune": [
                "--weights",
                str(copies[name]),
                "--dataset",
                "digits",
                "--steps",
                "4",
                "--batch-size",
                "50",
            ],
            "kd": [
                "--weights",
                str(copies[name]),
                "--distilled",
                str(top / "distilled.pt"),
                "--dataset",
                "digits",
                "--teacher",
                str(tmp_path / "scratch/convnet3-x0.125_32px/digits_full_seed0/model.pt"),
                "--epochs",
                "4",
            ],
        }[script]
        artefact = {
            "pretrain_target": top / "digits" / "target" / "seed0" / "target.pt",
            "pretrain": top / "convnet3-x0.125" / "seed0" / "model.pt",
            "finetune": top / "digits_full_seed0" / "model.pt",
            "kd": top / f"digits_kd_krr_st-{files.digest(distilled)[:6]}_seed0" / "model.pt",
        }[script]
        return [*flags, *data, "--run-root", str(top)], artefact

    main = {
        "pretrain_target": pretrain_target,
        "pretrain": pretrain,
        "finetune": finetune,
        "kd": kd,
    }[script].main
    kind = "target" if script == "pretrain_target" else "model"
    flags, artefact = call("whole")
    main(flags)
    check_resuming(main, *call("parts"), kind, stop_next_loop, load_weights(artefact, kind))


def test_checkpoint_of_another_kind_of_device_is_an_error(tmp_path):
    first = run.Run(tmp_path, "x.pt", {})
    first.resume(torch.device("cpu"), {})
    first.checkpoint()
    with pytest.raises(files.UserError, match="was written on cpu, this is cuda"):
        run.Run(tmp_path, "x.pt", {}).resume(torch.device("cuda"), {})


def test_lines_logged_after_the_checkpoint_are_dropped(tmp_path):
    def logging(total, stop_after=None):
        this = run.Run(tmp_path, "x.pt", {}, log_every=1)
        this.resume(torch.device("cpu"), {})
        for step in this.steps("train", total):
            this.log(step, loss=step)
            if step == stop_after:
                return

    logging(5, stop_after=2)  # no checkpoint, as after a kill
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"phase": "tra')  # in the middle of a line
    logging(5)
    steps = [
        int(line.split('"step": ')[1].split(",")[0])
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5]
