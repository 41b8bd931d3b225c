"""Files that one stage writes and another reads.

Files are written atomically, verified by checksum and read as data only: no code in them runs.
torch.save writes a zip archive; `save` stores the SHA-256 of the file as the archive's comment.
JSON records store theirs under the key `checksum`. The checksum of a .npy file is stored in the
file that describes it: a JSON record or a target.pt.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import socket
import struct
import warnings
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError

FORMAT = 3  # version of the format of `save`; incremented when older files become unreadable
MARK = b"sha256:"
COMMENT_BYTES = len(MARK) + 64  # the comment is the mark and 64 hexadecimal digits
COMMENT_LENGTH = struct.pack("<H", COMMENT_BYTES)  # the two bytes before the comment
# Largest array, in bytes, that is verified at each use even if its modification time is unchanged.
ALWAYS_VERIFIED = 2 << 30


class DamagedFile(UserError):
    """A file whose content has changed since it was written."""


def save(path, kind, content, previous=None):
    """Write a file atomically.

    Args:
        path: path of the file; an existing file is replaced.
        kind: kind of the file, which `load` checks.
        content: dict of tensors and plain values.
        previous: path that an existing file is moved to, or None.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path, previous) as partial, open(partial, "wb") as file:
        sink = _HashingWriter(file)
        torch.save({"kind": kind, "format": FORMAT, **content}, sink)
        if sink.error:
            raise sink.error
        file.seek(-len(COMMENT_LENGTH), os.SEEK_END)
        file.write(COMMENT_LENGTH + MARK + sink.sha.hexdigest().encode())


class _HashingWriter:
    """File object for torch.save that hashes the bytes.

    It stores an OSError instead of raising it, because torch.save may raise another error in its
    place.
    """

    def __init__(self, file):
        self.file, self.sha, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.sha.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self):
        pass


def load(path, kind, required=(), mapped=False):
    """Read a file that `save` wrote, onto the CPU and as data only.

    Args:
        path: path of the file.
        kind: expected kind.
        required: keys that the content must have.
        mapped: map tensors into memory, so that values are read on access.

    Returns:
        The dict that was saved, with `kind` and `format`.

    Raises:
        UserError: if the file is missing, has another kind or format, or lacks a required key.
        DamagedFile: if the file is unreadable or does not match its checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a {kind} file)")
    verified = _verify_comment(path)
    if verified is False:
        raise DamagedFile(f"{path}: damaged {kind} file (its content does not match its checksum)")
    content = read_data(path, f"{kind} file", mapped)
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = (
            content.get("kind", "unknown") if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(f"{path}: not a {kind} file (found: {str(found)[:40]})")
    number = content.get("format")
    if not isinstance(number, int) or number != FORMAT:
        raise UserError(
            f"{path}: {kind} file of format {str(number)[:40]}; this version reads format {FORMAT}"
        )
    if not verified:
        raise DamagedFile(
            f"{path}: {kind} file without its checksum (truncated, or changed by another program)"
        )
    require(content, path, kind, required)
    return content


def require(content, path, kind, keys):
    """Raise UserError unless the dict `content`, read from `path`, has all `keys`."""
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path}: {kind} file without {', '.join(missing)}")


def _verify_comment(path):
    """Whether a file matches the checksum at its end; None if it has no checksum."""
    with open(path, "rb") as file:
        body = file.seek(0, os.SEEK_END) - COMMENT_BYTES - len(COMMENT_LENGTH)
        if body < 0:
            return None
        file.seek(body)
        length, mark, digits = (file.read(n) for n in (len(COMMENT_LENGTH), len(MARK), 64))
        if (length, mark) != (COMMENT_LENGTH, MARK):
            return None
        sha = _sha256(file, body)
        sha.update(bytes(len(COMMENT_LENGTH)))  # length of the comment when the hash was computed
        return sha.hexdigest().encode() == digits


def _sha256(file, size):
    """Return the SHA-256 hash object of the first `size` bytes of an open file."""
    sha, left = hashlib.sha256(), size
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        sha.update(block)
        left -= len(block)
    return sha


def read_data(path, what, mapped=False):
    """Read a file of torch.save onto the CPU, as data only.

    Args:
        path: path of the file.
        what: description of the file, for the error message.
        mapped: as in `load`.

    Raises:
        DamagedFile: if the file is unreadable or contains more than data.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickles that fail to load anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # arbitrary bytes can cause any exception
        code = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        reason = (
            "it contains more than data"
            if code
            else (str(error).splitlines() or [type(error).__name__])[0][:120]
        )
        raise DamagedFile(f"{path}: not a readable {what} ({reason})") from error


