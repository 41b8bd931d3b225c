"""The folder of a run: its settings, its log, its checkpoints, and the loop that goes on where it
was stopped."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import torch

from utils import distributed, files, progress
from utils.errors import UserError
from utils.optional import optional

CHECKPOINT_SECONDS = 120
# Share of a run's time that may go into checkpoints; on a slow disk they are rarer.
CHECKPOINT_SHARE = 0.02
SYNC_SECONDS = 1  # after which ranks ask each other whether one of them has been told to stop
LIMIT_WINDOW = 100  # steps over which a limit on a logged value counts
USE_OTHER_FOLDER = "choose another --run-root or --seed, or delete that folder"
# Do not decide the result.
UNTRACKED_SETTINGS = {
    "device",
    "data_root",
    "run_root",
    "log_every",
    "tensorboard",
    "image_every",
    "chunk",
    "name",
}


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


class Run:
    """One run in `folder`, whose product is the file `folder/artefact`.

    `settings` is a dict of plain values that decide the result; they are kept in config.json. The
    attribute `limits` may hold logged name -> (value, advice): the run stops with that advice when
    the mean over the last `LIMIT_WINDOW` steps is above the value. With `tensorboard`, the lines of
    log.jsonl also go to `TensorBoard`. Until the run has finished, its process alone may work in
    the folder.

    Of several ranks the first alone reads and writes the folder. The others have ended where the
    run has finished: what follows is the first's.

    Raises UserError when another process does, when the folder holds the artefact or a checkpoint
    of other settings (naming those that differ), or when its files are damaged.
    """

    def __init__(self, folder, artefact, settings, log_every=50, tensorboard=False):
        self.folder, self.artefact, self.log_every = (
            Path(folder),
            Path(folder) / artefact,
            log_every,
        )
        self.done, self.state, self.device = (
            {},
            {},
            "cpu",
        )  # phase -> steps taken; name -> object with state_dict()
        self.per_rank, self.phase, self.total, self.limits, self._recent = (), artefact, 0, {}, {}
        self._unread, self._window = [], {}
        self._started = self._saved = time.monotonic()
        self._checkpoint_seconds, self._checkpointed = 0.0, {}
        self.settings = json.loads(json.dumps(settings))  # as they will be read back
        main = distributed.is_main_process()
        self._board = TensorBoard(self.folder) if tensorboard and main else None
        if distributed.run_on_main(self._open) and not distributed.is_main_process():
            raise SystemExit(0)

    def _open(self):
        """Take the folder; whether the run has finished."""
        if not self.finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.acquire_lock(self._lock)
        begun = self.finished or any(path.is_file() for path in self._checkpoints)
        if begun and self._config.is_file():
            self._check_settings(files.read_json(self._config, "settings file"), self._config)
        elif self.finished:
            raise UserError(
                f"{self._config}: missing, so nobody knows what {self.artefact.name} is; "
                f"{USE_OTHER_FOLDER}"
            )
        elif not begun:  # else the checkpoint knows the settings
            self._write_config()
        if self.finished:
            with contextlib.suppress(OSError):  # on a disk that is read-only now
                self._delete_checkpoints()  # of a process that was killed before it could
        else:
            for partial in self.folder.glob("*.partial"):
                partial.unlink()
        return self.finished

    def _write_config(self):
        files.write_json(
            self._config,
            {
                "command": [program_name(), *sys.argv[1:]],
                "settings": self.settings,
                "versions": versions(),
            },
        )

    def _check_settings(self, content, path):
        before, now = content.get("settings"), self.settings
        if not isinstance(before, dict):
            raise UserError(f"{path}: holds no settings")
        differ = [
            key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        ]
        if differ:
            listed = "; ".join(
                f"{key}: {before.get(key)} there, {now.get(key)} now" for key in differ
            )
            raise UserError(
                f"{self.folder} holds a run of other settings ({listed}); give those, "
                f"{USE_OTHER_FOLDER}"
            )

    @property
    def _config(self):
        return self.folder / "config.json"

    @property
    def _lock(self):
        return self.folder / "lock"

    @property
    def _checkpoints(self):
        """The newest, and the one before, to which a run goes back when the newest is damaged."""
        return self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"

    @property
    def finished(self):
        return distributed.is_main_process() and self.artefact.is_file()

    def resume(self, device, state, per_rank=()):
        """Take `state` (name -> object with state_dict and load_state_dict) as what a checkpoint
        keeps, and load the newest checkpoint, if there is one. Raises UserError when it was written
        on another kind of device, whose random generator has another state, under other settings,
        or when none is whole. `per_rank` names the parts of which each rank has its own."""
        self.state, self.per_rank, self.device = state, per_rank, device.type
        path, checkpoint = distributed.run_on_main(self._load_matching_checkpoint)
        if checkpoint:
            try:
                kept = checkpoint["state"] | (
                    checkpoint["others"][distributed.rank() - 1]
                    if per_rank and distributed.rank()
                    else {}
                )
                for name, part in self.state.items():
                    part.load_state_dict(kept[name])
                self.done = {str(phase): int(steps) for phase, steps in checkpoint["done"].items()}
            except (
                KeyError,
                ValueError,
                TypeError,
                AttributeError,
                RuntimeError,
                IndexError,
            ) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:160]
                raise UserError(
                    f"{path}: does not fit this run ({reason}); delete it to start afresh"
                ) from error
            self._checkpointed = dict(self.done)
        self._saved = time.monotonic()
        if distributed.is_main_process():
            if checkpoint and not self._config.is_file():
                self._write_config()
            self._drop_log_after_checkpoint()

    def _load_matching_checkpoint(self):
        """As `_load_newest`, where it fits this run."""
        path, checkpoint = self._load_newest()
        if checkpoint:
            self._check_settings(checkpoint, path)
            if checkpoint["device"] != self.device:
                raise UserError(
                    f"{path} was written on {checkpoint['device']}, this is {self.device}; "
                    f"go on with --device {checkpoint['device']}, or delete it to start afresh"
                )
        return path and str(path), checkpoint

    def _load_newest(self):
        """Path and content of the newest checkpoint that is whole, or (None, None) where there is
        none at all. Raises Damaged when there are some but none is whole."""
        broken = None
        for path in self._checkpoints:
            if path.is_file():
                try:
                    content = files.load(
                        path, "checkpoint", required=("done", "device", "settings", "state")
                    )
                except files.DamagedFile as error:
                    broken = broken or error
                    continue
                if broken:
                    aside = self.folder / "checkpoint.damaged.pt"
                    os.replace(self._checkpoints[0], aside)
                    print(
                        f"warning: {broken}; going on from {path.name}, the other is now {aside}",
                        file=sys.stderr,
                    )
                return path, content
        if broken:
            raise files.DamagedFile(
                f"{broken}, and no older one is whole; delete it to start afresh"
            )
        return None, None

    def _drop_log_after_checkpoint(self):
        if (log := self.folder / "log.jsonl").is_file():
            kept = [
                line
                for line in read_log(self.folder)
                if line["step"] <= self.done.get(line["phase"], 0)
            ]
            files.write_text(log, "".join(json.dumps(line) + "\n" for line in kept))

    def checkpoint(self):
        """Write a checkpoint; the one before is kept. Raises UserError where the state is not
        finite."""
        self._check_scalars()
        started = time.monotonic()
        state = {name: part.state_dict() for name, part in self.state.items()}
        if part := files.find_non_finite(state):
            raise self._non_finite_error(part, max(self.done.get(self.phase, 0) - 1, 0))
        others = distributed.gather({name: state[name] for name in self.per_rank})[1:]
        content = {
            "done": self.done,
            "device": self.device,
            "settings": self.settings,
            "state": state,
            "others": others,
        }
        newest, before = self._checkpoints
        if distributed.is_main_process():
            files.save(newest, "checkpoint", content, previous=before)
        self._saved, self._checkpointed = time.monotonic(), dict(self.done)
        self._checkpoint_seconds = self._saved - started

    def _checkpoint_due(self, end):
        """Whether to write a checkpoint now: at a phase's end, or when the last one is old; but
        none that would make writing them take more than its share."""
        age = time.monotonic() - self._saved
        return age * CHECKPOINT_SHARE >= self._checkpoint_seconds and (
            end or age > CHECKPOINT_SECONDS
        )

    def steps(self, phase, total):
        """Yield 0, 1, ... total-1, from where the checkpoint stands; show a bar; write checkpoints
        as time passes.

        SIGINT and SIGTERM end the loop after the current step with a checkpoint and `Stopped`; of
        several ranks, all of them within about `SYNC_SECONDS`.
        """
        self.phase, self.total = phase, total
        first = next_sync = self.done.get(phase, 0)
        self._unread, self._window, self._began = [], {}, time.monotonic()
        with (
            _Signals() as signals,
            progress.bar(total=total, initial=first, desc=phase) as self.bar,
        ):
            for step in range(first, total):
                yield step
                self.done[phase] = step + 1
                self.bar.update()
                if step < next_sync and step + 1 < total:
                    continue
                due = distributed.is_main_process() and self._checkpoint_due(end=step + 1 == total)
                action, until_sync = distributed.all_reduce_max(
                    [2 if signals.received else int(due), self._steps_until_sync(step + 1 - first)]
                )
                next_sync = step + until_sync
                if action:  # all ranks do it, or none
                    self.checkpoint()
                if action == 2:
                    raise Stopped(
                        f"stopped after step {step + 1} of {total} ({phase}); the same command "
                        "goes on there"
                    )

    def _steps_until_sync(self, steps):
        """Steps until all ranks synchronise again, estimated by the main process from `steps` steps
        of this loop; 1 in a single process."""
        if distributed.world_size() == 1 or not distributed.is_main_process():
            return 1
        return max(1, int(SYNC_SECONDS * steps / (time.monotonic() - self._began)))

    def log(self, step, **scalars):
        """Take the scalars of a step; every `log_every` steps their means become a line of
        log.jsonl and the bar's text. Raises UserError for one that is not finite: on the CPU in
        that very step, elsewhere, where reading a value would make the device wait, with the line
        or before the next checkpoint."""
        here = self.device == "cpu"
        for name, value in scalars.items():
            if torch.is_tensor(value):
                value = value.item() if here else value.detach().clone()
            self._unread.append((step, name, value))
        writing = (step + 1) % self.log_every == 0 or step + 1 == self.total
        if here or writing:
            self._check_scalars()
        if writing:
            means = {name: statistics.fmean(values) for name, values in self._window.items()}
            self._window = {}
            self.bar.set_postfix(
                {name: f"{value:.4g}" for name, value in means.items()}, refresh=False
            )
            seconds = round(time.monotonic() - self._started, 2)
            line = {
                "phase": self.phase,
                "step": step + 1,
                "of": self.total,
                **means,
                "seconds": seconds,
            }
            log = self.folder / "log.jsonl"
            if not distributed.is_main_process():
                return
            with files.name_in_errors(log), open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            if self._board:
                self._board.add(self.phase, step + 1, means)

    def _check_scalars(self):
        """Read the scalars that are still on the device. Raises UserError for one that is not
        finite or beyond its limit."""
        tensors = [value.float() for _, _, value in self._unread if torch.is_tensor(value)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        for step, name, value in self._unread:
            value = next(read) if torch.is_tensor(value) else value
            if not math.isfinite(value):
                raise self._non_finite_error(name, step)
            self._window.setdefault(name, []).append(value)
            if name in self.limits:
                recent = self._recent.setdefault(name, deque(maxlen=LIMIT_WINDOW))
                recent.append(value)
                most, advice = self.limits[name]
                if len(recent) == LIMIT_WINDOW and statistics.fmean(recent) > most:
                    raise UserError(
                        f"{self._position(step)}: {name} {statistics.fmean(recent):g}, above "
                        f"{most:g}: {advice}"
                    )
        self._unread = []

    def _position(self, step):
        return f"{self.phase}, step {step + 1} of {self.total}"

    def _non_finite_error(self, part, step):
        """The UserError for a value that is not finite; nothing of that state is on disk."""
        at = [f"{steps} of {phase}" for phase, steps in self._checkpointed.items()]
        start = f"the checkpoint at step {at[-1]}" if at else "the beginning"
        return UserError(
            f"{self._position(step)}: {part} is not finite; nothing of it was written, and the "
            "same command goes on from "
            f"{start}; should it come to the same, lower the learning rate and {USE_OTHER_FOLDER}"
        )

    def finish(self, kind, content):
        """Write the artefact, which ends the run; its checkpoints are deleted. Raises UserError
        where it holds values that are not finite."""
        if part := files.find_non_finite(content):
            raise UserError(
                f"{self.artefact} not written: {part} is not finite; {USE_OTHER_FOLDER}"
            )
        if not distributed.is_main_process():
            raise SystemExit(0)
        files.save(self.artefact, kind, content)
        self._delete_checkpoints()
        files.release_lock(self._lock)

    def _delete_checkpoints(self):
        for path in self.folder.glob("checkpoint*.pt"):
            path.unlink(missing_ok=True)


def read_log(folder):
    """The lines of a run's log.jsonl as dicts, without what a killed process left of one; [] where
    there is no log."""
    path, lines = folder / "log.jsonl", []
    for text in (
        path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else ()
    ):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if text.endswith("\n") and line["step"] >= 0 and line["phase"]:
                lines.append(line)
    return lines


class TensorBoard:
    """Scalars for TensorBoard, in folder/tensorboard/<phase>.

    Raises UserError where its package is missing.
    """

    def __init__(self, folder):
        self.folder, self.phase, self.writer = folder / "tensorboard", None, None
        self.module = optional("torch.utils.tensorboard", "--tensorboard", package="tensorboard")

    def add(self, phase, step, scalars):
        """Write name -> value at a step; what was written at later steps before is hidden."""
        if phase != self.phase:
            place = self.folder / phase.replace(" ", "_")
            self.phase, self.writer = phase, self.module.SummaryWriter(place, purge_step=step)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class Tensors:
    """Learned tensors by name, as a part of the checkpoint; loaded in place."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def state_dict(self):
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, tensor in self.tensors.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


