"""Shared by all tests: toy runs of the real commands, and a way to call them as a user would."""

import os
import subprocess
import sys
from pathlib import Path

# One thread: scripts/test.sh runs one test per core. The number of threads decides the order of
# sums, so the processes that tests start use the same number.
os.environ["OMP_NUM_THREADS"] = "1"
# All machines run the same tests: on the CPU, and in float32 where the flags below say so.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

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


LONG = {  # modules; other long tests have the mark
    "test_distributed",
    "test_extending",
    "test_fuzz",
    "test_resume",
    "test_survival",
    "test_torture",
}


def pytest_collection_modifyitems(items):
    """Mark the tests of the modules in `LONG`, which scripts/test.sh runs with --all only."""
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")


def stopping_at(stops):
    """As `Run.steps`, stopped once after each (phase, step) of `stops`, as a signal would."""
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
    """No test downloads: each call of the network is refused, as on a machine without one."""

    def refuse(url, *args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(download, "download_url", refuse)
    for module in ("cifar", "fgvc_aircraft", "flowers102", "imagenette"):
        monkeypatch.setattr(
            getattr(torchvision.datasets, module), "download_and_extract_archive", refuse
        )


def command(*words, check=True):
    """Run `python <words>` from the repository's root; the finished process, with its output as
    text."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """The flags that keep a test's data and runs in a folder of their own, with a toy target on
    digits in it."""
    top = tmp_path_factory.mktemp("toy")
    flags = ["--data-root", str(top / "data"), "--run-root", str(top / "runs")]
    command("pretrain_target.py", "--source", "digits", *TARGET, *flags)
    return flags


@pytest.fixture(scope="session")
def runs(roots):
    return Path(roots[3]) / "digits"


@pytest.fixture(scope="session")
def data_root(roots):
    return Path(roots[1])


@pytest.fixture(scope="session")
def distilled(roots, runs):
    """A toy distilled.pt of KRR-ST on digits."""
    command("distill.py", "--source", "digits", *DISTILL, *roots)
    return runs / "krr_st" / "seed0" / "distilled.pt"


@pytest.fixture(scope="session")
def weights(roots, distilled):
    """A network pre-trained on it."""
    command("pretrain.py", "--distilled", distilled, *PRETRAIN, *roots)
    return distilled.parent / "convnet3-x0.125" / "seed0" / "model.pt"


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    """A data root with 200 of the digits, 14 of the 3 and 20 or more of each other class, as class
    folders."""
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
