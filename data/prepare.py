"""Decode a data set once into one uint8 file per (data set, size, split), which later runs map into memory."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.readers import READERS, Raw, in_root, read
from utils import progress
from utils.errors import UserError

FORMAT = 1
MOST_DAMAGED = 0.01  # share of unreadable images above which preparation stops
CHUNK = 512  # images decoded at a time


def prepare(name, split, size, root):
    """Make sure that <root>/prepared/<set>-<size>px/<split>.{npy,labels.npy,json} are there; return their stem.

    <split>.npy holds (n, size, size, 3) uint8; the JSON file, written last, counts, classes and the mean and standard
    deviation of each channel over [0, 1]. A folder of the user's is decoded again when its files have changed.
    Raises UserError when the raw images are missing or more than 1 % of them cannot be decoded.
    """
    stem = root / "prepared" / f"{folder_name(name, root)}-{size}px" / split
    record = stem.with_suffix(".json")
    known = json.loads(record.read_text()) if record.is_file() else None
    if known and known["format"] == FORMAT and name in READERS:
        return stem
    raw = read(name, split, root)
    fingerprint = _fingerprint(raw)
    if known and known["format"] == FORMAT and known["fingerprint"] == fingerprint:
        return stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    _write(raw, stem, size, fingerprint, f"{name} {split} {size}px")
    return stem


def folder_name(name, root):
    """The name under which a set is kept; a path gets its last part and a digest of the whole."""
    if name in READERS or in_root(name, root):
        return name
    path = Path(name).resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _fingerprint(raw: Raw):
    """A digest of the list of files with their sizes and times; of the number of images where they are arrays."""
    sha = hashlib.sha256(str(len(raw.images)).encode())
    for image in raw.images:
        if isinstance(image, Path):
            stat = image.stat()
            sha.update(f"{image}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:16]


def decode(image, size):
    """A path or uint8 array to (size, size, 3) uint8: RGB, resized without cropping, bilinear with antialiasing.

    Returns None where the file cannot be decoded.
    """
    try:
        with Image.open(image) if isinstance(image, Path) else Image.fromarray(image) as opened:
            if opened.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
                opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            picture = ImageOps.exif_transpose(opened).convert("RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)  # PIL's bilinear antialiases
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _write(raw, stem, size, fingerprint, title):
    n = len(raw.images)
    partial = stem.with_suffix(f".{os.getpid()}.partial")  # two commands may prepare the same set at once
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(n, size, size, 3))
    kept, damaged = [], []
    total, squares = np.zeros(3), np.zeros(3)
    with ThreadPoolExecutor(os.cpu_count()) as workers, progress.bar(total=n, desc=title) as bar:
        for start in range(0, n, CHUNK):
            part = range(start, min(start + CHUNK, n))
            for index, image in zip(part, workers.map(lambda i: decode(raw.images[i], size), part), strict=True):
                if image is None:
                    damaged.append(str(raw.images[index]))
                    continue
                pixels[len(kept)] = image
                kept.append(index)
            bar.update(len(part))
            if len(damaged) > MOST_DAMAGED * n:
                partial.unlink()
                raise UserError(f"{title}: {len(damaged)} of {n} images cannot be decoded, such as {damaged[0]}")
    for start in range(0, len(kept), CHUNK):
        part = pixels[start : min(start + CHUNK, len(kept))].astype(np.float64) / 255
        total, squares = total + part.sum((0, 1, 2)), squares + np.square(part).sum((0, 1, 2))
    count = len(kept) * size * size
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if damaged:
        print(f"{title}: skipped {len(damaged)} unreadable: {', '.join(damaged[:5])}")
        np.save(stem.with_suffix(".npy"), pixels[: len(kept)])
        partial.unlink()
    else:
        pixels.flush()
        os.replace(partial, stem.with_suffix(".npy"))
    stem.with_suffix(".labels.npy").unlink(missing_ok=True)
    if raw.labels is not None:
        np.save(stem.with_suffix(".labels.npy"), np.asarray(raw.labels, dtype=np.int64)[kept])
    record = dict(format=FORMAT, fingerprint=fingerprint, count=len(kept), classes=raw.classes, damaged=damaged,
                  mean=mean.tolist(), std=std.tolist())  # fmt: skip
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, stem.with_suffix(".json"))
