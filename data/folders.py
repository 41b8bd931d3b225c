"""Raw images in folders: with a folder per class, or without labels."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
HELD_OUT = 0.2  # share of each class that becomes the test split where there is none


@dataclass
class Raw:
    """A split before decoding: `images` holds paths or (H, W) or (H, W, 3) uint8 arrays; `labels`
    is None or holds an index into `classes` for each image; `made_split` tells that the split was
    made here."""

    images: list
    labels: list | None
    classes: list
    made_split: bool = False


def make_raw(pairs, classes, place):
    """A `Raw` of (image, label) pairs. Raises UserError where there are none."""
    if not pairs:
        raise UserError(f"{place}: no images found")
    return Raw([path for path, _ in pairs], [label for _, label in pairs], classes)


def read_class_folders(top, split):
    """<top>/train/<class>/* and <top>/test/<class>/* (or val); a class is named by its folder,
    files at any depth."""
    train, folder = top / "train", top / "train" if split == "train" else find_test_folder(top)
    if folder is None or not folder.is_dir():
        raise UserError(
            f"{top}: no folder {'train' if split == 'train' else 'test or val'} with class folders "
            "in it"
        )
    classes = list_subfolders(train)
    if strange := sorted(set(list_subfolders(folder)) - set(classes)):
        raise UserError(f"{folder}: class folders that {train} lacks: {', '.join(strange[:5])}")
    pairs = [
        (path, label) for label, name in enumerate(classes) for path in list_images(folder / name)
    ]
    return make_raw(pairs, classes, folder)


def has_images(folder):
    """Whether image files lie in the folder itself."""
    return any(map(_is_image, folder.iterdir()))


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def find_test_folder(top):
    return next((top / name for name in ("test", "val") if (top / name).is_dir()), None)


def list_subfolders(folder):
    """Names of the folders in `folder`, sorted; hidden ones are none of the user's classes."""
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def split_class_folders(top, split):
    """<top>/<class>/* without a test split: the same random fifth of each class, at least one
    image, is held out.

    Raises UserError where `top` has no class folders, or a class has one image only.
    """
    classes = list_subfolders(top)
    if not classes:
        raise UserError(f"{top}: no class folders in it, which a labelled data set needs")
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
    """Every image file below a folder, in the order of their paths."""
    images = list_images(top)
    if not images:
        raise UserError(
            f"{top}: no image below this folder (looked for {' '.join(sorted(SUFFIXES))})"
        )
    return Raw(images, None, [])


def list_images(folder):
    """Paths of all image files below `folder`, sorted; links to folders are followed, once. Broken
    links and hidden files are left out. Raises UserError for a folder that may not be read."""

    def fail(error):
        raise UserError(f"{error.filename}: no permission to read this folder") from error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        found += filter(_is_image, (Path(place, name) for name in names))
    return sorted(found)
