"""Check on a device that every stage and every method works; takes minutes and no download.

    python -m benchmarks.smoke                  # the GPU, if there is one
    python -m benchmarks.smoke --device cpu

Runs the scripts for a few steps on the digits:
1. Every command in float32 on the CPU and on the device, with equal random numbers. The logged
   losses must agree (agreement.py). The device uses --deterministic, because the kernels that cuDNN
   selects by timing round differently from run to run.
2. Every stage that trains, run twice with --deterministic on the device, in its default precision.
   The losses must be equal.
3. A distillation on the device, with --deterministic, that is killed, resumed, stopped by SIGINT
   and resumed. Its set must equal that of an uninterrupted run, bit by bit.

Exits with code 1 if a check fails.
"""

import contextlib
import importlib
import io
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import interruption
from benchmarks.agreement import TRAINED, UNTRAINED, agree, differences, equal_draws
from benchmarks.timing import machine_name
from utils import cli
from utils.device import add_device_flag, find_compiler_fault, resolve_device
from utils.run import read_log

POOL = "--outer-batch 64 --pool-size 2 --pool-steps 3"
MATCHING = "--outer-steps 3 --inner-steps 2 --max-start 1 --experts 1"
METHODS = {  # name in the registry: flags
    "gaussian": "",
    "random": "",
    "random_features": "",
    "kmeans": "",
    "high_loss": "--experts 1",
    "dsa": "--networks 1 --outer-loops 2 --inner-epochs 1 --real-batch 16",
    "dm": "--outer-steps 4 --real-batch 16",
    "mtt": MATCHING,
    "mkdt": MATCHING,
    "kip": "--outer-steps 4 --outer-batch 64",
    "frepo": f"--outer-steps 8 {POOL}",
    "ssl_bilevel": "--outer-steps 3 --outer-batch 32 --inner-steps 2",
    "krr_st": f"--outer-steps 8 {POOL}",
}
NETWORKS = {*METHODS} - {"gaussian", "random", "random_features", "kmeans", "kip"}
VARIANTS = {  # of KRR-ST
    "krr_st_low_rank": "--num-images 4 --bases 50 --target-bases 10 --base-size 8 "
    "--views rotations",
    "krr_st_d8": "--augment-outer",
    "krr_st_random_targets": "--random-targets",
}
TRAINED_BEFORE = {"mtt", "mkdt", "frepo", "ssl_bilevel", "krr_st", *VARIANTS}
WIDTH = "--width 0.125"
STUDENT = "convnet3-x0.125/seed0"
TRAINING = (  # commands that run twice
    "target",
    "krr_st",
    "pre-training, feature",
    "fine-tuning",
    "teacher",
    "distillation of a teacher",
)


@dataclass
class Command:
    """A command on the digits.

    Args:
        name: name in the output.
        text: script and flags; RUNS stands for the run root.
        folder: folder of the run in the run root, which may contain *; empty for a probe.
        artefact: file in it that later commands read.
    """

    name: str
    text: str
    folder: str
    artefact: str = ""

    def run(self, runs, *flags):
        """Run the command in this process.

        Args:
            runs: run root.
            flags: further flags.

        Returns:
            The list of logged losses, which is empty if the command does not train.
        """
        words = [word.replace("RUNS", str(runs)) for word in self.text.split()]
        module = importlib.import_module(words[0])
        words += ["--data-root", str(runs.parent / "data"), "--run-root", str(runs), *flags]
        with contextlib.redirect_stdout(io.StringIO()):
            module.main([*words[1:], "--log-every", "1"])
        folder = next(runs.glob(self.folder)) if self.folder else runs
        return [line["loss"] for line in read_log(folder) if "loss" in line]


def distillation(method, name, flags):
    """Return the `Command` of a method whose run is called `name`."""
    script = "distill" if method == "krr_st" else f"distillers.__main__ {method}"
    width = WIDTH if method in NETWORKS else ""
    text = f"{script} --source digits --num-images 20 {width} {METHODS[method]} {flags}"
    return Command(name, f"{text} --name {name}", f"digits/{name}/seed0", "distilled.pt")


def pretraining(kind, method, recipe):
    """Return the `Command` that pre-trains on the set of a method, whose targets are of `kind`."""
    text = f"pretrain --distilled RUNS/digits/{method}/seed0/distilled.pt {WIDTH} {recipe}"
    folder = f"digits/{method}/seed0/{STUDENT}"
    return Command(f"pre-training, {kind}", text, folder, "model.pt")


def evaluation(name, method, text, folder=""):
    """Return the `Command` of a script on the network pre-trained on the set of a method.

    `folder` is that of the run, in the folder of the network; empty for a probe.
    """
    network = f"digits/{method}/seed0/{STUDENT}"
    text = f"{text} --weights RUNS/{network}/model.pt --dataset digits"
    return Command(name, text, f"{network}/{folder}" if folder else "")


