"""--tensorboard: the lines of log.jsonl as TensorBoard reads them."""

import sys

import pytest
import torch

from tests.conftest import PRETRAIN, run_command
from utils import run
from utils.errors import UserError
from utils.run import read_log

CPU = torch.device("cpu")


def read_scalars(folder):
    """Read {tag: [(step, value)]} of a folder with TensorBoard."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    shown = accumulator(str(folder))
    shown.Reload()
    return {
        tag: [(each.step, each.value) for each in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def read_logged(folder, phase, name):
    return [
        (line["step"], pytest.approx(line[name]))
        for line in read_log(folder)
        if line["phase"] == phase
    ]


def test_resumed_run_has_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")

    def steps(last, values):
        this = run.Run(tmp_path, "x.pt", {}, log_every=2, tensorboard=True)
        this.resume(CPU, {})
        for step in this.steps("first phase", 4):
            this.log(step, loss=step + 0.5)
        for step in this.steps("second", 8):
            this.log(step, loss=values * step, lr=0.1)
            if step == 3:
                this.checkpoint()
            if step == last:
                return
        this.finish("x", {})

    steps(last=5, values=10.0)  # stops after step 6, which the checkpoint does not have
    steps(last=None, values=1.0)
    assert read_scalars(tmp_path / "tensorboard" / "first_phase") == {
        "loss": read_logged(tmp_path, "first phase", "loss")
    }
    second = read_scalars(tmp_path / "tensorboard" / "second")
    assert (
        second["loss"]
        == [(2, 5.0), (4, 3.0), (6, 4.5), (8, 6.5)]
        == read_logged(tmp_path, "second", "loss")
    )
    assert second["lr"] == read_logged(tmp_path, "second", "lr")


@pytest.mark.long
def test_flag_does_not_change_the_result(distilled, weights, roots, tmp_path):
    pytest.importorskip("tensorboard")
    copy = tmp_path / "distilled.pt"
    copy.write_bytes(distilled.read_bytes())
    run_command(
        "pretrain.py", "--distilled", copy, *PRETRAIN, "--log-every", "1", "--tensorboard", *roots
    )
    folder = tmp_path / "convnet3-x0.125" / "seed0"
    assert (folder / "model.pt").read_bytes() == weights.read_bytes()
    assert read_scalars(folder / "tensorboard" / "pre-train")["loss"] == read_logged(
        folder, "pre-train", "loss"
    )
    assert (
        "already exists"
        in run_command("pretrain.py", "--distilled", copy, *PRETRAIN, *roots).stdout
    )


def test_missing_package_is_an_error_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match="--tensorboard needs the package tensorboard: pip install tensorboard"
    ):
        run.Run(tmp_path / "run", "x.pt", {}, tensorboard=True)
    assert not (tmp_path / "run").exists()
