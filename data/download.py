"""Public archives: fetched once, checked against their published checksum, and unpacked whole or
not at all."""

import hashlib
import os
import shutil
from pathlib import Path

from torchvision.datasets.utils import download_url, extract_archive

from utils.errors import UserError


def fetch(url, checksum, root, name, top):
    """Make sure that the folder `top` is there: what the archive at `url` holds under that name.

    `checksum`: "md5:..." or "sha256:..." of the archive, which is looked for in `root` under `name`
    before it is downloaded there. Raises UserError when it cannot be downloaded or is not the
    published file.
    """
    if top.exists():
        return
    archive = root / name
    if not archive.is_file():
        partial = f"{name}.{os.getpid()}.partial"
        try:
            download_url(url, str(root), partial)
        except (OSError, RuntimeError) as error:
            (root / partial).unlink(missing_ok=True)
            raise download_error(name, root, url, error) from error
        os.replace(root / partial, archive)
    verify(archive, checksum)
    aside = top.with_name(f"{top.name}.{os.getpid()}.partial")
    try:
        extract_archive(str(archive), str(aside))
        inside = aside / top.name
        top.parent.mkdir(parents=True, exist_ok=True)
        os.replace(inside if inside.is_dir() else aside, top)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify(archive, checksum):
    """Raise UserError unless the file's digest is `checksum` ("md5:..." or "sha256:...")."""
    kind, expected = checksum.split(":")
    digest = hashlib.new(kind)
    with open(archive, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise UserError(
            f"{archive}: its {kind} is {digest.hexdigest()}, not the published {expected}; delete "
            "it"
        )


def download_error(name, root, url, error):
    """The UserError for an archive that could not be downloaded."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{name} is not in {Path(root)} and could not be downloaded from {url} ({reason}); put it "
        "there"
    )
