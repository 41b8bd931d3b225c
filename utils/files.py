"""Files that stages hand to each other: whole or not there, read as data only, known by kind,
verified by checksum.

What torch.save writes is a zip archive; a file of `save` carries, as that archive's comment, the
SHA-256 of its bytes. JSON records carry theirs under `checksum`. Large arrays are .npy files whose
checksums lie in such a record.
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

FORMAT = 3  # of every file of `save`; raised when older files cannot be read any more
MARK = b"sha256:"
COMMENT_BYTES = len(MARK) + 64  # the archive's comment: the mark and 64 hexadecimal digits
COMMENT_LENGTH = struct.pack(
    "<H", COMMENT_BYTES
)  # as the archive's last two bytes, before the comment, have it
# Bytes up to which an array is verified at each use, even if its time has not changed.
ALWAYS_VERIFIED = 2 << 30


class DamagedFile(UserError):
    """A file whose bytes are not those that were written."""


def save(path, kind, content, previous=None):
    """Write the dict `content` (tensors and plain types) as a file of `kind`, replacing the old one
    at once, which is kept as `previous` if that is given.

    Raises OSError where the folder cannot be written to.
    """
    with atomic_write(path, previous) as partial, open(partial, "wb") as file:
        sink = _HashingWriter(file)
        torch.save({"kind": kind, "format": FORMAT, **content}, sink)
        if sink.error:
            raise sink.error
        file.seek(-len(COMMENT_LENGTH), os.SEEK_END)
        file.write(COMMENT_LENGTH + MARK + sink.sha.hexdigest().encode())


class _HashingWriter:
    """Where torch.save writes: hashes the bytes, and keeps an OSError, which torch might turn into
    another error."""

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
    """Read a file that `save` wrote, on the CPU and as data only (no code in it is run); if
    `mapped`, a tensor's values are read when they are used.

    Raises UserError when it is missing, of another kind or format, or lacks a `required` key;
    DamagedFile when it cannot be read or its bytes do not fit its checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a {kind} file)")
    verified = _verify_comment(path)
    if verified is False:
        raise DamagedFile(
            f"{path}: damaged {kind} file (its bytes do not fit the checksum at its end)"
        )
    content = read_data(path, f"{kind} file", mapped)
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = (
            content.get("kind", "unknown") if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(f"{path}: not a {kind} file (found: {str(found)[:40]})")
    number = content.get("format")
    if not isinstance(number, int) or number != FORMAT:
        raise UserError(
            f"{path}: {kind} file of format {str(number)[:40]}, this version reads format {FORMAT}"
        )
    if not verified:
        raise DamagedFile(
            f"{path}: {kind} file without its checksum (cut, or changed by something else)"
        )
    require(content, path, kind, required)
    return content


def require(content, path, kind, keys):
    """Raise UserError unless the dict that was read from `path` has all `keys`."""
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path}: {kind} file without {', '.join(missing)}")


def _verify_comment(path):
    """Whether a file's bytes fit the checksum at its end; None where there is none."""
    with open(path, "rb") as file:
        body = file.seek(0, os.SEEK_END) - COMMENT_BYTES - len(COMMENT_LENGTH)
        if body < 0:
            return None
        file.seek(body)
        length, mark, digits = (file.read(n) for n in (len(COMMENT_LENGTH), len(MARK), 64))
        if (length, mark) != (COMMENT_LENGTH, MARK):
            return None
        sha = _sha256(file, body)
        sha.update(bytes(len(COMMENT_LENGTH)))  # without a comment its length is 0
        return sha.hexdigest().encode() == digits


def _sha256(file, size):
    """Of the first `size` bytes of an open file."""
    sha, left = hashlib.sha256(), size
    file.seek(0)
    while left and (block := file.read(min(left, 1 << 20))):
        sha.update(block)
        left -= len(block)
    return sha


