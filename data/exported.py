"""Distilled sets as other people get them: folders that `python -m distillers export` writes, and the Hugging Face Hub.

`SET` holds the tensors and, as JSON in its header, everything else. `SUMS` lists the SHA-256 of every file but
README.md, which is meant to be edited.
"""

import functools
import json
import re
from pathlib import Path

from utils import files
from utils.errors import UserError
from utils.optional import optional

SET, SUMS = "distilled.safetensors", "SHA256SUMS"
HEADER = "distilled"  # the one key of the header: the order of several keys is random, and so would be the checksum
FORMAT = 1  # of SET; raised when a reader of today could not read it
TENSORS = ("images", "targets", "mean", "std")
HUB = "hf:"


@functools.cache
def download(name):
    """Download `SET` and `SUMS` of `hf:USER/NAME` or `hf:USER/NAME@REVISION`; the path of `SET` in the Hub's cache.

    Raises UserError where the name is malformed or the Hub does not serve it.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"{name}: must be {HUB}USER/NAME or {HUB}USER/NAME@REVISION")
    hub = optional("huggingface_hub", f"reading {name}")
    try:
        folder = hub.snapshot_download(match[1], repo_type="dataset", revision=match[2], allow_patterns=[SET, SUMS])
    except Exception as error:  # of the Hub, the network, the cache: any stops the download
        raise UserError(f"{name}: cannot be downloaded ({reason(error)})") from error
    return find(Path(folder), name)


def reason(error):
    """An exception of another package in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def find(folder, name=None):
    """The path of `SET` in a folder. Raises UserError where the folder is no exported set."""
    if missing := [each for each in (SET, SUMS) if not (folder / each).is_file()]:
        raise UserError(f"{name or folder}: not an exported set (no {' and no '.join(missing)})")
    return folder / SET


def write_sums(folder, last):
    """Write `SUMS` for all files of a folder but README.md. `last` comes last, so that a cut list lacks it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("README.md", SUMS)]
    paths.sort(key=lambda path: path.name == last)
    lines = [f"{files.sums(path)['sha256']}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    files.write_text(folder / SUMS, "".join(lines))


def verify(folder, needed):
    """Check the files of a folder against its `SUMS`; those that are not there are no fault, but for `needed`.

    Raises Damaged for the first file whose bytes have changed, or where the list itself is damaged.
    """
    text, listed = (folder / SUMS).read_text(errors="replace"), {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name:
            raise files.Damaged(f"{folder / SUMS}: damaged (line {len(listed) + 1} is not a checksum and a name)")
        listed[name] = digest
    if needed not in listed or not text.endswith("\n"):
        raise files.Damaged(f"{folder / SUMS}: damaged (cut before the checksum of {needed})")
    for name, digest in listed.items():
        path = folder / name
        if path.is_file() and files.sums(path)["sha256"] != digest:
            raise files.Damaged(f"{path}: damaged or altered (its bytes do not fit its checksum in {SUMS})")


def read(path):
    """The fields of a `Distilled` from `SET` at `path`, after `verify`; `meta` also holds its `name` and `recipe` (the
    settings of `pretrain.py` for it). Raises UserError where the file cannot be read."""
    verify(find(path.parent).parent, path.name)
    safetensors = optional("safetensors", "reading an exported set")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            number, kind = header["format"], header["target_kind"]
            meta = header["meta"] | {"name": str(header["name"]), "recipe": dict(header["recipe"])}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except Exception as error:  # whatever bytes that are no such file make the reader do
        raise UserError(f"{path}: not an exported set ({reason(error)})") from error
    if number != FORMAT:
        raise UserError(f"{path}: exported set of format {str(number)[:40]}, this version reads format {FORMAT}")
    return tensors | {"target_kind": kind, "meta": meta}
