"""Raw images in folders: one folder per class, or without labels."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
HELD_OUT = 0.2  # fraction of each class that becomes the test split if none exists


@dataclass
class Raw:
    """A split before decoding.

    Attributes:
        images: list of paths, or of (H, W) or (H, W, 3) uint8 arrays.
        labels: list with an index into `classes` for each image, or None.
        classes: list of class names.
        made_split: whether this project made the split.
    """

    images: list
    labels: list | None
    classes: list
    made_split: bool = False


def make_raw(pairs, classes, place):
    """Return the `Raw` of (image, label) pairs. Raises UserError if there are none."""
    if not pairs:
        raise UserError(f"{place}: no images found")
    return Raw([path for path, _ in pairs], [label for _, label in pairs], classes)


def read_class_folders(top, split):
    """Return a split of <top>/train/<class>/** and <top>/test/<class>/** (or val) as `Raw`."""
    train, folder = top / "train", top / "train" if split == "train" else find_test_folder(top)
    if folder is None or not folder.is_dir():
        raise UserError(
            f"{top}: no folder {'train' if split == 'train' else 'test or val'} with class folders"
        )
    classes = list_subfolders(train)
    if unknown := sorted(set(list_subfolders(folder)) - set(classes)):
        raise UserError(
            f"{folder}: class folders that are missing in {train}: {', '.join(unknown[:5])}"
        )
    pairs = [
        (path, label) for label, name in enumerate(classes) for path in list_images(folder / name)
    ]
    return make_raw(pairs, classes, folder)


def has_images(folder):
    """Whether the folder itself, without its subfolders, contains image files."""
    return any(map(_is_image, folder.iterdir()))


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def find_test_folder(top):
    """Return the path of `top`/test or `top`/val, or None."""
    return next((top / name for name in ("test", "val") if (top / name).is_dir()), None)


def list_subfolders(folder):
    """Return the sorted names of the subfolders, without hidden ones."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def split_class_folders(top, split):
    """Return a split of <top>/<class>/**, which has no test split, as `Raw`.

    The test split is a fixed random fifth of each class, at least one image.

    Raises:
        UserError: if there are no class folders, or if a class has fewer than two images.
    """
    classes = list_subfolders(top)
    if not classes:
        raise UserError(f"{top}: no class folders, which a labelled data set needs")
    pairs = []
    for label, name in enumerate(classes):
        images = list_images(top / name)
        if len(images) < 2:
            raise UserError(
                f"{top / name}: {len(images)} images; a class needs one to train on and one to test"
            )
        order = np.random.default_rng(0).permutation(len(images))
        held_out = set(order[: max(1, round(HELD_OUT * len(images)))].tolist())
        pairs += [
            (path, label) for i, path in enumerate(images) if (i in held_out) == (split == "test")
        ]
    raw = make_raw(pairs, classes, top)
    raw.made_split = True
    return raw


def read_unlabelled(top):
    """Return all image files in a folder and its subfolders as `Raw`, sorted by path."""
    images = list_images(top)
    if not images:
        raise UserError(
            f"{top}: no images in this folder (searched for {' '.join(sorted(SUFFIXES))})"
        )
    return Raw(images, None, [])


def list_images(folder):
    """Return the sorted paths of all image files in `folder` and its subfolders.

    Follows links to folders, but reads each folder once. Skips broken links and hidden files.
    Raises UserError if a folder is not readable.
    """

    def fail(error):
        raise UserError(f"{error.filename}: no permission to read this folder") from error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        found += filter(_is_image, (Path(place, name) for name in names))
    return sorted(found)
