"""Every way in which images arrive: the public archives' layouts, class folders, plain folders, digits."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data import prepare
from data.distilled import Distilled, load_distilled
from data.images import load_images
from data.subsets import few_labels
from utils import files
from utils.errors import UserError


def picture(path, seed=0, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def class_folders(top, splits=("train", "test"), classes=("cat", "dog"), per_class=3):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for i in range(per_class):
                picture(top / split / name / f"{i}.png", seed=100 * s + 10 * c + i)


def test_digits_are_the_real_ones(data_root):
    from sklearn.datasets import load_digits

    train, test = (load_images("digits", split, 32, data_root) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360) and train.pixels.shape[1:] == (32, 32, 3)
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    grey = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    originals = {
        np.asarray(Image.fromarray(image).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).tobytes()
        for image in grey
    }
    assert {image.numpy().tobytes() for images in (train, test) for image in images.pixels} == originals
    x = train.normalised(torch.arange(len(train)), "cpu")
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_class_folders_labels_statistics_and_reuse(tmp_path, monkeypatch):
    class_folders(tmp_path / "pets")
    train, test = (load_images("pets", split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "pets/test/dog/1.png") as opened:
        expected = np.asarray(opened.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(test.pixels[4].numpy(), expected)
    values = train.pixels.double().flatten(0, 2) / 255
    torch.testing.assert_close(train.mean, values.mean(0).float())
    torch.testing.assert_close(train.std, values.std(0, unbiased=False).float())
    assert torch.equal(test.mean, train.mean)
    monkeypatch.setattr(prepare, "decode", None)  # a second use decodes nothing
    assert torch.equal(load_images("pets", "train", 32, tmp_path).pixels, train.pixels)


def test_class_folders_by_path(tmp_path):
    class_folders(tmp_path / "elsewhere" / "pets")
    test = load_images(str(tmp_path / "elsewhere" / "pets"), "test", 32, tmp_path / "data")
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.name.startswith("pets-")
    assert [path.name for path in (tmp_path / "data" / "prepared").iterdir()] == [f"{test.name}-32px"]


def test_changed_folder_is_decoded_again(tmp_path):
    for i in range(3):
        picture(tmp_path / "mine" / f"{i}.png", seed=i)
    name = str(tmp_path / "mine")
    assert len(load_images(name, "train", 32, tmp_path)) == 3
    picture(tmp_path / "mine" / "new.png", seed=9)
    assert len(load_images(name, "train", 32, tmp_path)) == 4


def test_unlabelled_folder_nested_unicode_modes_and_stray_files(tmp_path):
    top = tmp_path / "фото"
    for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "1")):
        suffix = "jpg" if mode == "CMYK" else "png"
        picture(top / "ab cd" / f"größe{i}.{suffix}", seed=i, size=(20 + 30 * i, 50), mode=mode)
    picture(top / "deep" / "er" / "UPPER.JPG", seed=7)
    (top / "notes.txt").write_text("no image")
    (top / "broken.png").symlink_to(top / "nowhere.png")
    images = load_images(str(top), "train", 64, tmp_path / "data")
    assert len(images) == 7 and images.labels is None and images.pixels.shape == (7, 64, 64, 3)
    with pytest.raises(UserError, match="no test split"):
        load_images(str(top), "test", 64, tmp_path / "data")


def test_sixteen_bits_and_turned_photographs(tmp_path):
    top = tmp_path / "mine"
    top.mkdir()
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(top / "a.png")
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    tag = Image.Exif()
    tag[0x0112] = 6  # shown turned by 90 degrees
    upright.save(top / "b.png", exif=tag)
    images = load_images(str(top), "train", 64, tmp_path / "data")
    assert np.array_equal(images.pixels[0, :, :, 1].numpy(), grey >> 8)
    assert np.array_equal(images.pixels[1].numpy(), np.rot90(np.asarray(upright), -1))


def test_few_damaged_files_are_named_and_skipped_many_stop(tmp_path, capsys):
    top = tmp_path / "mine"
    for i in range(120):
        picture(top / f"{i:03}.png", seed=i, size=(8, 8))
    (top / "005.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    images = load_images(str(top), "train", 32, tmp_path / "data")
    assert len(images) == 119 and "005.png" in capsys.readouterr().out
    with Image.open(top / "006.png") as opened:
        expected = np.asarray(opened.resize((32, 32), Image.Resampling.BILINEAR))
    assert np.array_equal(images.pixels[5].numpy(), expected)  # the ones behind the gap moved up
    (top / "007.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 120 images cannot be decoded"):
        load_images(str(top), "train", 32, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.partial"))


def test_tinyimagenet_archive(tmp_path):
    top, wnids = tmp_path / "tiny-imagenet-200", ["n02", "n01", "n03"]
    for c, wnid in enumerate(wnids):
        for i in range(2):
            picture(top / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=c * 2 + i, size=(64, 64))
    rows = []
    for i, wnid in enumerate(["n03", "n01", "n01", "n02"]):
        picture(top / "val" / "images" / f"val_{i}.JPEG", seed=50 + i, size=(64, 64))
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (top / "val" / "val_annotations.txt").write_text("".join(rows))
    (top / "wnids.txt").write_text("\n".join(wnids) + "\n")
    train, test = (load_images("tinyimagenet", split, 64, tmp_path) for split in ("train", "test"))
    assert train.classes == ["n01", "n02", "n03"] and train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [2, 0, 0, 1]
    with Image.open(top / "val/images/val_3.JPEG") as opened:
        assert np.array_equal(test.pixels[3].numpy(), np.asarray(opened))


@pytest.mark.parametrize("top", ["imagenette2", "imagenette2-160"])
def test_imagenette_archive(tmp_path, top):
    class_folders(tmp_path / top, splits=("train", "val"), classes=("n01440764", "n02102040"))
    train, test = (load_images("imagenette", split, 32, tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("name", "key", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)])
def test_cifar_archives_through_torchvision(tmp_path, monkeypatch, name, key, classes):
    """A tiny archive in the public layout; only the checksums of the real one are replaced by its own."""
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
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
            lists[attribute].append(write(filename, {"data": pixels[filename], key: labels[filename]}))
        monkeypatch.setattr(dataset, attribute, lists[attribute])
    names = [f"class{i:03}" for i in range(classes)]
    meta = {"filename": dataset.meta["filename"], "key": dataset.meta["key"]}
    meta["md5"] = write(meta["filename"], {meta["key"]: names})[1]
    monkeypatch.setattr(dataset, "meta", meta)

    train, test = (load_images(name, split, 32, tmp_path) for split in ("train", "test"))
    assert train.classes == names
    assert train.labels.tolist() == [label for filename, _ in lists["train_list"] for label in labels[filename]]
    [(filename, _)] = lists["test_list"]
    assert test.labels.tolist() == labels[filename]
    assert np.array_equal(test.pixels[2].numpy(), pixels[filename][2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_that_cannot_be_downloaded_says_what_to_put_where(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"unreachable.*put cifar-10-python.tar.gz"):
        load_images("cifar10", "train", 32, tmp_path)


def test_own_class_folders_come_before_an_archive(tmp_path):
    class_folders(tmp_path / "cifar10")
    assert load_images("cifar10", "train", 32, tmp_path).classes == ["cat", "dog"]


def test_few_labels_are_balanced_distinct_and_seeded(data_root):
    train = load_images("digits", "train", 32, data_root)
    chosen = [few_labels(train, 7, 0.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert train.labels[chosen[0]].bincount().tolist() == [7] * 10 and len(set(chosen[0].tolist())) == 70
    shares = train.labels[few_labels(train, 0, 0.1, torch.Generator())].bincount()
    assert shares.tolist() == [-(-count // 10) for count in train.labels.bincount().tolist()]
    assert len(few_labels(train, 0, 0.0, torch.Generator())) == len(train)
    with pytest.raises(UserError, match="fewer than 1000"):
        few_labels(train, 1000, 0.0, torch.Generator())


def a_distilled_set(**changes):
    parts = dict(images=torch.randn(4, 3, 8, 8), targets=torch.randn(4, 5), target_kind="feature",
                 mean=torch.tensor([0.1, 0.2, 0.3]), std=torch.tensor([0.5, 0.6, 0.7]), meta={"seed": 0})  # fmt: skip
    return Distilled(**(parts | changes))


def test_distilled_file_round_trip_and_pixels(tmp_path):
    d = a_distilled_set()
    files.save(tmp_path / "d.pt", "distilled", d.content())
    back = load_distilled(tmp_path / "d.pt")
    for name in ("images", "targets", "mean", "std"):
        assert torch.equal(getattr(back, name), getattr(d, name))
    assert (back.target_kind, back.meta) == (d.target_kind, d.meta)
    expected = (d.images[2, 1, 3, 4] * 0.6 + 0.2).clamp(0, 1)
    assert torch.isclose(back.pixels()[2, 1, 3, 4], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_kind="labels"), "target_kind labels"),
        (dict(images=torch.randn(4, 1, 8, 8)), "images of shape"),
        (dict(images=torch.randn(4, 3, 8, 9)), "images of shape"),
        (dict(images=torch.randn(0, 3, 8, 8), targets=torch.randn(0, 5)), "images of shape"),
        (dict(images=torch.randn(4, 3, 8, 8).double()), "images of torch.float64"),
        (dict(images=[[1.0]]), "must be tensors"),
        (dict(mean=torch.zeros(1)), "not 3 numbers"),
        (dict(targets=torch.randn(3, 5)), "3 targets for 4 images"),
        (dict(targets=torch.zeros(4, dtype=torch.int64)), "targets of torch.int64"),
        (dict(images=torch.full((4, 3, 8, 8), torch.nan)), "not finite"),
    ],
)
def test_unfit_distilled_files_are_refused(tmp_path, changes, message):
    files.save(tmp_path / "d.pt", "distilled", a_distilled_set(**changes).content())
    with pytest.raises(UserError, match=message):
        load_distilled(tmp_path / "d.pt")


def test_files_are_known_by_kind_and_never_run_code(tmp_path):
    path = tmp_path / "x.pt"
    files.save(path, "target", {})
    with pytest.raises(UserError, match="found: target"):
        load_distilled(path)
    torch.save({"kind": "distilled", "format": 1, "images": shutil.rmtree}, path)
    with pytest.raises(UserError, match="more than data"):
        load_distilled(path)
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(UserError, match="not a readable distilled file"):
        load_distilled(path)
    torch.save({"kind": "distilled", "format": 99}, path)
    with pytest.raises(UserError, match="format 99"):
        load_distilled(path)
