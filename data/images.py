"""A split of a data set as every stage sees it: uint8 pixels in one tensor, gathered by index."""

from pathlib import Path

import torch

from data.prepare import find_prepared, folder_name, prepare
from data.raw import published_counts
from utils import files
from utils.errors import UserError


class ImageSet:
    """n images of S x S pixels.

    `pixels` (n, S, S, 3) uint8, mapped from disk; `labels` (n,) int64 or None; `classes` their
    names; `mean` and `std` (3,) float32 of the set's training split over [0, 1]; `fingerprint`
    differs when the raw images do; `deviations` is {"name split": [n, published count]} where these
    are a part of a named set, else empty. `place` is the name or folder that the set was asked for
    by, `damaged` the raw files that were left out.
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
        """The images at `index` (k,) int64, copied out of the file."""
        labels = None if self.labels is None else self.labels[index]
        facts = (self.classes, self.mean, self.std, self.fingerprint, self.deviations)
        return ImageSet(self.name, self.pixels[index], labels, *facts)

    def raw(self, index, device):
        """Pixels in [0, 1] at `index` (b,): (b, 3, S, S) float32 on `device`, channels-last in
        memory."""
        return to_float(self.pixels[index].to(device))

    def normalised(self, index, device):
        """As `raw`, minus the mean, divided by the standard deviation."""
        return normalise(self.raw(index, device), self.mean, self.std)


def to_float(pixels):
    """uint8 pixels (b, S, S, 3) as values in [0, 1]: (b, 3, S, S) float32, channels-last."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def normalise(x, mean, std):
    """Normalise pixels (b, 3, S, S) in [0, 1] by a mean (3,) and standard deviation (3,)."""
    return (x - mean.to(x)[:, None, None]) / std.to(x)[:, None, None]


def load_images(name, split, size, root, labels=False):
    """The `ImageSet` of a data set's name or a folder, decoded at the first use. Raises UserError
    (`prepare`).

    With `labels`, a folder without a test split is split in two.
    """
    root = Path(root)
    try:
        record = prepare(name, split, size, root, labels)
        train = record if split == "train" else prepare(name, "train", size, root, labels)
    except PermissionError as error:
        raise UserError(f"{error.filename}: no permission to read or write it") from error
    return _image_set(folder_name(name, root), split, record, train, name)


def load_prepared_images(name, size, root):
    """The training split of what is decoded already under `name`, which may be that of a folder of
    the user's in a distilled set's meta. Raises UserError where nothing is, or where it is damaged.
    """
    record = find_prepared(name, "train", size, Path(root))
    return _image_set(name, "train", record, record, name)


def _image_set(set_name, split, record, train, name):
    """The `ImageSet` of a `record` (`data.prepare.prepare`), with the statistics of that of the
    training split."""
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
        torch.tensor(
            [max(s, 1 / 255) for s in train["std"]], dtype=torch.float32
        ),  # a channel may be constant
        record["fingerprint"],
        {f"{name} {split}": [record["count"], published_counts(name, split)[0]]}
        if record["whole"] is False
        else {},
        place=name,
        damaged=record["damaged"],
    )
