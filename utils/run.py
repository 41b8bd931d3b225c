"""The folder of a run: settings, log and checkpoints, and a training loop that resumes."""

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
from utils.device import device_name
from utils.errors import UserError
from utils.optional import import_optional

CPU = torch.device("cpu")
CHECKPOINT_SECONDS = 120
# Largest fraction of a run's time spent on checkpoints. On a slow disk, they become rarer.
CHECKPOINT_SHARE = 0.02
SYNC_SECONDS = 1  # time between checks whether any rank has received a signal
LIMIT_WINDOW = 100  # number of steps that a logged value is averaged over for its limit
USE_OTHER_FOLDER = "choose another --run-root or --seed, or delete that folder"
# Settings that do not affect the result.
UNTRACKED_SETTINGS = {
    "device",
    "data_root",
    "run_root",
    "log_every",
    "tensorboard",
    "image_every",
    "chunk",
    "compile",
    "name",
}


class Stopped(Exception):
    """Raised after SIGINT or SIGTERM, once the checkpoint is written."""


class Run:
    """One run in a folder, which produces one file.

    The run locks the folder until it has finished. With several processes, only the main process
    reads and writes the folder. The other processes exit when the run has finished.

    Args:
        folder: folder of the run; created if missing.
        artefact: name of the file that the run produces.
        settings: dict of plain values that determine the result, stored in config.json.
        log_every: number of steps between lines of log.jsonl.
        tensorboard: also write these lines for TensorBoard.
        device: torch device, whose name config.json contains.

    Attributes:
        limits: dict, logged name -> (limit, advice). The run stops with the advice when the mean
            over the last `LIMIT_WINDOW` steps exceeds the limit.

    Raises:
        UserError: if another process has locked the folder; if the folder holds an artefact or a
            checkpoint with other settings, which the message lists; or if its files are damaged.
    """

    def __init__(self, folder, artefact, settings, log_every=50, tensorboard=False, device=CPU):
        self.folder, self.artefact = Path(folder), Path(folder) / artefact
        self.log_every, self.device, self._device_name = log_every, "cpu", device_name(device)
        self.done = {}  # phase -> steps taken
        self.state = {}  # name -> object with state_dict()
        self.per_rank, self.phase, self.total, self.limits, self._recent = (), artefact, 0, {}, {}
        self._unread, self._window = [], {}
        self._started = self._saved = time.monotonic()
        self._checkpoint_seconds, self._checkpointed = 0.0, {}
        self.settings = json.loads(json.dumps(settings))  # as read back from config.json
        main = distributed.is_main_process()
        self._board = TensorBoard(self.folder) if tensorboard and main else None
        if distributed.run_on_main(self._open) and not distributed.is_main_process():
            raise SystemExit(0)

    def _open(self):
        """Lock the folder and check its contents. Returns whether the run has finished."""
        if not self.finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.acquire_lock(self._lock)
        begun = self.finished or any(path.is_file() for path in self._checkpoints)
        if begun and self._config.is_file():
            self._check_settings(files.read_json(self._config, "settings file"), self._config)
        elif self.finished:
            raise UserError(
                f"{self._config}: missing, so the settings of {self.artefact.name} are unknown; "
                f"{USE_OTHER_FOLDER}"
            )
        elif not begun:  # otherwise the checkpoint holds the settings
            self._write_config()
        if self.finished:
            with contextlib.suppress(OSError):  # the disk may be read-only
                self._delete_checkpoints()  # left by a killed process
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
                "device": self._device_name,
                "versions": package_versions(),
            },
        )

    def _check_settings(self, content, path):
        before, now = content.get("settings"), self.settings
        if not isinstance(before, dict):
            raise UserError(f"{path}: contains no settings")
        differ = [
            key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        ]
        if differ:
            listed = "; ".join(
                f"{key}: {before.get(key)} stored, {now.get(key)} now" for key in differ
            )
            raise UserError(
                f"{self.folder} holds a run with other settings ({listed}); use the stored ones, "
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
        """Paths of the newest checkpoint and of the previous one, the fallback if it is damaged."""
        return self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"

    @property
    def finished(self):
        """Whether the artefact exists; False in processes other than the main one."""
        return distributed.is_main_process() and self.artefact.is_file()

    def resume(self, device, state, per_rank=()):
        """Register the state of the run and load the newest checkpoint, if any.

        Args:
            device: torch device of the run.
            state: dict, name -> object with `state_dict` and `load_state_dict`.
            per_rank: names in `state` whose state differs between ranks.

        Raises:
            UserError: if the checkpoint has other settings or another device type, whose random
                generators differ; or if all checkpoints are damaged.
        """
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
                    f"{path}: does not fit this run ({reason}); delete it to start over"
                ) from error
            self._checkpointed = dict(self.done)
        self._saved = time.monotonic()
        if distributed.is_main_process():
            if checkpoint and not self._config.is_file():
                self._write_config()
            self._drop_log_after_checkpoint()

    def _load_matching_checkpoint(self):
        """Return `_load_newest()`. Raises UserError if it belongs to another run."""
        path, checkpoint = self._load_newest()
        if checkpoint:
            self._check_settings(checkpoint, path)
            if checkpoint["device"] != self.device:
                raise UserError(
                    f"{path} was written on {checkpoint['device']}, this is {self.device}; "
                    f"resume with --device {checkpoint['device']}, or delete it to start over"
                )
        return path and str(path), checkpoint

    def _load_newest(self):
        """Return path and content of the newest intact checkpoint, or (None, None) without any.

        Raises DamagedFile if all checkpoints are damaged.
        """
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
                    moved = self.folder / "checkpoint.damaged.pt"
                    os.replace(self._checkpoints[0], moved)
                    print(
                        f"warning: {broken}; resuming from {path.name}, the damaged file is now "
                        f"{moved}",
                        file=sys.stderr,
                    )
                return path, content
        if broken:
            raise files.DamagedFile(
                f"{broken}, and no older checkpoint is intact; delete it to start over"
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
        """Write a checkpoint and keep the previous one.

        Raises:
            UserError: if the state contains NaN or infinity.
        """
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
        """Whether to write a checkpoint now.

        A checkpoint is due at the end of a phase and after `CHECKPOINT_SECONDS`, but not if
        checkpoints would take more than `CHECKPOINT_SHARE` of the time.
        """
        age = time.monotonic() - self._saved
        return age * CHECKPOINT_SHARE >= self._checkpoint_seconds and (
            end or age > CHECKPOINT_SECONDS
        )

    def steps(self, phase, total):
        """Yield the steps 0, ..., total - 1, starting after the steps in the checkpoint.

        Shows a progress bar and writes checkpoints. On SIGINT or SIGTERM, the loop finishes the
        current step, writes a checkpoint and raises `Stopped`. With several processes, all of them
        stop within about `SYNC_SECONDS`.

        Args:
            phase: name of the loop, as shown and logged.
            total: number of steps.
        """
        self.phase, self.total = phase, total
        first = next_sync = self.done.get(phase, 0)
        self._unread, self._window, self._began = [], {}, time.monotonic()
        with (
            _Signals() as signals,
            progress.progress_bar(total=total, initial=first, desc=phase) as self.bar,
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
                if action:  # the same on all ranks
                    self.checkpoint()
                if action == 2:
                    raise Stopped(
                        f"stopped after step {step + 1} of {total} ({phase}); rerun the same "
                        "command to resume"
                    )

    def _steps_until_sync(self, steps):
        """Number of steps until all ranks synchronise again; 1 in a single process.

        The main process estimates it from the time of the `steps` steps so far.
        """
        if distributed.world_size() == 1 or not distributed.is_main_process():
            return 1
        return max(1, int(SYNC_SECONDS * steps / (time.monotonic() - self._began)))

    def log(self, step, **scalars):
        """Log named scalars of a step.

        Every `log_every` steps, writes their means to log.jsonl and shows them in the progress bar.
        On a CPU, values are checked at every step. On other devices, reading a value would block
        the device, so values are checked when a line or a checkpoint is written.

        Raises:
            UserError: if a value is not finite or exceeds its limit.
        """
        on_cpu = self.device == "cpu"
        for name, value in scalars.items():
            if torch.is_tensor(value):
                value = value.item() if on_cpu else value.detach().clone()
            self._unread.append((step, name, value))
        writing = (step + 1) % self.log_every == 0 or step + 1 == self.total
        if on_cpu or writing:
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
        """Read the scalars that are still on the device.

        Raises UserError if a value is not finite or exceeds its limit.
        """
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
                        f"{self._position(step)}: {name} is {statistics.fmean(recent):g}, above "
                        f"{most:g}: {advice}"
                    )
        self._unread = []

    def _position(self, step):
        return f"{self.phase}, step {step + 1} of {self.total}"

    def _non_finite_error(self, part, step):
        """Return the UserError for a value that is not finite. The state has not been saved."""
        at = [f"{steps} of {phase}" for phase, steps in self._checkpointed.items()]
        start = f"the checkpoint at step {at[-1]}" if at else "the beginning"
        return UserError(
            f"{self._position(step)}: {part} is not finite; this state was not saved; rerun the "
            f"same command to resume from {start}; if the error repeats, lower the learning rate "
            f"and {USE_OTHER_FOLDER}"
        )

    def finish(self, kind, content):
        """Write the artefact, delete the checkpoints and release the lock.

        Args:
            kind: kind of the file, as in `files.save`.
            content: dict of tensors and plain values.

        Raises:
            UserError: if `content` contains NaN or infinity.
        """
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
    """Return the lines of a run's log.jsonl as dicts, or [] if there is no log.

    Incomplete lines, which a killed process may leave, are skipped.
    """
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
    """Writer of scalars for TensorBoard, to folder/tensorboard/<phase>.

    Raises UserError if the package tensorboard is missing.
    """

    def __init__(self, folder):
        self.folder, self.phase, self.writer = folder / "tensorboard", None, None
        self.module = import_optional(
            "torch.utils.tensorboard", "--tensorboard", package="tensorboard"
        )

    def add(self, phase, step, scalars):
        """Write name -> value of a step. A resumed phase hides the values of later steps."""
        if phase != self.phase:
            place = self.folder / phase.replace(" ", "_")
            self.phase, self.writer = phase, self.module.SummaryWriter(place, purge_step=step)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


class Tensors:
    """Tensors by name with `state_dict` and an in-place `load_state_dict`, for checkpoints."""

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
    """Context that records the first SIGINT or SIGTERM. A second one has its usual effect."""

    def __enter__(self):
        self.received = False
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _note(self, number, frame):
        self.received = True
        if distributed.world_size() > 1:  # torchrun forwards each signal, so several may arrive
            return
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def settings_digest(settings):
    """Return a digest of `settings`: 12 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def program_name():
    """Return the program as typed by the user, such as distill.py or python -m data.prepare."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def shareable_command(folder):
    """Return the command of a run without `UNTRACKED_SETTINGS` and absolute paths.

    Returns None if the folder has no config.json. Raises DamagedFile if that file is damaged.
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
    """Quote a word of a command for a shell; of an absolute path, keep the last part only."""
    return shlex.quote(Path(word).name if Path(word).is_absolute() else word)


def package_versions():
    """Return the versions of Python and PyTorch, as stored with runs and results."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__)}
