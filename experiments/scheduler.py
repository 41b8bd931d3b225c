"""Run the missing tasks of an experiment, in parallel and each once.

A task is a command and its outputs: files, or lines of results.jsonl. It waits for the tasks that
write the files it names. Several processes may work on one run root. A lock in <run root>/locks
assigns each task to one process, and is released when the command ends. If a task fails, the tasks
that do not need its files still run.
"""

import contextlib
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from evaluation import results
from utils.run import read_log, settings_digest

POLL_SECONDS = 0.2


@dataclass(eq=False)
class Task:
    """A command.

    Args:
        words: arguments of `python`.
        outputs: paths of files, or FOLDER/results.jsonl#NAME for a line of an evaluation. A task
            without outputs always runs.
        needs: tasks that must finish first.
    """

    words: list
    outputs: list = field(default_factory=list)
    needs: list = field(default_factory=list)

    @property
    def command(self):
        return shlex.join(["python", *self.words])

    @property
    def folders(self):
        """The folders of its logs; the folder of an evaluation has the name of its line."""
        split = [each.partition("#") for each in self.outputs]
        return [Path(path).parent / name for path, _, name in split]

    def is_done(self):
        return bool(self.outputs) and all(map(_exists, self.outputs))

    @property
    def kind(self):
        """The words without seed and folders; commands of the same kind take similar time."""
        words = [
            word
            for before, word in zip(["", *self.words], self.words, strict=False)
            if before != "--seed"
        ]
        return " ".join(
            Path(word).parent.parent.name
            if word.endswith("/model.pt")
            else re.sub(r".*/", "", word)
            for word in words
        )

    def time_spent(self):
        """Return the seconds spent, and the completed fraction (0 to 1) of the run by its log."""
        if not self.outputs:
            return 0.0, 0.0
        share, seconds, before = 0.0, 0.0, 0.0
        for line in read_log(self.folders[0]):
            # A resumed run counts its seconds from 0.
            seconds += line["seconds"] - before if line["seconds"] >= before else line["seconds"]
            before, share = line["seconds"], line["step"] / line.get("of", line["step"])
        if not self.is_done():
            return seconds, share if seconds else 0.0
        config, artefact = self.folders[0] / "config.json", Path(self.outputs[0])
        if not seconds and config.is_file() and artefact.is_file():
            seconds = artefact.stat().st_mtime - config.stat().st_mtime
        return seconds or sum(map(_seconds_of_line, self.outputs)), 1.0


def _exists(output):
    path, _, name = output.partition("#")
    if not name:
        return Path(path).is_file()
    return any(line.get("name") == name for line in results.read(Path(path)))


def _seconds_of_line(output):
    path, _, name = output.partition("#")
    lines = results.read(Path(path)) if name else []
    return next((line.get("seconds", 0.0) for line in lines if line.get("name") == name), 0.0)


class TaskList:
    """Distinct tasks in the order of addition."""

    def __init__(self):
        self.tasks, self._made = [], {}

    def add(self, words, *outputs, reads=()):
        """Add a task. It needs the tasks whose outputs are named in its words or in `reads`.

        A task without outputs needs all previous tasks. A task whose outputs are all made by
        previous tasks is left out.
        """
        task = Task([str(word) for word in words], [str(output) for output in outputs])
        if task.outputs and all(output in self._made for output in task.outputs):
            return
        if task.outputs:
            paths = [Path(word) for word in (*task.words, *reads)]
            named = [self._made.get(str(each)) for path in paths for each in (path, *path.parents)]
            task.needs = [*dict.fromkeys(filter(None, named))]
        else:
            task.needs = [*self.tasks]
        for output in task.outputs:
            self._made.setdefault(output, task)
        for folder in task.folders if "#" in "".join(task.outputs) else ():
            self._made[str(folder)] = task
        self.tasks.append(task)


