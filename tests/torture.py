"""Kill each stage again and again and see that it ends with the very same file as when nothing had
happened.

    python -m tests.torture                          # 200 kills of every stage
    python -m tests.torture distill --kills 20

A stage runs on digits at toy size, with a checkpoint after every step, in a process of its own that
gets SIGKILL: at a random one of the moments at which it writes, flushes, renames or deletes a file
or logs a step, or some milliseconds later, wherever it is then. The same command follows until that
many kills are done and a run has ended; one that ends before is compared and begun afresh. Now and
then a byte of the newest checkpoint is flipped in between. In the end the artefact must have the
bytes of an undisturbed run, the log the same lines but for the seconds, results.jsonl one line, and
nothing half-written may be left. Prints a Markdown table; exits with an error at the first
difference.

Processes are forked from this one, which has imported everything and computed nothing, so a kill
costs no start-up.
"""

import argparse
import importlib
import json
import math
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from utils import files, run

IMPORTED = (
    "sklearn.cluster",
    "sklearn.datasets",
    "distillers.kmeans",
    "pretrain_target",
    "distill",
    "pretrain",
    "finetune",
    "kd",
)
MILLISECONDS = 60  # at most, after the chosen moment
WRITES = 25  # of the many writes that make a file, each 25th is a moment
ANYWHERE = 0.2  # share of the moments that are drawn from the whole of a run
FLIPPED = 0.2  # share of the kills after which a byte of the newest checkpoint is flipped


@dataclass(frozen=True)
class Stage:
    """`words`: the command after `python`, `{runs}` for its run root; `artefact`: below that;
    `needs`: the stages whose artefacts it reads."""

    words: str
    artefact: str
    needs: tuple = ()


DISTILLED = "digits/krr_st/seed0/distilled.pt"
MODEL = "digits/krr_st/seed0/convnet3-x0.125/seed0/model.pt"
TUNED = "digits/krr_st/seed0/convnet3-x0.125/seed0/digits_full_seed0/model.pt"
STAGES = {
    "target": Stage(
        "pretrain_target.py --width 0.0625 --epochs 1 --batch-size 64 --warmup-epochs 0 "
        "--projector-dim 16",
        "digits/target/seed0/target.pt",
    ),
    "distill": Stage(
        "distill.py --num-images 10 --width 0.125 --outer-steps 24 --outer-batch 32 --pool-size 2 "
        "--pool-steps 5 "
        "--image-every 10",
        DISTILLED,
        ("target",),
    ),
    "kmeans": Stage(
        "-m distillers kmeans --num-images 20", "digits/kmeans/seed0/distilled.pt", ("target",)
    ),
    "high_loss": Stage(
        "-m distillers high_loss --num-images 20 --width 0.03 --experts 4 --expert-batch 256",
        "digits/high_loss/seed0/distilled.pt",
        ("target",),
    ),
    "mkdt": Stage(
        "-m distillers mkdt --num-images 20 --width 0.03 --experts 2 --expert-batch 256 "
        "--max-start 1 --match-epochs 1 --inner-steps 2 --outer-steps 12",
        "digits/mkdt/seed0/distilled.pt",
        ("target",),
    ),
    "low_rank": Stage(
        "distill.py --num-images 2 --bases 10 --base-size 8 --views rotations --width 0.06 "
        "--outer-steps 12 --outer-batch 32 --pool-size 2 --pool-steps 3",
        "digits/krr_st_low_rank/seed0/distilled.pt",
        ("target",),
    ),
    "dm": Stage(
        "-m distillers dm --num-images 10 --width 0.125 --outer-steps 24 --real-batch 4",
        "digits/dm/seed0/distilled.pt",
    ),
    "pretrain": Stage(
        f"pretrain.py --distilled {{runs}}/{DISTILLED} --width 0.125 --epochs 24 --augment",
        MODEL,
        ("distill",),
    ),
    "finetune": Stage(
        f"finetune.py --weights {{runs}}/{MODEL} --dataset digits --steps 24 --batch-size 32",
        TUNED,
        ("pretrain",),
    ),
    "kd": Stage(
        f"kd.py --weights {{runs}}/{MODEL} --distilled {{runs}}/{DISTILLED} --teacher "
        f"{{runs}}/{TUNED} --dataset digits "
        "--epochs 24",
        "digits/krr_st/seed0/convnet3-x0.125/seed0/digits_kd_*/model.pt",
        ("distill", "pretrain", "finetune"),
    ),
}


def child(stage, root, at, pausing, pipe):
    """Run the stage's command in this process, tell `pipe` the name of its moment number `at`, and
    stay there if `pausing`; at its end tell how many moments there were."""
    moments = writes = 0

    def moment(name):
        nonlocal moments, writes
        writes += name == "write"
        if name == "write" and writes % WRITES:
            return
        moments += 1
        if moments == at:
            os.write(pipe, name.encode())
            while pausing:
                signal.pause()

    def told(name, function):
        def wrapped(*args, **kwargs):
            moment(name)
            result = function(*args, **kwargs)
            moment(name)
            return result

        return wrapped

    files._HashingWriter.write = told("write", files._HashingWriter.write)
    run.Run.log = told("step", run.Run.log)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, told(name, getattr(os, name)))
    run.CHECKPOINT_SECONDS, run.CHECKPOINT_SHARE = 0, math.inf
    words = stage.words.format(runs=root / "runs").split()
    words += [
        "--data-root",
        str(root / "data"),
        "--run-root",
        str(root / "runs"),
        "--log-every",
        "1",
    ]
    call = runpy.run_path
    if words[0] == "-m":
        call, words = runpy.run_module, words[1:]
    sys.argv = words
    call(words[0], run_name="__main__")
    os.write(pipe, f"end {moments}".encode())