class _Signals:
    """Notes the first SIGINT or SIGTERM instead of acting on it; a second one acts as usual."""

    def __enter__(self):
        self.received = False
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _note(self, number, frame):
        self.received = True
        for each, handler in (
            self.before.items() if distributed.world_size() == 1 else ()
        ):  # torchrun hands on what it gets
            signal.signal(each, handler)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def settings_digest(settings):
    """12 hexadecimal digits that are equal for equal settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def program_name():
    """The program as a user starts it: distill.py, python -m data.prepare."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def shareable_command(folder):
    """The command of the run in `folder`, without `UNTRACKED_SETTINGS` and places on this machine.

    None where the folder has no config.json. Raises DamagedFile where that is damaged.
    """
    path = folder / "config.json"
    words = files.read_json(path, "settings file").get("command") if path.is_file() else None
    if not isinstance(words, list) or not words:
        return None
    program, *words = map(str, words)
    kept, drop = [], False
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            untracked = flag[2:].replace("-", "_") in UNTRACKED_SETTINGS
            kept += [] if untracked else [f"{flag}={_last_part(value)}" if equals else flag]
            drop = untracked and not equals
        elif not drop:
            kept.append(_last_part(word))
    if program.endswith(".py"):
        program = f"python {Path(program).name}"
    return " ".join([program, *kept])


def _last_part(word):
    """A word of a command, quoted for a shell; of an absolute path the last part only."""
    return shlex.quote(Path(word).name if Path(word).is_absolute() else word)


def versions():
    """Versions of Python and PyTorch, as results and runs store them."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__)}
