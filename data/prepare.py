"""Decode data sets into one uint8 file per data set, size and split.

Runs map these files into memory.

    python -m data.prepare cifar100 cifar10 aircraft --size 32
    python -m data.prepare ~/photos --size 64

Writes <data root>/prepared/<set>-<size>px/<split>.npy of shape (n, size, size, 3), with labels and
statistics in the same folder. Prints the counts, the size on disk and the statistics. Rerun the
same command to resume after an interruption. The other scripts prepare a data set when they first
use it; this command prepares several ahead of time.
"""

import contextlib
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import raw as raw_images
from data.archives import ARCHIVES
from data.folders import Raw, find_test_folder
from utils import cli, files, progress
from utils.errors import UserError
from utils.presets import image_size, preset_name

FORMAT = 3
MAX_DAMAGED_SHARE = 0.01  # largest accepted fraction of images that cannot be decoded
CHUNK = 512  # images decoded at a time
PROGRESS_SECONDS = 5  # time between writes of the progress file


def prepare(name, split, size, root, labels=False, partial=False):
    """Decode a split under <root>/prepared, unless that is done already.

    Writes <stem>.npy (n, size, size, 3) uint8, <stem>.labels.npy (n,) int64 if the split has
    labels, and finally the record <stem>.json. A split is decoded again when its raw files change.
    The files of a complete named set are compared only when one of their folders has changed.

    Args:
        name: name of a data set or path of a folder.
        split: train or test.
        size: height and width in pixels.
        root: path of the data root.
        labels: as in `raw.read`.
        partial: accept a part of a named set.

    Returns:
        The record, a dict: `count`, `classes`, `whole` (whether a named set has its published
        counts; None for others), `damaged` files, `mean` and `std` of each channel over [0, 1],
        `folders` (`_folder_times`), `files` (name -> `files.compute_checksums`) and the path
        `stem`.

    Raises:
        UserError: if raw images are missing, if their counts are not the published ones, or if more
            than 1 % of them are damaged.
    """
    stem = root / "prepared" / f"{folder_name(name, root)}-{size}px" / split
    replaced = raw_images.in_data_root(name, root)  # class folders replace an archive
    known = _record(stem) if name in ARCHIVES else None
    if known and known["whole"] and known.get("replaced") == replaced and _same_folders(known):
        return known
    raw = raw_images.read(name, split, root, labels)
    if raw.made_split:
        stem = stem.parent.with_name(f"{folder_name(name, root)}-split-{size}px") / split
    whole = raw_images.is_complete(name, split, raw)
    fingerprint = _fingerprint(raw, whole)
    facts = dict(fingerprint=fingerprint, whole=whole, replaced=replaced)
    if not _matches(known := _record(stem), fingerprint):
        if not partial:
            raw_images.check_counts(name, split, size, root, raw)
        if raw.made_split and split == "train":
            print(
                f"{name}: no test split found; using a random fifth of each class (seed 0) as the "
                "test split"
            )
        stem.parent.mkdir(parents=True, exist_ok=True)
        with files.wait_for_lock(stem.with_suffix(".lock")):
            # Another process may have decoded the split in the meantime.
            if not _matches(known := _record(stem), fingerprint):
                for leftover in stem.parent.glob(f"{split}.*.*.partial"):  # of a killed process
                    leftover.unlink()
                _write(raw, stem, size, f"{name} {split} {size}px", facts)
                known = _record(stem)
    elif whole:
        with contextlib.suppress(OSError):  # the disk may be read-only
            content = {key: value for key, value in known.items() if key != "stem"}
            folders = _folder_times(raw)
            files.write_json(stem.with_suffix(".json"), content | facts | dict(folders=folders))
    return known


def _folder_times(raw):
    """Return the modification times of the folders of the images: dict, path -> ns.

    Includes the parent folders up to the common one. Adding, removing or replacing a file changes
    the time of its folder.
    """
    folders = {image.parent for image in raw.images if isinstance(image, Path)}
    if not folders:
        return {}
    top = Path(os.path.commonpath(folders))
    for folder in [*folders]:
        while folder != top:
            folder = folder.parent
            folders.add(folder)
    present = sorted(folder for folder in folders if folder.is_dir())
    return {str(folder.resolve()): folder.stat().st_mtime_ns for folder in present}


def _same_folders(record):
    """Whether the folders of the raw images are unchanged since the record was written."""
    try:
        return "folders" in record and all(
            os.stat(folder).st_mtime_ns == changed for folder, changed in record["folders"].items()
        )
    except OSError:
        return False


def find_prepared(name, split, size, root):
    """Return the record of a prepared split without reading the raw images.

    Args:
        name: the set's `folder_name`.
        split, size, root: as in `prepare`.

    Raises:
        UserError: if the split is not prepared.
    """
    known = _record(root / "prepared" / f"{name}-{size}px" / split)
    if known is None:
        raise UserError(f"{name} at {size} px is not prepared in {root}")
    return known


