"""A split of a data set, as one tensor of uint8 pixels."""

from pathlib import Path

import torch

from data.prepare import find_prepared, folder_name, prepare
from data.raw import published_counts
from utils import files
from utils.errors import UserError


class ImageSet:
    """n images of S x S pixels.

    Attributes:
        name: name of the set (`data.prepare.folder_name`).
        pixels: (n, S, S, 3) uint8, mapped from disk.
        labels: (n,) int64, or None.
        classes: list of class names.
        mean, std: (3,) float32, of the training split with pixels in [0, 1].
        fingerprint: digest of the raw images.
        deviations: {"name split": [n, published count]} for a part of a named set, else {}.
        place: name or folder, as given by the user.
        damaged: list of the raw files that were skipped.
    """

    def __init__(
        self,
        name,
        pixels,
        labels,
        classes,
        mean,
        std,
        fingerprint,
        part=None,
        place=None,
        damaged=(),
    ):
        self.name, self.pixels, self.labels, self.classes = name, pixels, labels, classes
        self.mean, self.std, self.fingerprint = mean, std, fingerprint
        self.deviations, self.place, self.damaged = part or {}, place or name, damaged

    def __len__(self):
        return len(self.pixels)

    @property
    def image_size(self):
        return self.pixels.shape[1]

    def subset(self, index):
        """Return the images at `index` (k,) int64, copied into memory, as an `ImageSet`."""
        labels = None if self.labels is None else self.labels[index]
        facts = (self.classes, self.mean, self.std, self.fingerprint, self.deviations)
        return ImageSet(self.name, self.pixels[index], labels, *facts)

    def raw(self, index, device):
        """Return pixels in [0, 1] at `index` (b,): (b, 3, S, S) float32, channels-last."""
        return to_float(self.pixels[index].to(device, non_blocking=True))

    def normalised(self, index, device):
        """Return `raw` minus the mean, divided by the standard deviation."""
        return normalise(self.raw(index, device), self.mean, self.std)


def to_float(pixels):
    """Convert uint8 pixels (b, S, S, 3) to [0, 1]: (b, 3, S, S) float32, channels-last."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def normalise(x, mean, std):
    """Normalise pixels (b, 3, S, S) in [0, 1] by a mean (3,) and standard deviation (3,)."""
    mean, std = (each.to(x, non_blocking=True)[:, None, None] for each in (mean, std))
    return (x - mean) / std


def load_images(name, split, size, root, labels=False):
    """Return a split as an `ImageSet`; its first use decodes the images.

    Args:
        name: name of a data set or path of a folder.
        split: train or test.
        size: height and width in pixels.
        root: path of the data root.
        labels: split a folder without a test split in two.

    Raises:
        UserError: as `prepare`, or if a file is not readable or writable.
    """
    root = Path(root)
    try:
        record = prepare(name, split, size, root, labels)
        train = record if split == "train" else prepare(name, "train", size, root, labels)
    except PermissionError as error:
        raise UserError(f"{error.filename}: no permission to read or write it") from error
    return _image_set(folder_name(name, root), split, record, train, name)


def load_prepared_images(name, size, root):
    """Return the training split of a prepared set, whose raw images may be missing.

    Args:
        name: the set's `folder_name`, such as the source in a distilled set's meta.
        size: height and width in pixels.
        root: path of the data root.

    Raises:
        UserError: if the set is not prepared or is damaged.
    """
    record = find_prepared(name, "train", size, Path(root))
    return _image_set(name, "train", record, record, name)


def _image_set(set_name, split, record, train, name):
    """Return the `ImageSet` of a record (`data.prepare.prepare`).

    The statistics are those of `train`, the record of the training split.
    """
    arrays = {
        file: torch.from_numpy(files.open_array(record["stem"].parent / file, expected))
        for file, expected in record["files"].items()
    }
    return ImageSet(
        set_name,
        arrays[f"{split}.npy"],
        arrays.get(f"{split}.labels.npy"),
        record["classes"],
        torch.tensor(train["mean"], dtype=torch.float32),
        # The standard deviation of a constant channel is 0.
        torch.tensor([max(s, 1 / 255) for s in train["std"]], dtype=torch.float32),
        record["fingerprint"],
        {f"{name} {split}": [record["count"], published_counts(name, split)[0]]}
        if record["whole"] is False
        else {},
        place=name,
        damaged=record["damaged"],
    )
