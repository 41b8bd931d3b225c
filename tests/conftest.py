"""Fixtures and helpers of all tests: toy runs of the real commands."""

import os
import subprocess
import sys
from pathlib import Path

# One thread: scripts/test.sh runs one test per core. The number of threads decides the order of
# sums, so the processes that tests start use the same number.
os.environ["OMP_NUM_THREADS"] = "1"
# All machines run the same tests: on the CPU, and in float32 where the flags below say so.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("DATA_ROOT", None)  # of the user's shell

import pytest
import torch
import torchvision
from torchvision.utils import save_image

from data import download
from data.images import load_images
from utils import run

ROOT = Path(__file__).parent.parent
TARGET = ["--width", "0.125", "--epochs", "1", "--warmup-epochs", "0", "--projector-dim", "32"]
DISTILL = [
    "--num-images",
    "20",
    "--width",
    "0.125",
    "--outer-steps",
    "4",
    "--outer-batch",
    "64",
    "--pool-size",
    "2",
    "--pool-steps",
    "3",
    "--precision",
    "fp32",
]
PRETRAIN = ["--epochs", "3", "--width", "0.125", "--precision", "fp32"]


LONG = {  # modules with long tests only; other long tests have the mark `long`
    "test_distributed",
    "test_export",
    "test_extending",
    "test_fuzz",
    "test_no_sync",
    "test_protocols",
    "test_r2",
    "test_resume",
    "test_survival",
    "test_torture",
}


def pytest_collection_modifyitems(items):
    """Mark the tests of the modules in `LONG`, which scripts/test.sh runs with --all only."""
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")


def make_stopping_steps(stops):
    """Return a version of `Run.steps` that stops once after each (phase, step) in `stops`."""
    steps = run.Run.steps

    def stopping(self, phase, total):
        for step in steps(self, phase, total):
            yield step
            if (phase, step) in stops:
                stops.remove((phase, step))
                self.done[phase] = step + 1
                self.checkpoint()
                raise run.Stopped("test")

    return stopping


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Make each download fail, as on a machine without a network."""

    def refuse(url, *args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(download, "download_url", refuse)
    for module in ("cifar", "fgvc_aircraft", "flowers102", "imagenette"):
        monkeypatch.setattr(
            getattr(torchvision.datasets, module), "download_and_extract_archive", refuse
        )


def run_command(*words, check=True):
    """Run `python <words>` in the root of the repository and return the finished process.

    With `check`, the exit code must be 0.
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """Train a toy target network on the digits.

    Returns the flags --data-root and --run-root, which keep the data and runs of the tests in a
    folder of their own.
    """
    top = tmp_path_factory.mktemp("toy")
    flags = ["--data-root", str(top / "data"), "--run-root", str(top / "runs")]
    run_command("pretrain_target.py", "--source", "digits", *TARGET, *flags)
    return flags


@pytest.fixture(scope="session")
def runs(roots):
    """Return the folder of the runs on the digits."""
    return Path(roots[3]) / "digits"


@pytest.fixture(scope="session")
def data_root(roots):
    return Path(roots[1])


@pytest.fixture(scope="session")
def distilled(roots, runs):
    """Distil a toy set from the digits by KRR-ST and return its distilled.pt."""
    run_command("distill.py", "--source", "digits", *DISTILL, *roots)
    return runs / "krr_st" / "seed0" / "distilled.pt"


@pytest.fixture(scope="session")
def weights(roots, distilled):
    """Pre-train a network on `distilled` and return its model.pt."""
    run_command("pretrain.py", "--distilled", distilled, *PRETRAIN, *roots)
    return distilled.parent / "convnet3-x0.125" / "seed0" / "model.pt"


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    """Write the data set `few` to a new data root: class folders with few digits.

    Each split has 14 images of the digit 3, and 20 or 21 of each other digit.
    """
    root = tmp_path_factory.mktemp("small")
    digits = load_images("digits", "train", 32, root)
    for split in ("train", "test"):
        for label in range(10):
            folder = root / "few" / split / str(label)
            folder.mkdir(parents=True)
            for i in (
                (digits.labels == label)
                .nonzero()[: 14 if label == 3 else 20 + (label < 6), 0]
                .tolist()
            ):
                save_image(digits.raw(torch.tensor([i]), "cpu")[0], folder / f"{i}.png")
    return root