def _record(stem):
    """Return the record of a split with its `stem`, or None if the split is not prepared.

    Raises UserError if the record is damaged.
    """
    path = stem.with_suffix(".json")
    record = files.read_json(path, "record of prepared images", FORMAT) if path.is_file() else None
    if record and record["name"] != _name(stem):
        raise UserError(f"{path}: the record of {record['name']}; delete it to recreate it")
    return record and record | {"stem": stem}


def _name(stem):
    """Return the name of a split in its record."""
    return f"{stem.parent.name}/{stem.name}"


def _matches(record, fingerprint):
    return record is not None and record["fingerprint"] == fingerprint


def folder_name(name, root):
    """Return the folder name of a prepared set: its name, or a path's last part and digest."""
    if name in ARCHIVES or raw_images.in_data_root(name, root):
        return name
    path = Path(name).resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _fingerprint(raw: Raw, whole):
    """Return a digest of the raw images.

    It covers the paths below the common folder and the sizes of the files. Unless they are a
    complete named set (`whole`), it also covers their modification times. Of arrays, it covers
    their number.
    """
    sha = hashlib.sha256(f"{len(raw.images)} {raw.made_split}".encode())
    paths = [image for image in raw.images if isinstance(image, Path)]
    common = os.path.commonpath(paths) if paths else ""
    for image in raw.images:
        if isinstance(image, Path):
            try:
                stat = image.stat()
                size, changed = stat.st_size, stat.st_mtime_ns
            except FileNotFoundError:  # a list may name a missing file, which counts as damaged
                size, changed = -1, 0
            changed = "" if whole else changed
            name = str(image).removeprefix(common)
            sha.update(f"{name}\0{size}\0{changed}\0".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:16]


def decode(image, size):
    """Decode an image and resize it without cropping, with the Lanczos filter (D18).

    Transparent pixels become white.

    Args:
        image: path, or uint8 array (H, W) or (H, W, 3).
        size: height and width in pixels.

    Returns:
        (size, size, 3) uint8 array in RGB, or None if the file cannot be decoded.
    """
    try:
        with Image.open(image) if isinstance(image, Path) else Image.fromarray(image) as opened:
            if opened.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip
                opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("RGB")
            if picture.size != (size, size):
                # The released statistics imply this filter (D18).
                picture = picture.resize((size, size), Image.Resampling.LANCZOS)
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def without_damaged(images, damaged):
    """Return the raw images (paths or arrays) without the files in `damaged`, in order."""
    damaged = set(damaged)
    return [each for each in images if not (isinstance(each, Path) and str(each) in damaged)]