def all_commands():
    """Return all `Command`s in an order in which each finds its files."""
    target = "pretrain_target --source digits --width 0.0625 --epochs 1 --warmup-epochs 0 --lr 0.01"
    teacher = "scratch/convnet3-x0.125_32px/digits_full_seed0"
    kd = f"kd --distilled RUNS/digits/krr_st/seed0/distilled.pt --teacher RUNS/{teacher}/model.pt"
    kd += " --epochs 5"
    return [
        Command("target", f"{target} --projector-dim 64", "digits/target/seed0", "target.pt"),
        *(distillation(name, name, "") for name in METHODS),
        *(distillation("krr_st", name, flags) for name, flags in VARIANTS.items()),
        pretraining("feature", "krr_st", "--epochs 8"),
        pretraining("class", "random", "--epochs 8"),
        pretraining("soft", "frepo", "--steps 8"),
        Command(
            "pre-training, full source",
            f"pretrain --source digits {WIDTH} --steps 8",
            f"digits/full/seed0/{STUDENT}",
            "model.pt",
        ),
        evaluation("fine-tuning", "krr_st", "finetune --steps 5", "digits_full_seed0"),
        evaluation("linear probe", "krr_st", "finetune --protocol linear"),
        evaluation("nearest neighbours", "krr_st", "finetune --protocol knn"),
        evaluation("head", "random", "finetune --protocol head"),
        evaluation("R^2", "krr_st", "finetune --protocol r2"),
        Command(
            "teacher",
            f"finetune --weights none --dataset digits {WIDTH} --steps 5",
            teacher,
            "model.pt",
        ),
        evaluation("distillation of a teacher", "krr_st", kd, "digits_kd_*"),
    ]


def check_agreement(command, folder, device):
    """Run a command on the CPU and on the device, print a line, and return whether they agree.

    The CPU's file then replaces the device's, so that differences do not add up. On a GPU with a
    compiler, the networks of KRR-ST are compiled.
    """
    compiles = command.name == "krr_st" and device == "cuda"
    compiles = compiles and find_compiler_fault(torch.device(device)) is None
    with equal_draws():
        expected, found = (
            command.run(folder / runs, "--device", name, "--precision", "fp32", *flags)
            for runs, name, flags in (
                ("expected", "cpu", []),
                ("found", device, ["--deterministic", *(["--compile", "on"] * compiles)]),
            )
        )
    if command.artefact:
        path = f"{command.folder}/{command.artefact}"
        shutil.copy(folder / "expected" / path, folder / "found" / path)
    if not expected:
        print(f"{command.name}: runs", flush=True)
        return True
    first, largest = differences(found, expected)
    passed = agree(found, expected, command.name in TRAINED_BEFORE)
    print(
        f"{command.name}: {len(found)} losses, relative difference of the first {first:.0e}, "
        f"largest {largest:.0e}: {'ok' if passed else 'FAILED'}",
        flush=True,
    )
    return passed


def check_determinism(command, folder, device):
    """Run a command twice with --deterministic, print a line, and return whether losses agree."""
    first, second = (
        command.run(folder / runs, "--device", device, "--deterministic")
        for runs in ("first", "second")
    )
    passed = first == second != []
    print(f"{command.name}, twice: {'equal' if passed else 'FAILED'}", flush=True)
    return passed


def main(argv):
    args = parse_args(argv)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
    device = torch.device(resolve_device(args.device))
    where = f"{machine_name(device)}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        commands = all_commands()
        print(
            f"Losses in fp32 on {where}, against the CPU; tolerance {UNTRAINED:g}, and "
            f"{TRAINED:g} after updates:",
            flush=True,
        )
        passed = [check_agreement(command, folder, device.type) for command in commands]
        print(f"Losses with --deterministic on {where}:", flush=True)
        again = [command for command in commands if command.name in TRAINING]
        passed += [check_determinism(command, folder, device.type) for command in again]
        torch.use_deterministic_algorithms(False)
        print(f"Resumed run on {where}:", flush=True)
        passed.append(check_resume(folder, device.type))
    failed = passed.count(False)
    print(f"{len(passed)} checks, {failed} failed" if failed else f"{len(passed)} checks passed")
    sys.exit(1 if failed else 0)


def check_resume(folder, device):
    """Kill, stop and resume a distillation, print a line, and return whether the set is equal."""
    runs, steps = folder / "found", 200
    words = f"distill.py --source digits --num-images 20 {WIDTH} {POOL} --deterministic".split()
    words += ["--outer-steps", str(steps), "--device", device]
    words += ["--data-root", str(folder / "data"), "--run-root", str(runs)]
    passed = interruption.is_resumed_bit_by_bit(words, runs / "digits", "whole", steps)
    print(f"killed, stopped and resumed in {steps} steps: {'equal' if passed else 'FAILED'}")
    return passed


def parse_args(argv):
    parser = cli.Parser(__doc__)
    add_device_flag(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