def attempt(stage, root, at=0, wait=None):
    """One process: the name of the moment at which it was killed, or the number of its moments as
    it ended by itself.

    It is killed at its moment number `at`, or `wait` seconds later; never where `at` is 0.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with open(root / "output.txt", "a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.close(reading)
            child(stage, root, at, wait is None, writing)
            os._exit(0)
        except BaseException as error:
            code = (
                error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
            )
            if code:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    told = os.read(reading, 100).decode()
    if told and not told.startswith("end"):
        time.sleep(wait or 0)
        os.kill(pid, signal.SIGKILL)
        told += os.read(reading, 100).decode()
    os.close(reading)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return told.partition("end")[0]
    if status:
        sys.exit(f"{(root / 'output.txt').read_text()}\n{stage.words}: status {status} at {told!r}")
    return int(told.partition("end ")[2])


def fresh(root, reference, stage):
    """A folder for a run, with what it reads from the undisturbed stages before it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in stage.needs:
        path = root / "runs" / STAGES[name].artefact
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(reference / "runs" / STAGES[name].artefact, path)
    if stage.needs:
        shutil.copytree(reference / "data", root / "data")


def folder_of(root, stage):
    [artefact] = (root / "runs").glob(stage.artefact)
    return artefact.parent


def log_of(folder):
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def compare(root, reference, stage):
    """Exit with an error unless the run at `root` has left what the one at `reference` has."""
    ours, theirs = folder_of(root, stage), folder_of(reference, stage)
    name = Path(stage.artefact).name
    faults = {
        "the artefact differs": (ours / name).read_bytes() != (theirs / name).read_bytes(),
        "the log differs": log_of(ours) != log_of(theirs),
        "a file was left behind": bool([*root.rglob("*.partial"), *ours.glob("checkpoint*")]),
        "results were lost or doubled": any(
            path.read_text().count("\n") != 1 for path in (root / "runs").rglob("results.jsonl")
        ),
    }
    if fault := next((fault for fault, there in faults.items() if there), None):
        sys.exit(f"{(root / 'output.txt').read_text()}\n{stage.words}: {fault}")


def flip_a_byte(root, stage, dice):
    """Damage the newest checkpoint, if the one before is there too; whether that was done."""
    for before in (root / "runs").glob(str(Path(stage.artefact).parent / "checkpoint.previous.pt")):
        newest = before.with_name("checkpoint.pt")
        if newest.is_file() and dice.random() < FLIPPED:
            content = bytearray(newest.read_bytes())
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            newest.write_bytes(content)
            return True
    return False


def torture(name, reference, moments, kills, folder, dice):
    """A row of the table: that many kills of a stage, and comparisons with `reference`, which had
    `moments`."""
    stage, root, started = STAGES[name], folder / name, time.monotonic()
    done, flipped, compared = Counter(), 0, 0
    fresh(root, reference, stage)
    while True:
        soon = (
            2 * moments // min(kills, 20)
        )  # so that a run is killed some 20 times; now and then anywhere
        at = (
            dice.randint(1, moments if dice.random() < ANYWHERE else max(2, soon))
            if done.total() < kills
            else 0
        )
        wait = dice.choice((None, dice.random() * MILLISECONDS / 1000))
        killed = attempt(stage, root, at, wait)
        if isinstance(killed, str):
            done["later" if wait else killed] += 1
            flipped += flip_a_byte(root, stage, dice)
            continue
        compare(root, reference, stage)
        compared += 1
        if done.total() >= kills:
            break
        fresh(root, reference, stage)
    shutil.rmtree(root)
    seconds = time.monotonic() - started
    counts = " | ".join(
        str(done[kind]) for kind in ("write", "fsync", "replace", "unlink", "step", "later")
    )
    return f"| {name} | {done.total()} | {counts} | {flipped} | {compared} | {seconds:.0f} |"


def main():
    args = parse_args()
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    dice = random.Random(args.seed)
    wanted = args.stages or [*STAGES]
    needed = set(wanted)
    for name in reversed(STAGES):
        needed |= set(STAGES[name].needs) if name in needed else set()
    print(
        "| stage | kills | at a write | flush | rename | deletion | step | up to 60 ms later | "
        "bytes flipped "
        "| runs compared | s |"
    )
    print("|---|" + "---:|" * 10, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder, "reference")
        reference.mkdir()
        for name, stage in STAGES.items():
            if name in needed:
                moments = attempt(stage, reference)
                if name in wanted:
                    print(
                        torture(name, reference, moments, args.kills, Path(folder), dice),
                        flush=True,
                    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--kills", type=int, default=200, help="of each stage (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if unknown := set(args.stages) - STAGES.keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    main()
