"""The folder of a run: its settings, its log, its checkpoint, and the loop that goes on where it was stopped."""

import json
import signal
import sys
import time
from pathlib import Path

import torch

from utils import files, progress
from utils.errors import UserError

CHECKPOINT_SECONDS = 120
FREE_SETTINGS = {"device", "data_root", "run_root", "log_every", "image_every", "name"}  # do not decide the result


class Stopped(Exception):
    """SIGINT or SIGTERM arrived; the checkpoint is written."""


class Run:
    """One run in `folder`, whose product is the file `folder/artefact`.

    `settings` is a dict of plain values that decide the result; they are kept in config.json. Raises UserError when
    the folder holds the artefact or a checkpoint of other settings, naming those that differ.
    """

    def __init__(self, folder, artefact, settings, log_every=50):
        self.folder, self.artefact, self.log_every = Path(folder), Path(folder) / artefact, log_every
        self.done, self.state = {}, {}  # phase -> steps taken; name -> object with state_dict()
        self._sums, self._count, self._started = {}, 0, time.time()
        settings = json.loads(json.dumps(settings))  # as they will be read back
        config = self.folder / "config.json"
        if config.is_file() and (self.finished or self._checkpoint.is_file()):
            self._compare(json.loads(config.read_text())["settings"], settings)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            record = {"command": sys.argv, "settings": settings, "versions": versions()}
            files.write_json(config, record)
        self.settings = settings

    def _compare(self, before, now):
        keys = sorted(before.keys() | now.keys())
        if differ := [f"{key}: {before.get(key)} there, {now.get(key)} now" for key in keys
                      if before.get(key) != now.get(key)]:  # fmt: skip
            raise UserError(
                f"{self.folder} holds a run of other settings ({'; '.join(differ)}); "
                "give those, choose another --run-root or --seed, or delete that folder"
            )

    @property
    def _checkpoint(self):
        return self.folder / "checkpoint.pt"

    @property
    def finished(self):
        return self.artefact.is_file()

    def resume(self, device, state):
        """Take `state` (name -> object with state_dict and load_state_dict) as what a checkpoint keeps, and load the
        checkpoint if there is one. Raises UserError when that was written on another kind of device, whose random
        generator has another state."""
        self.state, self.device = state, device.type
        if self._checkpoint.is_file():
            checkpoint = files.load(self._checkpoint, "checkpoint", required=("done", "device", "state"))
            if checkpoint["device"] != self.device:
                raise UserError(
                    f"{self._checkpoint} was written on {checkpoint['device']}, this is {self.device}; "
                    f"go on with --device {checkpoint['device']}, or delete it to start afresh"
                )
            for name, part in self.state.items():
                part.load_state_dict(checkpoint["state"][name])
            self.done = checkpoint["done"]
        self._drop_log_after_checkpoint()

    def _drop_log_after_checkpoint(self):
        log = self.folder / "log.jsonl"
        if log.is_file():
            whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            lines = [json.loads(line) for line in whole]
            kept = [line for line in lines if line["step"] <= self.done.get(line["phase"], 0)]
            log.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def checkpoint(self):
        state = {name: part.state_dict() for name, part in self.state.items()}
        files.save(self._checkpoint, "checkpoint", {"done": self.done, "device": self.device, "state": state})

    def steps(self, phase, total):
        """Yield 0, 1, ... total-1, from where the checkpoint stands; show a bar; write checkpoints as time passes.

        SIGINT and SIGTERM end the loop after the current step with a checkpoint and `Stopped`.
        """
        self.phase, self.total = phase, total
        first = self.done.get(phase, 0)
        self._sums, self._count = {}, 0
        saved = time.time()
        with _Signals() as signals, progress.bar(total=total, initial=first, desc=phase) as self.bar:
            for step in range(first, total):
                yield step
                self.done[phase] = step + 1
                self.bar.update()
                if signals.received:
                    self.checkpoint()
                    raise Stopped(f"stopped after step {step + 1} of {total} ({phase}); the same command goes on there")
                if time.time() - saved > CHECKPOINT_SECONDS or step + 1 == total:
                    self.checkpoint()
                    saved = time.time()

    def log(self, step, **scalars):
        """Take the scalars of a step (tensors stay on their device); every `log_every` steps their means become a line
        of log.jsonl and the bar's text."""
        self._count += 1
        for name, value in scalars.items():
            value = value.detach() if torch.is_tensor(value) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
        if (step + 1) % self.log_every == 0 or step + 1 == self.total:
            means = {name: float(total) / self._count for name, total in self._sums.items()}
            self._sums, self._count = {}, 0
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
            line = {"phase": self.phase, "step": step + 1, "of": self.total, **means}
            line["seconds"] = round(time.time() - self._started, 2)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def finish(self, kind, content):
        """Write the artefact, which ends the run; its checkpoint is deleted."""
        files.save(self.artefact, kind, content)
        self._checkpoint.unlink(missing_ok=True)


class Tensors:
    """Learned tensors by name, as a part of the checkpoint; loaded in place."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def state_dict(self):
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class _Signals:
    """Notes the first SIGINT or SIGTERM instead of acting on it; a second one acts as usual."""

    def __enter__(self):
        self.received = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = True
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def versions():
    return {"python": sys.version.split()[0], "torch": str(torch.__version__)}
