"""Files that stages hand to each other: written whole or not at all, read as data only, known by their kind."""

import contextlib
import fcntl
import hashlib
import json
import os
import pickle
import warnings
from pathlib import Path

import torch

from utils.errors import UserError

FORMAT = 1  # of every file written here; raised when a reader of today could not read it


def save(path, kind, content):
    """Write the dict `content` (tensors and plain types) as a file of `kind`, replacing the old one at once.

    Raises OSError where the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        torch.save({"kind": kind, "format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path, kind, required=()):
    """Read a file that `save` wrote, on the CPU and as data only (no code in it is run).

    Raises UserError when it is missing, unreadable, of another kind or format, or lacks a `required` key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a {kind} file)")
    content = read_data(path, f"{kind} file")
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind", "unknown") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: not a {kind} file (found: {found})")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: {kind} file of format {content.get('format')}, this version reads format {FORMAT}")
    if missing := [key for key in required if key not in content]:
        raise UserError(f"{path}: {kind} file without {', '.join(missing)}")
    return content


def read_data(path, what):
    """What torch.save wrote, on the CPU; nothing in the file is run. Raises UserError where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that then cannot be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no such file make the reader do
        code = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        reason = "it holds more than data" if code else (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: not a readable {what} ({reason})") from error


def digest(path):
    """The first 12 hexadecimal digits of a file's SHA-256: enough to tell two files of a run apart."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:12]


def write_json(path, content):
    """Write plain values as JSON, replacing the old file at once."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    """Write a text file, replacing the old one at once."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


@contextlib.contextmanager
def locked(path):
    """Within: this process alone holds the lock file `path`; others wait. The lock ends with the process."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
