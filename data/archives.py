"""Readers of the paper's data sets, from the layout of their public archives in the data root.

torchvision reads, downloads and verifies a data set if it supports it. Other archives are
downloaded by this module. If an archive cannot be downloaded, the error says where to put it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision

from data.download import download_error, fetch
from data.folders import Raw, list_images, make_raw, read_class_folders
from utils.errors import UserError


def read_digits(root, split):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, split into 1,437 and 360 by class."""
    from sklearn.datasets import load_digits  # importing scikit-learn takes a second
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), grey values 0..16
    parts = train_test_split(
        pixels, bunch.target, test_size=360, random_state=0, stratify=bunch.target
    )
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    return Raw(list(images), labels.tolist(), [str(digit) for digit in range(10)])


def load_torchvision(dataset, archive, url, root, **options):
    """Return a torchvision data set, downloaded if missing.

    Raises UserError if the download fails.
    """
    try:
        return dataset(root, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise download_error(archive, root, url, error) from error


def make_cifar_reader(dataset):
    """Return the reader of CIFAR-10 or CIFAR-100."""

    def read(root, split):
        found = load_torchvision(
            dataset, dataset.url.rsplit("/", 1)[-1], dataset.url, root, train=split == "train"
        )
        return Raw(list(found.data), list(found.targets), list(found.classes))

    return read


def read_aircraft(root, split):
    """FGVC-Aircraft by variant.

    The training split includes the validation images, as in the released code. torchvision has no
    checksum of this archive, so the counts and the existence of each listed image are checked.
    """
    dataset = torchvision.datasets.FGVCAircraft
    archive = "fgvc-aircraft-2013b.tar.gz"
    part = "trainval" if split == "train" else "test"
    found = load_torchvision(dataset, archive, dataset._URL, root, split=part)
    return Raw(
        [Path(path) for path in found._image_files], list(found._labels), list(found.classes)
    )


def read_flowers(root, split):
    """Oxford Flowers 102.

    The training split is the 1,020 training and 1,020 validation images (docs/departures.md, D20).
    """
    dataset = torchvision.datasets.Flowers102
    images, labels = [], []
    for part in ("train", "val") if split == "train" else ("test",):
        found = load_torchvision(
            dataset, "flowers-102/102flowers.tgz", dataset._download_url_prefix, root, split=part
        )
        images += found._image_files
        labels += found._labels
    classes = getattr(dataset, "classes", [str(label) for label in range(102)])
    return Raw([Path(path) for path in images], labels, list(classes))


def read_cars(root, split):
    """Stanford Cars. Its website is offline, so it is not downloaded."""
    try:
        found = torchvision.datasets.StanfordCars(root, split=split)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cars: not found; put into {root / 'stanford_cars'}: the folders devkit (from "
            "car_devkit.tgz), cars_train (from cars_train.tgz) and cars_test (from cars_test.tgz), "
            "and cars_test_annos_withlabels.mat"
        ) from error
    return make_raw(
        [(Path(path), int(label)) for path, label in found._samples], list(found.classes), "cars"
    )


def read_cub2011(root, split):
    """Caltech-UCSD Birds-200-2011: text files list images, labels and the split."""
    top = root / "CUB_200_2011"
    url = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1"
    fetch(url, "md5:97eceeb196236b17998738112f37df78", root, "CUB_200_2011.tgz", top)

    def column(name):
        rows = (line.split(maxsplit=1) for line in (top / name).read_text().splitlines())
        return {key: value.strip() for key, value in rows}

    paths, labels, training = (
        column(name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    pairs = [
        (top / "images" / path, int(labels[key]) - 1)
        for key, path in paths.items()
        if (training[key] == "1") == (split == "train")
    ]
    return make_raw(pairs, list(column("classes.txt").values()), top)


def read_dogs(root, split):
    """Stanford Dogs: folders by breed; MATLAB files list the splits."""
    from scipy.io import loadmat  # used by this reader only

    top = root / "stanford_dogs"
    home = "http://vision.stanford.edu/aditya86/ImageNetDogs"
    lists = "sha256:34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"
    images = "sha256:a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"
    fetch(f"{home}/lists.tar", lists, top, "lists.tar", top / "lists")
    fetch(f"{home}/images.tar", images, top, "images.tar", top / "Images")
    found = loadmat(top / "lists" / f"{split}_list.mat", squeeze_me=True)
    pairs = [
        (top / "Images" / str(path), int(label) - 1)
        for path, label in zip(found["file_list"], found["labels"], strict=True)
    ]
    names = {label: path.parent.name for path, label in pairs}
    return make_raw(pairs, [names[label] for label in sorted(names)], top)


def read_tinyimagenet(root, split):
    """TinyImageNet: train/<wnid>/images/*.JPEG. The validation set is the test split."""
    top = root / "tiny-imagenet-200"
    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    fetch(url, "md5:90528d7ca1a48142e341f4ef8d21d0de", root, "tiny-imagenet-200.zip", top)
    classes = sorted((top / "wnids.txt").read_text().split())
    index = {wnid: label for label, wnid in enumerate(classes)}
    if split == "train":
        pairs = [
            (path, index[wnid])
            for wnid in classes
            for path in list_images(top / "train" / wnid / "images")
        ]
    else:
        rows = [
            line.split("\t")
            for line in (top / "val" / "val_annotations.txt").read_text().splitlines()
        ]
        pairs = [(top / "val" / "images" / row[0], index[row[1]]) for row in rows]
    return make_raw(pairs, classes, top)


def read_imagenette(root, split):
    """ImageNette, version 2, in any of its sizes. If none exists, the full size is downloaded."""
    found = [
        root / name
        for name in ("imagenette2", "imagenette2-320", "imagenette2-160")
        if (root / name).is_dir()
    ]
    if not found:
        dataset = torchvision.datasets.Imagenette
        load_torchvision(
            dataset,
            "imagenette2.tgz",
            dataset._ARCHIVES["full"][0],
            root,
            split="train",
            size="full",
        )
    return read_class_folders(found[0] if found else root / "imagenette2", split)


def read_imagenet(root, split):
    """ImageNet (ILSVRC2012), from its archives or class folders. It cannot be downloaded."""
    top = next(
        (root / name for name in ("imagenet", "ILSVRC2012") if (root / name).is_dir()),
        root / "imagenet",
    )
    if not (top / ("train" if split == "train" else "val")).is_dir():
        try:  # verifies and unpacks the archives, once
            torchvision.datasets.ImageNet(top, split="train" if split == "train" else "val")
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"imagenet: not found; put into {top}: ILSVRC2012_img_train.tar, "
                "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (from image-net.org, "
                "which requires registration), or the folders train/<wnid>/ and val/<wnid>/"
            ) from error
    return read_class_folders(top, split)


@dataclass(frozen=True)
class Archive:
    """A named data set.

    Attributes:
        read: function of (root, split) that returns a `Raw`.
        classes, train, test: published numbers of classes, training images and test images.
    """

    read: Callable
    classes: int
    train: int
    test: int


ARCHIVES = {
    "digits": Archive(read_digits, 10, 1_437, 360),
    "cifar10": Archive(make_cifar_reader(torchvision.datasets.CIFAR10), 10, 50_000, 10_000),
    "cifar100": Archive(make_cifar_reader(torchvision.datasets.CIFAR100), 100, 50_000, 10_000),
    "tinyimagenet": Archive(read_tinyimagenet, 200, 100_000, 10_000),
    "imagenet": Archive(read_imagenet, 1_000, 1_281_167, 50_000),
    "imagenette": Archive(read_imagenette, 10, 9_469, 3_925),
    "aircraft": Archive(read_aircraft, 100, 6_667, 3_333),
    "cars": Archive(read_cars, 196, 8_144, 8_041),
    "cub2011": Archive(read_cub2011, 200, 5_994, 5_794),
    "dogs": Archive(read_dogs, 120, 12_000, 8_580),
    "flowers": Archive(read_flowers, 102, 2_040, 6_149),
}
