"""Where each data set's raw images lie: its public archive's own layout, class folders, or a folder of images.

A reader returns a `Raw` split: the images as paths or as uint8 arrays, with labels where there are any.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision

from utils.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


@dataclass
class Raw:
    """A split before decoding: `images` holds paths or (H, W) or (H, W, 3) uint8 arrays; `labels` is None or holds
    an index into `classes` for each image."""

    images: list
    labels: list | None
    classes: list


def digits(root, split):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; 1,437 for training, 360 for the test, balanced."""
    from sklearn.datasets import load_digits  # here, since scikit-learn takes a second to import
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), grey values 0..16
    parts = train_test_split(pixels, bunch.target, test_size=360, random_state=0, stratify=bunch.target)
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return Raw(list(images), labels.tolist(), [str(digit) for digit in range(10)])


def cifar(torchvision_set):
    """CIFAR-10 or CIFAR-100 through torchvision, which downloads and verifies the archive where it is missing."""

    def read(root, split):
        try:
            found = torchvision_set(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            archive = torchvision_set.url.rsplit("/", 1)[-1]
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{torchvision_set.__name__} is not in {root} and could not be downloaded ({reason}); "
                f"put {archive} or its folder {torchvision_set.base_folder} there"
            ) from error
        return Raw(list(found.data), list(found.targets), list(found.classes))

    return read


def tinyimagenet(root, split):
    """TinyImageNet's archive: train/<wnid>/images/*.JPEG; the validation set, with its list, serves as the test set."""
    top = root / "tiny-imagenet-200"
    if not (top / "wnids.txt").is_file():
        raise UserError(f"tinyimagenet: no {top}/wnids.txt; unpack tiny-imagenet-200.zip in {root}")
    classes = sorted((top / "wnids.txt").read_text().split())
    index = {wnid: label for label, wnid in enumerate(classes)}
    if split == "train":
        pairs = [(path, index[wnid]) for wnid in classes for path in images_in(top / "train" / wnid / "images")]
    else:
        rows = [line.split("\t") for line in (top / "val" / "val_annotations.txt").read_text().splitlines()]
        pairs = [(top / "val" / "images" / row[0], index[row[1]]) for row in rows]
    return _raw(pairs, classes, top)


def archive_with_class_folders(name, *tops):
    """An archive that unpacks to one of the folders `tops`, with train/ and val/ or test/ of class folders in it."""

    def read(root, split):
        found = [root / top for top in tops if (root / top / "train").is_dir()]
        if not found:
            raise UserError(f"{name}: no folder {' or '.join(str(root / top) for top in tops)} with train/ in it")
        return class_folders(found[0], split)

    return read


def class_folders(top, split):
    """<top>/train/<class>/* and <top>/test/<class>/* (or val); a class is named by its folder, files at any depth."""
    train = top / "train"
    folder = train if split == "train" else next((top / n for n in ("test", "val") if (top / n).is_dir()), None)
    if folder is None or not folder.is_dir():
        raise UserError(f"{top}: no folder {'train' if split == 'train' else 'test or val'} with class folders in it")
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    strange = {path.name for path in folder.iterdir() if path.is_dir()} - set(classes)
    if strange:
        raise UserError(f"{folder}: class folders that {train} lacks: {', '.join(sorted(strange)[:5])}")
    pairs = [(path, label) for label, name in enumerate(classes) for path in images_in(folder / name)]
    return _raw(pairs, classes, folder)


def unlabelled(top):
    """Every image file below a folder, in the order of their paths."""
    if not os.access(top, os.R_OK | os.X_OK):
        raise UserError(f"{top}: no permission to read this folder")
    images = images_in(top)
    if not images:
        raise UserError(f"{top}: no image below this folder (looked for {' '.join(sorted(SUFFIXES))})")
    return Raw(images, None, [])


def images_in(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _raw(pairs, classes, place):
    if not pairs:
        raise UserError(f"{place}: no images found")
    return Raw([path for path, _ in pairs], [label for _, label in pairs], classes)


# name -> (root, split) -> Raw
READERS = {
    "digits": digits,
    "cifar10": cifar(torchvision.datasets.CIFAR10),
    "cifar100": cifar(torchvision.datasets.CIFAR100),
    "tinyimagenet": tinyimagenet,
    "imagenette": archive_with_class_folders("imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"),
    "imagenet": archive_with_class_folders("imagenet", "imagenet", "ILSVRC2012"),
}


def in_root(name, root):
    """Whether the data root has class folders of this name."""
    return Path(name).name == name and (root / name / "train").is_dir()


def read(name, split, root):
    """The `Raw` split `train` or `test` of a named set, of class folders, or of a folder of unlabelled images.

    `name`: a folder <root>/<name> with train/ in it (this comes first, so that one's own copy of a named set is
    found), one of `READERS`, or a path. Raises UserError when nothing is there, saying what to put where.
    """
    if in_root(name, root):
        return class_folders(root / name, split)
    if name in READERS:
        return READERS[name](root, split)
    if (Path(name) / "train").is_dir():
        return class_folders(Path(name), split)
    if Path(name).is_dir():
        if split == "test":
            raise UserError(f"{name}: a folder without train/ and test/ has no test split")
        return unlabelled(Path(name))
    raise UserError(
        f"unknown data set {name}: neither one of {', '.join(READERS)}, nor a folder, "
        f"nor class folders {root / name}/train/<class>/"
    )
