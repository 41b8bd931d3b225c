"""Distilled sets for sharing: exported folders and the Hugging Face Hub.

`python -m distillers export` writes such a folder. `SET` holds the tensors and, as JSON in its
header, everything else. `SUMS` lists the SHA-256 of every file except README.md, which users edit.
"""

import functools
import json
import re
from pathlib import Path

from utils import files
from utils.errors import UserError
from utils.optional import import_optional

SET, SUMS, CARD = "distilled.safetensors", "SHA256SUMS", "README.md"
HEADER = "distilled"  # the only key in SET's header: several keys would come in a random order
FORMAT = 1  # version of the format of SET; incremented when older files become unreadable
TENSORS = ("images", "targets", "mean", "std")
HUB = "hf:"


@functools.cache
def download(name):
    """Download hf:USER/NAME or hf:USER/NAME@REVISION and return the path of `SET` in the cache.

    Raises UserError if the name is malformed or the download fails.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"{name}: must be {HUB}USER/NAME or {HUB}USER/NAME@REVISION")
    hub = import_optional("huggingface_hub", f"reading {name}")
    try:
        folder = hub.snapshot_download(
            match[1], repo_type="dataset", revision=match[2], allow_patterns=[SET, SUMS]
        )
    except Exception as error:  # of the Hub, the network or the cache
        raise UserError(f"{name}: cannot be downloaded ({describe_error(error)})") from error
    return find(Path(folder), name)


def describe_error(error):
    """Return a one-line description of an exception of another package."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def find(folder, name=None):
    """Return the path of `SET` in a folder. Raises UserError if it is not an exported set."""
    if missing := [each for each in (SET, SUMS) if not (folder / each).is_file()]:
        raise UserError(f"{name or folder}: not an exported set (no {' and no '.join(missing)})")
    return folder / SET


def write_sums(folder, main):
    """Write `SUMS` for all files of a folder except the card.

    The file `main` is the last in the list, so that a truncated list lacks it.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name not in (CARD, SUMS, main)] + [main]
    lines = [f"{files.compute_checksums(folder / name)['sha256']}  {name}\n" for name in names]
    files.write_text(folder / SUMS, "".join(lines))


def verify(folder, main):
    """Check the files of a folder against its `SUMS`. Files other than `main` may be missing.

    Raises DamagedFile for the first file that has changed, or if the list itself is damaged.
    """
    path, listed = folder / SUMS, {}
    text = path.read_text(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name:
            raise files.DamagedFile(f"{path}: damaged (line {number} is not a checksum of a file)")
        listed[name] = digest
    if main not in listed or not text.endswith("\n"):
        raise files.DamagedFile(f"{path}: truncated (it must end with the checksum of {main})")
    for name, digest in listed.items():
        path = folder / name
        if path.is_file() and files.compute_checksums(path)["sha256"] != digest:
            raise files.DamagedFile(
                f"{path}: damaged or altered (its content does not match its checksum in {SUMS})"
            )


def read(path):
    """Return the fields of a `Distilled` from the file `SET` at `path`, after `verify`.

    `meta` also holds the set's `name` and its `recipe`, the settings of `pretrain.py` for it.
    Raises UserError if the file cannot be read.
    """
    verify(find(path.parent).parent, path.name)
    safetensors = import_optional("safetensors", "reading an exported set")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            number, kind = header["format"], header["target_kind"]
            own = {"name": str(header["name"]), "recipe": dict(header["recipe"])}
            meta = header["meta"] | own
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except Exception as error:  # arbitrary bytes can cause any exception
        raise UserError(f"{path}: not an exported set ({describe_error(error)})") from error
    if number != FORMAT:
        raise UserError(
            f"{path}: exported set of format {str(number)[:40]}; this version reads {FORMAT}"
        )
    return tensors | {"target_kind": kind, "meta": meta}
