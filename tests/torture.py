"""Kill each stage at random moments, resume it, and compare with an uninterrupted run.

    python -m tests.torture                          # 200 kills of every stage
    python -m tests.torture distill --kills 20

A stage runs on the digits at toy size in its own process, with a checkpoint after every step. The
process gets SIGKILL when it writes, flushes, renames or deletes a file or logs a step, or a few
milliseconds later. The moment is random. The same command is then run again, until the number of
kills is reached and a run has finished. A run that finishes earlier is compared, and the stage
starts over. Sometimes a byte of the newest checkpoint is flipped between two runs.

After each finished run:
- its file must have the same bytes as that of an uninterrupted run;
- the log must have the same lines, except for the seconds;
- results.jsonl must have one line;
- no incomplete file may be left.

Prints a Markdown table. Exits with an error at the first difference.

The processes are forked from this one, which has imported all modules, so they start quickly.
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
MILLISECONDS = 60  # longest delay after the chosen moment
WRITES = 25  # every 25th write of a file is a moment
ANYWHERE = 0.2  # share of the moments drawn from the whole run
FLIPPED = 0.2  # share of the kills after which a byte of the newest checkpoint is flipped


@dataclass(frozen=True)
class Stage:
    """A stage to kill.

    words: the command after `python`; {runs} is replaced by the run root. artefact: the file that
    it writes, relative to the run root. needs: the stages whose artefacts it reads.
    """

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


def run_stage(stage, root, at, pausing, pipe):
    """Run the command of a stage in this process.

    Writes the name of moment number `at` to `pipe`, and waits there if `pausing`. At the end,
    writes the number of moments.
    """
    moments = writes = 0

    def pass_moment(name):
        nonlocal moments, writes
        writes += name == "write"
        if name == "write" and writes % WRITES:
            return
        moments += 1
        if moments == at:
            os.write(pipe, name.encode())
            while pausing:
                signal.pause()

    def report_moments(name, function):
        def wrapped(*args, **kwargs):
            pass_moment(name)
            result = function(*args, **kwargs)
            pass_moment(name)
            return result

        return wrapped

    files._HashingWriter.write = report_moments("write", files._HashingWriter.write)
    run.Run.log = report_moments("step", run.Run.log)
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, report_moments(name, getattr(os, name)))
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


def run_and_kill(stage, root, at=0, wait=None):
    """Run a stage in a forked process, and kill it at moment number `at` or `wait` seconds later.

    With `at` = 0 it is not killed. Returns the name of the moment at which it was killed, or the
    number of moments if it finished.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with open(root / "output.txt", "a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.close(reading)
            run_stage(stage, root, at, wait is None, writing)
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


def prepare_folder(root, reference, stage):
    """Make a folder for a run and copy the files that the stage reads."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in stage.needs:
        path = root / "runs" / STAGES[name].artefact
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(reference / "runs" / STAGES[name].artefact, path)
    if stage.needs:
        shutil.copytree(reference / "data", root / "data")


def find_folder(root, stage):
    [artefact] = (root / "runs").glob(stage.artefact)
    return artefact.parent


def read_log(folder):
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def compare(root, reference, stage):
    """Exit with an error unless the runs at `root` and `reference` left the same files."""
    ours, theirs = find_folder(root, stage), find_folder(reference, stage)
    name = Path(stage.artefact).name
    faults = {
        "the artefact differs": (ours / name).read_bytes() != (theirs / name).read_bytes(),
        "the log differs": read_log(ours) != read_log(theirs),
        "a file was left behind": bool([*root.rglob("*.partial"), *ours.glob("checkpoint*")]),
        "results are missing or duplicated": any(
            path.read_text().count("\n") != 1 for path in (root / "runs").rglob("results.jsonl")
        ),
    }
    if fault := next((fault for fault, there in faults.items() if there), None):
        sys.exit(f"{(root / 'output.txt').read_text()}\n{stage.words}: {fault}")


def flip_a_byte(root, stage, dice):
    """Sometimes damage the newest checkpoint, if there is an older one; return whether."""
    for before in (root / "runs").glob(str(Path(stage.artefact).parent / "checkpoint.previous.pt")):
        newest = before.with_name("checkpoint.pt")
        if newest.is_file() and dice.random() < FLIPPED:
            content = bytearray(newest.read_bytes())
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            newest.write_bytes(content)
            return True
    return False


def torture_stage(name, reference, moments, kills, folder, dice):
    """Kill a stage `kills` times, compare with `reference`, and return the row of the table.

    `moments` is the number of moments of the uninterrupted run.
    """
    stage, root, started = STAGES[name], folder / name, time.monotonic()
    done, flipped, compared = Counter(), 0, 0
    prepare_folder(root, reference, stage)
    while True:
        soon = 2 * moments // min(kills, 20)  # a run is killed about 20 times
        at = (
            dice.randint(1, moments if dice.random() < ANYWHERE else max(2, soon))
            if done.total() < kills
            else 0
        )
        wait = dice.choice((None, dice.random() * MILLISECONDS / 1000))
        killed = run_and_kill(stage, root, at, wait)
        if isinstance(killed, str):
            done["later" if wait else killed] += 1
            flipped += flip_a_byte(root, stage, dice)
            continue
        compare(root, reference, stage)
        compared += 1
        if done.total() >= kills:
            break
        prepare_folder(root, reference, stage)
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
                moments = run_and_kill(stage, reference)
                if name in wanted:
                    print(
                        torture_stage(name, reference, moments, args.kills, Path(folder), dice),
                        flush=True,
                    )


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument(
        "--kills", type=int, default=200, help="number of kills of each stage (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args()
    if unknown := set(args.stages) - STAGES.keys():
        parser.error(f"unknown stage: {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    main()
