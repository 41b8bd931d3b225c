"""The readers of the named data sets, on tiny archives in the public layouts."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat

from data import archives, download, raw
from data.images import load_images
from data.prepare import prepare
from tests.test_data import class_folders, picture
from utils.errors import UserError


def load(name, split, size, root):
    """Prepare and load a tiny archive, which needs `partial` because of its size."""
    prepare(name, split, size, root, partial=True)
    prepare(name, "train", size, root, partial=True)
    return load_images(name, split, size, root)


def read_pixels(path, size):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def test_tinyimagenet_labels_and_pixels(tmp_path):
    top, wnids = tmp_path / "tiny-imagenet-200", ["n02", "n01", "n03"]
    for c, wnid in enumerate(wnids):
        for i in range(2):
            picture(
                top / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=c * 2 + i, size=(64, 64)
            )
    rows = []
    for i, wnid in enumerate(["n03", "n01", "n01", "n02"]):
        picture(top / "val" / "images" / f"val_{i}.JPEG", seed=50 + i, size=(64, 64))
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (top / "val" / "val_annotations.txt").write_text("".join(rows))
    (top / "wnids.txt").write_text("\n".join(wnids) + "\n")
    train, test = (load("tinyimagenet", split, 64, tmp_path) for split in ("train", "test"))
    assert train.classes == ["n01", "n02", "n03"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [2, 0, 0, 1]
    assert np.array_equal(test.pixels[3].numpy(), read_pixels(top / "val/images/val_3.JPEG", 64))


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("imagenette", "imagenette2"),
        ("imagenette", "imagenette2-160"),
        ("imagenet", "imagenet"),
        ("imagenet", "ILSVRC2012"),
    ],
)
def test_class_folders_of_imagenet_and_imagenette(tmp_path, name, top):
    class_folders(tmp_path / top, splits=("train", "val"), classes=("n01440764", "n02102040"))
    train, test = (load(name, split, 32, tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.classes == ["n01440764", "n02102040"]


def test_torchvision_unpacks_the_archives_of_imagenet(tmp_path, monkeypatch):
    """Replace the checksums of the three archives of image-net.org by those of the tiny ones."""
    top = tmp_path / "imagenet"
    top.mkdir()
    wnids = ["n01440764", "n01443537"]

    def jpeg(seed):
        out = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "JPEG")
        return out.getvalue()

    def tar(path, members, mode="w"):
        with tarfile.open(path, mode) as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    inner = {}
    for c, wnid in enumerate(wnids):
        images = {f"{wnid}_{i}.JPEG": jpeg(10 * c + i) for i in range(2)}
        inner[f"{wnid}.tar"] = tar(tmp_path / "inner.tar", images).read_bytes()
    meta = io.BytesIO()
    kind = [
        ("ILSVRC2012_ID", int),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", int),
    ]
    synsets = np.array(
        [(i + 1, wnid, f"fish {i}", "", 0) for i, wnid in enumerate(wnids)], dtype=kind
    )
    savemat(meta, {"synsets": synsets})
    devkit = "ILSVRC2012_devkit_t12/data"
    tars = {
        "train": tar(top / "ILSVRC2012_img_train.tar", inner),
        "val": tar(
            top / "ILSVRC2012_img_val.tar",
            {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(99 + i) for i in (1, 2)},
        ),
        "devkit": tar(
            top / "ILSVRC2012_devkit_t12.tar.gz",
            {
                f"{devkit}/meta.mat": meta.getvalue(),
                f"{devkit}/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n",
            },
            "w:gz",
        ),
    }
    known = {
        part: (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for part, path in tars.items()
    }
    monkeypatch.setattr(torchvision.datasets.imagenet, "ARCHIVE_META", known)
    train, test = (load("imagenet", split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == wnids and train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1]
    path = top / "val" / wnids[0] / "ILSVRC2012_val_00000002.JPEG"  # class 1, as above
    assert np.array_equal(test.pixels[0].numpy(), read_pixels(path, 32))


@pytest.mark.parametrize(
    ("name", "key", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)]
)
def test_cifar_labels_and_pixels(tmp_path, monkeypatch, name, key, classes):
    """Replace the checksums of the real archive by those of the tiny one."""
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        name
    ]
    top = tmp_path / dataset.base_folder
    top.mkdir()
    rng, labels, pixels = np.random.default_rng(0), {}, {}

    def write(filename, content):
        (top / filename).write_bytes(pickle.dumps(content))
        return [filename, hashlib.md5((top / filename).read_bytes()).hexdigest()]

    lists = {}
    for attribute in ("train_list", "test_list"):
        lists[attribute] = []
        for filename, _ in getattr(dataset, attribute):
            pixels[filename] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels[filename] = rng.integers(0, classes, 4).tolist()
            lists[attribute].append(
                write(filename, {"data": pixels[filename], key: labels[filename]})
            )
        monkeypatch.setattr(dataset, attribute, lists[attribute])
    names = [f"class{i:03}" for i in range(classes)]
    meta = {"filename": dataset.meta["filename"], "key": dataset.meta["key"]}
    meta["md5"] = write(meta["filename"], {meta["key"]: names})[1]
    monkeypatch.setattr(dataset, "meta", meta)

    train, test = (load(name, split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == names
    assert train.labels.tolist() == [
        label for filename, _ in lists["train_list"] for label in labels[filename]
    ]
    [(filename, _)] = lists["test_list"]
    assert test.labels.tolist() == labels[filename]
    assert np.array_equal(
        test.pixels[2].numpy(), pixels[filename][2].reshape(3, 32, 32).transpose(1, 2, 0)
    )


def test_aircraft_labels(tmp_path):
    top = tmp_path / "fgvc-aircraft-2013b" / "data"
    lists = {
        "trainval": ["0000002 Boeing 707-320", "0000001 A300B4", "0000004 A300B4"],
        "test": ["0000003 A300B4"],
    }
    for i in range(1, 5):
        picture(top / "images" / f"000000{i}.jpg", seed=i, size=(60, 40))
    (top / "variants.txt").write_text("A300B4\nBoeing 707-320\n")
    for part, rows in lists.items():
        (top / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
    train, test = (load("aircraft", split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == ["A300B4", "Boeing 707-320"]
    assert train.labels.tolist() == [1, 0, 0] and test.labels.tolist() == [0]
    assert np.array_equal(train.pixels[0].numpy(), read_pixels(top / "images/0000002.jpg", 32))


def test_cars_labels(tmp_path):
    top = tmp_path / "stanford_cars"
    kind = [("bbox_x1", int), ("class", int), ("fname", object)]
    (top / "devkit").mkdir(parents=True)
    for part, rows in (
        ("train", [(0, 2, "00001.jpg"), (0, 1, "00002.jpg")]),
        ("test", [(0, 2, "00001.jpg"), (0, 2, "00003.jpg")]),
    ):
        for _, label, name in rows:
            picture(top / f"cars_{part}" / name, seed=label)
        path = top / (
            "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        )
        savemat(path, {"annotations": np.array([rows], dtype=kind)})
    names = np.empty((1, 2), dtype=object)
    names[0] = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]
    savemat(top / "devkit" / "cars_meta.mat", {"class_names": names})
    train = load("cars", "train", 32, tmp_path)
    assert train.labels.tolist() == [1, 0] and train.classes[1] == "Acura RL Sedan 2012"
    assert np.array_equal(train.pixels[1].numpy(), read_pixels(top / "cars_train/00002.jpg", 32))
    found = raw.read("cars", "test", tmp_path)
    assert found.labels == [1, 1] and found.images[0] == top / "cars_test" / "00001.jpg"


def test_cub2011_labels(tmp_path):
    top = tmp_path / "CUB_200_2011"
    names = [
        "001.Black_footed_Albatross/a_1.jpg",
        "001.Black_footed_Albatross/a_2.jpg",
        "002.Laysan_Albatross/b_1.jpg",
    ]
    for i, name in enumerate(names):
        picture(top / "images" / name, seed=i)
    (top / "images.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    (top / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n")
    (top / "train_test_split.txt").write_text("1 0\n2 1\n3 1\n")
    (top / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    train, test = (load("cub2011", split, 32, tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1] and test.labels.tolist() == [0]
    assert train.classes == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert np.array_equal(test.pixels[0].numpy(), read_pixels(top / "images" / names[0], 32))


def test_dogs_labels(tmp_path):
    top = tmp_path / "stanford_dogs"
    files = {
        "train": ["n02085620-Chihuahua/c_1.jpg", "n02085782-Japanese_spaniel/s_1.jpg"],
        "test": ["n02085620-Chihuahua/c_2.jpg", "n02085782-Japanese_spaniel/s_2.jpg"],
    }
    (top / "lists").mkdir(parents=True)
    for part, names in files.items():
        for i, name in enumerate(names):
            picture(top / "Images" / name, seed=i)
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        savemat(
            top / "lists" / f"{part}_list.mat", {"file_list": cells, "labels": np.array([[1], [2]])}
        )
    train = load("dogs", "train", 32, tmp_path)
    assert train.labels.tolist() == [0, 1] and train.classes == [
        "n02085620-Chihuahua",
        "n02085782-Japanese_spaniel",
    ]
    assert raw.read("dogs", "test", tmp_path).images == [
        top / "Images" / name for name in files["test"]
    ]


def test_flowers_trains_on_the_training_and_validation_images(tmp_path, monkeypatch):
    top = tmp_path / "flowers-102"
    for i in range(1, 7):
        picture(top / "jpg" / f"image_0000{i}.jpg", seed=i)
    savemat(top / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 1, 4, 5]])})
    splits = {"trnid": np.array([[4, 6]]), "valid": np.array([[2, 3]]), "tstid": np.array([[1, 5]])}
    savemat(top / "setid.mat", splits)
    dataset = torchvision.datasets.Flowers102
    known = {
        part: (
            name,
            hashlib.md5((top / name).read_bytes()).hexdigest() if part != "image" else checksum,
        )
        for part, (name, checksum) in dataset._file_dict.items()
    }
    monkeypatch.setattr(dataset, "_file_dict", known)
    found = raw.read("flowers", "train", tmp_path)
    assert [path.name for path in found.images] == [f"image_0000{i}.jpg" for i in (4, 6, 2, 3)]
    assert found.labels == [0, 4, 0, 1] and raw.read("flowers", "test", tmp_path).labels == [2, 3]
    assert len(found.classes) == 102


@pytest.mark.parametrize(
    ("name", "asked_for"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("tinyimagenet", "tiny-imagenet-200.zip"),
        ("imagenet", "ILSVRC2012_img_train.tar"),
        ("imagenette", "imagenette2.tgz"),
        ("aircraft", "fgvc-aircraft-2013b.tar.gz"),
        ("cars", "cars_test_annos_withlabels.mat"),
        ("cub2011", "CUB_200_2011.tgz"),
        ("dogs", "lists.tar"),
        ("flowers", "102flowers.tgz"),
    ],
)
def test_error_names_the_missing_archive_and_its_folder(tmp_path, name, asked_for):
    for split in ("train", "test"):
        with pytest.raises(UserError) as error:
            raw.read(name, split, tmp_path)
        assert asked_for in str(error.value) and str(tmp_path) in str(error.value)


def test_archive_in_the_data_root_is_verified_and_unpacked(tmp_path):
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        for name in ("set/a.txt", "other.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ok"))
    sha = "sha256:" + hashlib.sha256((tmp_path / "set.tgz").read_bytes()).hexdigest()
    with pytest.raises(UserError, match="not the published"):
        download.fetch("http://nowhere", "md5:" + "0" * 32, tmp_path, "set.tgz", tmp_path / "set")
    assert not (tmp_path / "set").exists()
    download.fetch("http://nowhere", sha, tmp_path, "set.tgz", tmp_path / "set")
    assert (tmp_path / "set" / "a.txt").read_text() == "ok"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.tgz"]


def test_wrong_counts_are_an_error_without_partial(tmp_path):
    class_folders(tmp_path / "cifar10")
    advice = r"50,000 of 10; .*cifar10 --size 32 --partial --data-root"
    with pytest.raises(UserError, match=rf"found 6 images of 2 classes.*{advice}"):
        load_images("cifar10", "train", 32, tmp_path)
    assert prepare("cifar10", "train", 32, tmp_path, partial=True)["whole"] is False
    images = load_images("cifar10", "train", 32, tmp_path)
    assert images.classes == ["cat", "dog"]  # class folders are preferred to the archive
    assert (
        images.deviations
        == images.subset(torch.tensor([0])).deviations
        == {"cifar10 train": [6, 50_000]}
    )
    picture(tmp_path / "cifar10" / "train" / "cat" / "new.png")
    with pytest.raises(UserError, match="found 7 images"):  # another part than the accepted one
        load_images("cifar10", "train", 32, tmp_path)


def test_published_counts():
    """Compare with the published counts. The split of the digits is our own."""
    counts = {name: (a.classes, a.train, a.test) for name, a in archives.ARCHIVES.items()}
    assert counts == {
        "digits": (10, 1437, 360),
        "cifar10": (10, 50000, 10000),
        "cifar100": (100, 50000, 10000),
        "tinyimagenet": (200, 100000, 10000),
        "imagenet": (1000, 1281167, 50000),
        "imagenette": (10, 9469, 3925),
        "aircraft": (100, 6667, 3333),
        "cars": (196, 8144, 8041),
        "cub2011": (200, 5994, 5794),
        "dogs": (120, 12000, 8580),
        "flowers": (102, 2040, 6149),
    }