def estimate(tasks, jobs):
    """Describe the remaining time, estimated from finished tasks of the same kind."""
    timed = {}
    for task in tasks:
        if task.is_done() and (seconds := task.time_spent()[0]):
            timed.setdefault(task.kind, []).append(seconds)
    left, unknown = 0.0, 0
    counted = [task for task in tasks if task.outputs]
    missing = [task for task in counted if not task.is_done()]
    for task in missing:
        seconds, share = task.time_spent()
        if task.kind in timed:
            left += (1 - share) * sum(timed[task.kind]) / len(timed[task.kind])
        elif share:
            left += seconds * (1 - share) / share
        else:
            unknown += 1
    parts = [f"{len(counted) - len(missing)} of {len(counted)} commands done"]
    if len(missing) > unknown:
        minutes = left / jobs / 60
        time_left = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
        parts.append(
            f"about {time_left} remaining" + (f" with {jobs} in parallel" if jobs > 1 else "")
        )
    if unknown:
        parts.append(f"no estimate yet for {unknown}")
    return "; ".join(parts)


def show(tasks, jobs):
    """Print all tasks with their state, and the estimate."""
    for task in tasks:
        if not task.outputs:
            state = "always"
        elif task.is_done():
            state = "done"
        else:
            share = task.time_spent()[1]
            state = f"{share:.0%}" if share else "missing"
        print(f"{state:8}{task.command}")
    print(estimate(tasks, jobs))


def acquire_lock(task, run_root):
    """Return the open lock file of a task, or None if another process holds the lock."""
    folder = run_root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = settings_digest(task.outputs or task.command)
    # The command inherits the file: the lock outlives this process.
    file = open(folder / name, "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()


class Stop(Exception):
    """Raised by SIGINT or SIGTERM."""


def carry_out(tasks, jobs, run_root):
    """Run the missing tasks, `jobs` in parallel.

    Returns:
        The exit code: 0, 1 if a command failed, 130 if interrupted.
    """
    environment = dict(os.environ)
    if (
        jobs > 1
    ):  # parallel progress bars overwrite each other; small networks are fastest on one core
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        environment |= dict(TQDM_DISABLE="1", OMP_NUM_THREADS=threads)
    failed, running = [], {}  # tasks; process -> (task, its lock)
    finished = {task for task in tasks if task.is_done()}

    def stop(number, frame):
        raise Stop

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        while len(finished) < len(tasks):
            taken = [task for task, _ in running.values()] + failed
            ready = [
                task
                for task in tasks
                if task not in finished
                and task not in taken
                and all(each in finished for each in task.needs)
            ]
            changed = False
            for task in ready:
                if len(running) == jobs:
                    break
                if not (lock := acquire_lock(task, run_root)):
                    continue  # another process runs it
                if task.is_done():  # another process has just finished it
                    lock.close()
                    finished.add(task)
                    changed = True
                    continue
                print(f"$ {task.command}", flush=True)
                process = subprocess.Popen(
                    [sys.executable, *task.words],
                    env=environment,
                    pass_fds=[lock.fileno()],
                    start_new_session=True,
                )
                running[process] = (task, lock)
            for process in [each for each in running if each.poll() is not None]:
                task, lock = running.pop(process)
                lock.close()
                changed = True
                if process.returncode == 0 and (not task.outputs or task.is_done()):
                    finished.add(task)
                else:
                    failed.append(task)
                    message = f"failed ({process.returncode}): {task.command}"
                    print(message, file=sys.stderr, flush=True)
            if not (changed or running or ready):
                left = len(tasks) - len(finished) - len(failed)
                print(
                    f"{len(failed)} failed; {left} dependent commands did not run", file=sys.stderr
                )
                return 1
            if not changed:
                time.sleep(POLL_SECONDS)
        return 0
    except Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the wait
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)  # commands write their checkpoints
        print("stopped; rerun the same command to resume", file=sys.stderr, flush=True)
        for process in running:
            process.wait()
        return 130
