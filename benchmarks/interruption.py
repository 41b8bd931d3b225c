"""A distillation that is killed, stopped and resumed, compared with an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from data.distilled import load_distilled
from utils.errors import UserError
from utils.run import read_log

ROOT = Path(__file__).parent.parent
SECONDS = 300  # longest wait for a step


def wait_for_step(process, folder, step):
    """Wait until the log in `folder` has reached a step of the distillation.

    Raises UserError if the process ends before, or after `SECONDS`.
    """
    deadline = time.monotonic() + SECONDS
    while not any(line["phase"] == "distil" and line["step"] >= step for line in read_log(folder)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError(f"{folder}: no step {step}: {process.communicate()[1].strip()}")
        time.sleep(0.02)


def is_resumed_bit_by_bit(words, runs, name, steps):
    """Return whether an interrupted run gives the set of an uninterrupted one.

    Args:
        words: command of a distillation without --name, as words after `python`.
        runs: run root of the source.
        name: name of the uninterrupted run. The other one is called `name`-resumed.
        steps: number of steps of the distillation.

    Raises:
        UserError: if a process does not end as it should.
    """

    def start(which):
        process = subprocess.Popen(
            [sys.executable, *words, "--name", which, "--log-every", "1"],
            cwd=ROOT,
            env=os.environ | dict(TQDM_DISABLE="1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, runs / which / "seed0"

    def finish(process, code):
        errors = process.communicate()[1]
        if process.returncode != code:
            raise UserError(f"exit code {process.returncode}, not {code}: {errors.strip()}")

    for number, step in ((signal.SIGKILL, steps // 4), (signal.SIGINT, steps // 2)):
        process, folder = start(f"{name}-resumed")
        wait_for_step(process, folder, step)
        process.send_signal(number)
        finish(process, -number if number == signal.SIGKILL else 130)
    sets = []
    for which in (f"{name}-resumed", name):
        process, folder = start(which)
        finish(process, 0)
        sets.append(load_distilled(folder / "distilled.pt"))
    return all(
        torch.equal(getattr(sets[0], part), getattr(sets[1], part))
        for part in ("images", "targets")
    )
