"""Download of public archives, with verification of checksums and atomic unpacking."""

import hashlib
import os
import shutil
from pathlib import Path

from torchvision.datasets.utils import download_url, extract_archive

from utils.errors import UserError


def fetch(url, checksum, root, name, top):
    """Download and unpack an archive, unless its folder exists.

    Args:
        url: address of the archive.
        checksum: "md5:..." or "sha256:..." of the archive.
        root: folder of the archive.
        name: file name of the archive; an existing file is used instead of a download.
        top: folder to create from the archive's folder of the same name, or from all of it.

    Raises:
        UserError: if the download fails or the checksum differs.
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
    partial_folder = top.with_name(f"{top.name}.{os.getpid()}.partial")
    try:
        extract_archive(str(archive), str(partial_folder))
        inside = partial_folder / top.name
        top.parent.mkdir(parents=True, exist_ok=True)
        os.replace(inside if inside.is_dir() else partial_folder, top)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


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
            "the file"
        )


def download_error(name, root, url, error):
    """Return the UserError for a failed download."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{name} is not in {Path(root)} and could not be downloaded from {url} ({reason}); put the "
        "file into that folder"
    )
