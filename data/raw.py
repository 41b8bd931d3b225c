"""Raw images by name or folder: selection of the reader and check of the published counts."""

from pathlib import Path

from data.archives import ARCHIVES
from data.folders import (
    find_test_folder,
    has_images,
    read_class_folders,
    read_unlabelled,
    split_class_folders,
)
from utils.errors import UserError


def in_data_root(name, root):
    """Whether the data root contains class folders of this name.

    Does not apply to imagenet, whose reader creates such folders.
    """
    return name != "imagenet" and Path(name).name == name and (root / name / "train").is_dir()


def read(name, split, root, labels=False):
    """Return a split of a named set, of class folders or of a folder of images as `Raw`.

    Args:
        name: in order of precedence, a folder <root>/<name> that contains train/, one of
            `ARCHIVES`, or a path.
        split: train or test.
        root: path of the data root.
        labels: True splits a folder without a test split in two. False reads a folder as unlabelled
            images if it has no train/ or if train/ itself contains images.

    Raises:
        UserError: if the images are missing; the message says where to put them.
    """
    if in_data_root(name, root):
        return _read_folder(root / name, split, labels)
    if name in ARCHIVES:
        return ARCHIVES[name].read(root, split)
    if Path(name).is_dir():
        return _read_folder(Path(name), split, labels)
    raise UserError(
        f"unknown data set {name}: not one of {', '.join(ARCHIVES)}, not a folder, and there are "
        f"no class folders {root / name}/train/<class>/"
    )


def _read_folder(top, split, labels):
    train = top / "train"
    if labels and find_test_folder(top) is None:
        return split_class_folders(train if train.is_dir() else top, split)
    if train.is_dir() and (labels or split == "test" or not has_images(train)):
        return read_class_folders(top, split)
    if split == "test":
        raise UserError(
            f"{top}: no test split, because this requires the folders train/ and test/ (or val/)"
        )
    return read_unlabelled(train if train.is_dir() else top)


def is_complete(name, split, raw):
    """Whether a named set has its published numbers of images and classes; None for others."""
    if name not in ARCHIVES:
        return None
    return (len(raw.images), len(raw.classes)) == published_counts(name, split)


def check_counts(name, split, size, root, raw):
    """Raise UserError if a named set does not have its published numbers of images and classes."""
    if is_complete(name, split, raw) is False:
        images, classes = published_counts(name, split)
        raise UserError(
            f"{name} {split}: found {len(raw.images):,} images of {len(raw.classes):,} classes, "
            f"but the published set has {images:,} of {classes:,}; to use a part, run: "
            f"python -m data.prepare {name} --size {size} --partial --data-root {root}"
        )


def published_counts(name, split):
    """Return the published numbers of images and classes of a named set's split."""
    archive = ARCHIVES[name]
    return getattr(archive, split), archive.classes