def find_non_finite(content, name=""):
    """Find the first NaN or infinity in nested dicts, lists and tuples of tensors and floats.

    Returns:
        The name of the value, such as pool.members.0.network.fc.weight, or None.
    """
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return next(
            filter(
                None, (find_non_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)
            ),
            None,
        )
    if torch.is_tensor(content):
        return name if content.is_floating_point() and not content.isfinite().all() else None
    return name if isinstance(content, float) and not math.isfinite(content) else None


def digest(path):
    """Return the first 12 hexadecimal digits of a file's SHA-256, which identify the file."""
    return compute_checksums(path)["sha256"][:12]


def write_json(path, content):
    """Write a dict of plain values as JSON with its checksum, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n")


def read_json(path, what, format=None):
    """Read a file that `write_json` wrote.

    Args:
        path: path of the file.
        what: description of the file, for the error message.
        format: expected value of the key `format`, or None to accept any.

    Returns:
        The dict, or None if its format is another one.

    Raises:
        DamagedFile: if the file is unreadable or does not match its checksum.
    """
    try:
        content = json.loads(Path(path).read_text())
        if format is not None and content.get("format") != format:
            return None
        checksum = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path}: damaged {what} (not JSON with a checksum)") from error
    if checksum != _checksum(content):
        raise DamagedFile(f"{path}: damaged {what} (its content does not match its checksum)")
    return content


def _checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def create_array(path, dtype, shape):
    """Create a .npy file and return it as a memory-mapped array.

    The disk space is allocated now, so that a full disk raises OSError. Later, a write to the
    mapped memory would kill the process instead.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with name_in_errors(path), open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def compute_checksums(path):
    """Return what `verify` compares: a file's `sha256`, size in `bytes` and time `mtime_ns`."""
    with open(path, "rb") as file:
        stat = os.stat(path)
        sha = _sha256(file, stat.st_size).hexdigest()
    return {"sha256": sha, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def verify(path, expected, full=False, record=None):
    """Compare a file with its recorded checksums.

    A file of up to 2 GiB is always read in full. A larger file is read only if its modification
    time has changed, because reading ImageNet's 15 GB would slow every command down.

    Args:
        path: path of the file.
        expected: `compute_checksums` of the file when it was written.
        full: read files of any size.
        record: file that holds `expected` (default: the JSON file with the name of `path`).

    Raises:
        DamagedFile: if the file is missing or differs.
    """
    fault = "missing"
    if path.is_file():
        stat, fault = path.stat(), "its size has changed"
        if stat.st_size == expected["bytes"]:
            trusted = (
                not full
                and stat.st_size > ALWAYS_VERIFIED
                and stat.st_mtime_ns == expected["mtime_ns"]
            )
            if trusted or compute_checksums(path)["sha256"] == expected["sha256"]:
                return
            fault = "damaged (its content does not match its checksum)"
    record = record or path.with_suffix("").with_suffix(".json")
    raise DamagedFile(f"{path}: {fault}; delete {record} to recreate it")


def open_array(path, expected, record=None):
    """Verify a .npy file and return its array, mapped copy-on-write.

    `record` is as in `verify`.

    Raises:
        DamagedFile: if the file does not match its checksums `expected`.
    """
    verify(path, expected, record=record)
    return np.load(path, mmap_mode="c")


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """Context that yields a temporary path in the folder of `path`, to write a file to.

    On success, the file is flushed to disk and renamed to `path`, and an existing file is moved to
    `previous`, if given. On failure, the temporary file is deleted and nothing else changes.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _fsync(partial)
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems cannot flush a folder
            _fsync(path.parent)


def _fsync(path):
    """Flush a file or folder to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path, text):
    """Write a text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def name_in_errors(path):
    """Context that adds `path` to an OSError without a file name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def append_line(path, line, unless=lambda: False):
    """Append a line to a file that several processes may append to, and flush it to disk.

    An incomplete last line, which a killed process may leave, is removed.

    Args:
        path: path of the file.
        line: text without a line break.
        unless: function; if it returns True while the file is locked, nothing is appended.
    """
    with name_in_errors(path), open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        written = file.read()
        if unless():
            return
        file.truncate(written.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def wait_for_lock(path):
    """Context that holds the lock file `path`, after waiting for it.

    The operating system releases the lock when the process ends.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_locks = {}  # path of a lock file -> open file that holds the lock


def acquire_lock(path):
    """Lock the file `path` until `release_lock` or the end of the process.

    Does nothing if this process holds the lock already.

    Raises:
        UserError: if another process holds the lock.
    """
    path = Path(path).resolve()
    if path in _locks and path.exists():
        return
    file = open(path, "a+")  # noqa: SIM115, the lock lasts as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read() or "another process"
        file.close()
        raise UserError(
            f"{path.parent}: in use by {owner}; wait until that process has finished"
        ) from None
    with name_in_errors(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _locks[path] = file


def release_lock(path):
    """Release the lock of `acquire_lock`, if this process holds it."""
    if file := _locks.pop(Path(path).resolve(), None):
        file.close()
