"""Carry out the commands of a table or figure that are missing; scripts/table.sh calls it.

    bash scripts/run_cifar100.sh --dry-run

Reads lines `LEAVES<tab>WORDS` for the commands `python WORDS`. LEAVES is the file that a command
makes, or FOLDER/results.jsonl#NAME for an evaluation; what is there is not made again. `-` marks a
command that is carried out each time. A command waits for those that make a file it names, and for
all before the last line `then` above it. Several of these may work on one run root at the same
time: a lock in <run root>/locks, which ends with the command, keeps a command to one of them. After
a failure the others go on, but for those that needed its file.
"""

import contextlib
import fcntl
import os
import re
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
    """The command `python words`, what it `leaves`, and the tasks that it `needs`."""

    leaves: str
    words: list
    needs: list = field(default_factory=list)

    @property
    def command(self):
        return " ".join(["python", *self.words])

    @property
    def folder(self):
        """Where the run keeps its log; an evaluation's has the name of its line."""
        path, _, name = self.leaves.partition("#")
        return Path(path).parent / name

    def done(self):
        path, _, name = self.leaves.partition("#")
        if not name:
            return self.leaves != "-" and Path(path).is_file()
        return any(line.get("name") == name for line in results.read(Path(path)))

    @property
    def kind(self):
        """What commands that take about as long have in common: all words but the seed and the
        folders."""
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

    def spent(self):
        """Seconds that were spent so far, and the share of the run (0 to 1) that is done by its
        log."""
        share, seconds = 0.0, 0.0
        before = 0.0
        for line in read_log(self.folder):
            seconds += (
                line["seconds"] - before if line["seconds"] >= before else line["seconds"]
            )  # started again
            before, share = line["seconds"], line["step"] / line.get("of", line["step"])
        config, artefact = self.folder / "config.json", Path(self.leaves)
        if not self.done():
            return seconds, share if seconds else 0.0
        if not seconds and config.is_file() and artefact.is_file():
            seconds = artefact.stat().st_mtime - config.stat().st_mtime
        if "#" in self.leaves and not seconds:
            path, _, name = self.leaves.partition("#")
            seconds = next(
                line.get("seconds", 0.0)
                for line in results.read(Path(path))
                if line.get("name") == name
            )
        return seconds, 1.0


def read(lines):
    """The `Task`s in `lines`, each once, with what they need."""
    tasks, first, made = {}, 0, {}  # made: what a task leaves, or an evaluation's folder -> task
    for line in lines:
        if line.strip() == "then":
            first = len(tasks)
        elif line.strip():
            leaves, words = line.rstrip("\n").split("\t")
            task = Task(leaves, words.split())
            before = [*tasks.values()]
            if leaves == "-":
                leaves, task.needs = f"-{len(tasks)}", before
            elif leaves not in tasks:
                folders = (str(each) for word in task.words for each in Path(word).parents)
                named = [made.get(word) for word in task.words] + [
                    made.get(f"{folder}/") for folder in folders
                ]
                task.needs = [*dict.fromkeys([*before[:first], *filter(None, named)])]
            if leaves not in tasks:
                tasks[leaves] = made[f"{task.folder}/" if "#" in leaves else leaves] = task
    return [*tasks.values()]


def estimate(tasks, jobs):
    """About how long the missing ones will take, in words, from what others of their kind took."""
    timed = {}
    for task in tasks:
        if task.done() and (seconds := task.spent()[0]):
            timed.setdefault(task.kind, []).append(seconds)
    left, unknown = 0.0, 0
    missing = [task for task in tasks if task.leaves != "-" and not task.done()]
    for task in missing:
        seconds, share = task.spent()
        if task.kind in timed:
            left += (1 - share) * sum(timed[task.kind]) / len(timed[task.kind])
        elif share:
            left += seconds * (1 - share) / share
        else:
            unknown += 1
    counted = [task for task in tasks if task.leaves != "-"]
    words = [f"{len(counted) - len(missing)} of {len(counted)} commands done"]
    if len(missing) > unknown:
        minutes = left / jobs / 60
        words.append(
            f"about {minutes / 60:.1f} h left" if minutes >= 90 else f"about {minutes:.0f} min left"
        )
        words[-1] += f", {jobs} at a time" if jobs > 1 else ""
    if unknown:
        words.append(f"{unknown} of kinds that were not timed yet")
    return "; ".join(words)


def show(tasks, jobs):
    for task in tasks:
        begun = task.leaves != "-" and not task.done() and task.spent()[1]
        state = (
            "always"
            if task.leaves == "-"
            else "done"
            if task.done()
            else f"{begun:.0%}"
            if begun
            else "missing"
        )
        print(f"{state:8}{task.command}")
    print(estimate(tasks, jobs))


def claim(task, run_root):
    """The open lock file of a task, or None where another process has it."""
    folder = run_root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = settings_digest(task.command if task.leaves == "-" else task.leaves)
    file = open(folder / name, "w")  # noqa: SIM115 - the command inherits it: the lock outlives this process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()


class Stop(Exception):
    """SIGINT or SIGTERM, once."""


def carry_out(tasks, jobs, run_root):
    """Do what is missing, `jobs` at a time; returns the exit code: 0, 1 where something failed, 130
    when stopped."""
    environment = dict(os.environ)
    if jobs > 1:  # one bar would overwrite the other; and small networks are fastest on a core each
        environment |= dict(
            TQDM_DISABLE="1", OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // jobs))
        )
    failed, running = [], {}  # tasks; process -> (task, its lock)
    finished = {task for task in tasks if task.done()}

    def note(number, frame):
        raise Stop

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
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
                if not (lock := claim(task, run_root)):
                    continue  # another process is at it
                if task.done():  # and it was, until just now
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
                if process.returncode == 0 and (task.leaves == "-" or task.done()):
                    finished.add(task)
                else:
                    failed.append(task)
                    print(
                        f"failed ({process.returncode}): {task.command}",
                        file=sys.stderr,
                        flush=True,
                    )
            if not (changed or running or ready):
                left = len(tasks) - len(finished) - len(failed)
                print(
                    f"{len(failed)} failed; left out, since they need those: {left}",
                    file=sys.stderr,
                )
                return 1
            if not changed:
                time.sleep(POLL_SECONDS)
        return 0
    except Stop:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)  # they write their checkpoints
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        for process in running:
            process.wait()
        return 130


def main(argv):
    dry, jobs, run_root = (
        "--dry-run" in argv,
        argv[argv.index("--jobs") + 1],
        argv[argv.index("--run-root") + 1],
    )
    if not jobs.isdigit() or int(jobs) < 1:
        print(f"error: --jobs {jobs}: must be 1 or more", file=sys.stderr)
        return 2
    tasks = read(sys.stdin)
    if dry:
        show(tasks, int(jobs))
        return 0
    print(estimate(tasks, int(jobs)), flush=True)
    return carry_out(tasks, int(jobs), Path(run_root))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
