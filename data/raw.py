"""Raw images by name or folder: which reader a data set's name means, and whether what it found is
all of the set."""

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
    """Whether the data root has class folders of this name, other than those that an archive's
    reader makes."""
    return name != "imagenet" and Path(name).name == name and (root / name / "train").is_dir()


def read(name, split, root, labels=False):
    """The `Raw` split `train` or `test` of a named set, of class folders, or of a folder of images.

    `name`: a folder <root>/<name> with train/ in it (this comes first, so that one's own copy of a
    named set is found), one of `ARCHIVES`, or a path. With `labels`, a folder without a test split
    is split in two; without them, a folder without train/ in it is taken as unlabelled images, and
    so is a train/ with images beside class folders or without any. Raises UserError when nothing is
    there, saying what to put where.
    """
    if in_data_root(name, root):
        return _read_folder(root / name, split, labels)
    if name in ARCHIVES:
        return ARCHIVES[name].read(root, split)
    if Path(name).is_dir():
        return _read_folder(Path(name), split, labels)
    raise UserError(
        f"unknown data set {name}: neither one of {', '.join(ARCHIVES)}, nor a folder, "
        f"nor class folders {root / name}/train/<class>/"
    )


def _read_folder(top, split, labels):
    train = top / "train"
    if labels and find_test_folder(top) is None:
        return split_class_folders(train if train.is_dir() else top, split)
    if train.is_dir() and (labels or split == "test" or not has_images(train)):
        return read_class_folders(top, split)
    if split == "test":
        raise UserError(f"{top}: a folder without train/ and test/ has no test split")
    return read_unlabelled(train if train.is_dir() else top)


def is_complete(name, split, raw):
    """Whether a named set has its published number of images and classes; None for any other."""
    if name not in ARCHIVES:
        return None
    return (len(raw.images), len(raw.classes)) == published_counts(name, split)


def check_counts(name, split, size, root, raw):
    """Raise UserError when a named set has another number of images or classes than the published
    one."""
    if is_complete(name, split, raw) is False:
        images, classes = published_counts(name, split)
        raise UserError(
            f"{name} {split}: found {len(raw.images):,} images of {len(raw.classes):,} classes, "
            "the published set has "
            f"{images:,} of {classes:,}; to use a part on purpose: "
            f"python -m data.prepare {name} --size {size} --partial --data-root {root}"
        )


def published_counts(name, split):
    """Images and classes of a named set's split as its makers count them."""
    archive = ARCHIVES[name]
    return getattr(archive, split), archive.classes