class _PartialFile:
    """File of a split that is being decoded, with a progress file for resuming."""

    def __init__(self, stem, shape, fingerprint):
        self.path, self.progress = stem.with_suffix(".partial"), stem.with_suffix(".partial.json")
        self.shape, self.gaps, self.damaged = shape, [], []  # gaps: indices of damaged images
        # Exact sums: below 2^63 for any set.
        self.total, self.squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self.fingerprint, self.done, self.written_at = fingerprint, 0, time.monotonic()
        known = _read_progress(self.progress) if self.path.is_file() else {}
        fits = (
            known.get("fingerprint") == fingerprint and self.path.stat().st_size == known["bytes"]
        )
        if fits:
            self.done, self.damaged, self.gaps = known["done"], known["damaged"], known["gaps"]
            self.total, self.squares = np.array(known["total"]), np.array(known["squares"])
            self.pixels = np.lib.format.open_memmap(self.path, mode="r+")
        else:
            self.progress.unlink(missing_ok=True)
            try:
                self.pixels = files.create_array(self.path, np.uint8, shape)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise

    @property
    def count(self):
        """Number of decoded images so far."""
        return self.done - len(self.gaps)

    def add(self, index, image, name):
        """Store the image at `index`; None marks the file `name` as damaged."""
        if image is None:
            self.damaged.append(str(name))
            self.gaps.append(index)
            self.done = index + 1
            return
        self.pixels[self.count] = image
        self.done = index + 1
        flat = image.reshape(-1, 3).astype(np.int64)
        self.total += flat.sum(0)
        self.squares += np.square(flat).sum(0)

    def write_progress(self, force=False):
        """Write the progress file every few seconds, after flushing the pixels to disk."""
        if force or time.monotonic() - self.written_at > PROGRESS_SECONDS:
            self.pixels.flush()
            files.write_json(
                self.progress,
                dict(
                    fingerprint=self.fingerprint,
                    done=self.done,
                    damaged=self.damaged,
                    gaps=self.gaps,
                    total=self.total.tolist(),
                    squares=self.squares.tolist(),
                    bytes=self.path.stat().st_size,
                ),
            )
            self.written_at = time.monotonic()

    def finish(self, path):
        """Remove the space reserved for damaged images and move the file to `path`."""
        self.pixels.flush()
        offset, size = self.pixels.offset, self.pixels[0].nbytes
        del self.pixels
        if self.damaged:
            with open(self.path, "r+b") as file:
                header = {
                    "descr": "|u1",
                    "fortran_order": False,
                    "shape": (self.count, *self.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
                if file.tell() != offset:
                    raise RuntimeError("the length of the .npy header has changed")
                file.truncate(offset + self.count * size)
        with files.atomic_write(path) as partial:
            os.replace(self.path, partial)

    def delete(self):
        """Delete both files."""
        self.path.unlink(missing_ok=True)
        self.progress.unlink(missing_ok=True)


def _read_progress(path):
    """Return the content of a progress file; {} if it is missing or damaged."""
    try:
        return files.read_json(path, "progress file") if path.is_file() else {}
    except files.DamagedFile:
        return {}


def _write(raw, stem, size, title, facts):
    """Decode a split and write its files; `facts` are added to its record."""
    n = len(raw.images)
    out = _PartialFile(stem, (n, size, size, 3), facts["fingerprint"])
    with (
        ThreadPoolExecutor(os.cpu_count()) as workers,
        progress.progress_bar(total=n, initial=out.done, desc=title) as bar,
    ):
        try:
            for start in range(out.done, n, CHUNK):
                part = range(start, min(start + CHUNK, n))
                decoded = workers.map(lambda index: decode(raw.images[index], size), part)
                for index, image in zip(part, decoded, strict=True):
                    out.add(index, image, raw.images[index])
                if len(out.damaged) > MAX_DAMAGED_SHARE * n:
                    out.delete()
                    raise UserError(
                        f"{title}: {len(out.damaged)} of {n} images cannot be decoded, for example "
                        f"{out.damaged[0]}"
                    )
                bar.update(len(part))
                out.write_progress()
        except KeyboardInterrupt:
            out.write_progress(force=True)
            raise
    if out.damaged:
        print(f"{title}: skipped {len(out.damaged)} damaged images: {', '.join(out.damaged[:5])}")
    # Without its record, the split counts as not prepared.
    stem.with_suffix(".json").unlink(missing_ok=True)
    out.finish(stem.with_suffix(".npy"))
    stem.with_suffix(".labels.npy").unlink(missing_ok=True)
    paths = [stem.with_suffix(".npy")]
    if raw.labels is not None:
        paths.append(stem.with_suffix(".labels.npy"))
        with files.atomic_write(paths[-1]) as partial, open(partial, "wb") as file:
            np.save(file, np.delete(np.asarray(raw.labels, dtype=np.int64), out.gaps))
    count = out.count * size * size * 255
    mean = out.total / count
    std = np.sqrt(np.maximum(out.squares / (count * 255) - mean**2, 0))
    record = dict(
        format=FORMAT,
        name=_name(stem),
        **facts,
        folders=_folder_times(raw),
        count=out.count,
        classes=raw.classes,
        damaged=out.damaged,
        mean=mean.tolist(),
        std=std.tolist(),
        files={path.name: files.compute_checksums(path) for path in paths},
    )
    files.write_json(stem.with_suffix(".json"), record)
    out.delete()


def summary(name, split, record):
    """Return a description of a prepared split for the terminal."""
    stem = record["stem"]
    size = sum(path.stat().st_size for path in stem.parent.glob(f"{split}.*"))
    counts = f"{record['count']:,} images" + (
        f" of {len(record['classes'])} classes" if record["classes"] else ""
    )
    part = " (part of the published set)" if record["whole"] is False else ""
    damaged = f", {len(record['damaged'])} damaged images skipped" if record["damaged"] else ""
    mean, std = (" ".join(f"{value:.4f}" for value in record[key]) for key in ("mean", "std"))
    facts = f"{counts}{part}{damaged}, {size / 1e6:,.1f} MB, mean {mean}, std {std}"
    return f"{name} {split}: {facts}\n  {stem}.npy"


def main(argv):
    args = parse_args(argv)
    for name in args.names:
        size = args.size or image_size(preset_name(name))
        top = args.data_root / name if raw_images.in_data_root(name, args.data_root) else Path(name)
        split_folders = (top / "train").is_dir() and find_test_folder(top) is not None
        plain = name not in ARCHIVES and not split_folders and not args.labels
        for split in ("train",) if plain else ("train", "test"):
            record = prepare(name, split, size, args.data_root, args.labels, args.partial)
            if args.list:
                raw = raw_images.read(name, split, args.data_root, args.labels)
                for row, image in enumerate(without_damaged(raw.images, record["damaged"])):
                    print(f"{split}\t{row}\t{image if isinstance(image, Path) else ''}")
                continue
            for file, expected in record["files"].items() if args.verify else ():
                files.verify(record["stem"].parent / file, expected, full=True)
            print(summary(name, split, record))


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(ARCHIVES)}, or a folder of images or class folders",
    )
    parser.add_argument(
        "--size",
        type=cli.pixels,
        help="height and width in pixels, such as 32, 64 or 224 (default: that of the preset)",
    )
    cli.add_data_root(parser)
    parser.add_argument(
        "--labels",
        action="store_true",
        help="treat a folder without train/ as class folders and split them",
    )
    parser.add_argument("--partial", action="store_true", help="accept a part of the published set")
    parser.add_argument(
        "--list",
        action="store_true",
        help="print split, row and file of each image, in the order of the rows; the file is empty "
        "for images that are not files",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the prepared files in full and compare their checksums",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