def read_data(path, what, mapped=False):
    """What torch.save wrote, on the CPU; nothing in the file is run. Raises DamagedFile where that
    fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that then cannot be read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever bytes that are no such file make the reader do
        code = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        reason = (
            "it holds more than data"
            if code
            else (str(error).splitlines() or [type(error).__name__])[0][:120]
        )
        raise DamagedFile(f"{path}: not a readable {what} ({reason})") from error


def find_non_finite(content, name=""):
    """The name, such as pool.members.0.network.fc.weight, of the first tensor or float in nested
    dicts, lists and tuples that holds NaN or infinity; None where there is none."""
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
    """The first 12 hexadecimal digits of a file's SHA-256, which identify a file of a run."""
    return checksums(path)["sha256"][:12]


def write_json(path, content):
    """Write a dict of plain values as JSON with its checksum, replacing the old file at once."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n")


def read_json(path, what, format=None):
    """The dict that `write_json` wrote, or None where its `format` is not the given one. Raises
    DamagedFile."""
    try:
        content = json.loads(Path(path).read_text())
        if format is not None and content.get("format") != format:
            return None
        checksum = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path}: damaged {what} (no JSON with a checksum)") from error
    if checksum != _checksum(content):
        raise DamagedFile(f"{path}: damaged {what} (its values do not fit its checksum)")
    return content


def _checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def create_array(path, dtype, shape):
    """A .npy file mapped into memory, to be filled. Its room on disk is taken now: on a full disk
    this is an OSError, where a write to mapped memory would end the process."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with name_in_errors(path), open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def checksums(path):
    """What a record keeps of a file, for `verify`: its SHA-256, size, and the time of its last
    change."""
    with open(path, "rb") as file:
        stat = os.stat(path)
        sha = _sha256(file, stat.st_size).hexdigest()
    return {"sha256": sha, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def verify(path, expected, full=False):
    """Raise DamagedFile unless the file at `path` has the `checksums` that a record keeps of it.

    Up to 2 GiB all of its bytes are read. Beyond that only where its time has changed, or if
    `full`: reading ImageNet's 15 GB at each start would take longer than many a command.
    """
    fault = "missing"
    if path.is_file():
        stat, fault = path.stat(), "of another size than it was made with"
        if stat.st_size == expected["bytes"]:
            trusted = (
                not full
                and stat.st_size > ALWAYS_VERIFIED
                and stat.st_mtime_ns == expected["mtime_ns"]
            )
            if trusted or checksums(path)["sha256"] == expected["sha256"]:
                return
            fault = "damaged (its bytes do not fit its checksum)"
    raise DamagedFile(
        f"{path}: {fault}; delete {path.with_suffix('').with_suffix('.json')} and it is made again"
    )


def open_array(path, expected):
    """The array of a .npy file whose `checksums` are as expected, mapped into memory; writing to it
    changes a copy."""
    verify(path, expected)
    return np.load(path, mmap_mode="c")


@contextlib.contextmanager
def atomic_write(path, previous=None):
    """A path beside `path` to write a file to. When the block ends well, that file is on disk and
    becomes `path`, and the one before `previous` if that is given; when it fails, everything is as
    it was."""
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
        with contextlib.suppress(OSError):  # not every file system can do so to a folder
            _fsync(path.parent)


def _fsync(path):
    """Wait until a file or folder is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path, text):
    """Write a text file, replacing the old one at once."""
    with atomic_write(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def name_in_errors(path):
    """Within: an OSError that names no file names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def append_line(path, line, unless=lambda: False):
    """Add a line to a file that several processes may add to, and wait until it is on disk; or not,
    where `unless()`, asked when no other can, is true. What a process that died has left of a line
    is cut off."""
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
    """Within: this process alone holds the lock file `path`; others wait. The lock ends with the
    process."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_locks = {}  # lock file -> the open file that holds the lock


def acquire_lock(path):
    """Hold the lock file `path` until `release_lock` or the end of this process, however it ends;
    it may be held already.

    Raises UserError at once when another process holds it.
    """
    path = Path(path).resolve()
    if path in _locks and path.exists():
        return
    file = open(path, "a+")  # noqa: SIM115, the lock lasts as long as it is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read() or "another process"
        file.close()
        raise UserError(f"{path.parent}: {who} is at work there; let it end first") from None
    with name_in_errors(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _locks[path] = file


def release_lock(path):
    """End what `acquire_lock` began, if it did."""
    if file := _locks.pop(Path(path).resolve(), None):
        file.close()
