"""Damaged files are one-line errors that name the file, or are read with their correct values."""

import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import models
from data.distilled import Distilled, load_distilled
from data.images import load_images
from models import saved
from models.target import load_target
from utils import files
from utils.errors import UserError
from utils.run import Run, Tensors

CPU, SETTINGS = torch.device("cpu"), {"lr": 0.1, "steps": 7, "name": "größe", "flag": True}


def make_set():
    g = torch.Generator().manual_seed(0)
    return Distilled(
        torch.randn(4, 3, 8, 8, generator=g),
        torch.randn(4, 5, generator=g),
        "feature",
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([0.5, 0.6, 0.7]),
        {"seed": 0},
    )


def make_network():
    torch.manual_seed(0)
    return dict(
        network=models.build("convnet3", 32, 0, 0.02).state_dict(),
        arch="convnet3",
        width=0.02,
        image_size=32,
        source="pets",
        fingerprint="f",
    )


class Code:
    """A value whose pickle runs a command when it is loaded as code."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def foreign_files(tmp_path):
    """Return the bytes of files of other kinds. Two contain code, which must never run."""
    ran = tmp_path / "ran"
    code, image, array, archive = Code(f"touch {ran}"), io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "png")
    np.save(array, np.arange(12))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(code))
        file.writestr("archive/version", "3\n")
    files.save(tmp_path / "sealed", "distilled", {"images": code, "settings": code})
    others = []
    kinds = {
        "d": ("distilled", make_set().content()),
        "t": ("target", make_network()),
        "m": ("model", {}),
    }
    for name, (kind, content) in kinds.items():
        files.save(tmp_path / name, kind, content)
        others.append((tmp_path / name).read_bytes())
    files.write_json(tmp_path / "j", {"settings": {"lr": 0.2}})
    others += [(tmp_path / name).read_bytes() for name in ("j", "sealed")]
    text = [
        b"",
        b"\n",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b"text, no data",
        b"\0" * 500,
        b'{"checksum": "x"}',
        b"[" * 100_000,
    ]
    yield [
        *text,
        pickle.dumps(code),
        *(each.getvalue() for each in (image, array, archive)),
        *others,
    ]
    assert not ran.exists()


def vary(content, count, foreign_files, seed=0):
    """Yield the files of foreign formats and `count` variants of `content`.

    In turn, bytes are cut off, flipped, swapped, overwritten and inserted.
    """
    dice, n = random.Random(seed), len(content)
    yield from (each for each in foreign_files if each != content)
    for k in range(count):
        changed = bytearray(content)
        # Every third change is near the end, where the checksum and the archive's directory are.
        a, b = (
            dice.randrange(max(0, n - 200), n) if k % 3 == 0 else dice.randrange(n)
            for _ in range(2)
        )
        length = dice.choice((1, 2, 8, 64, 500))
        match k % 5:
            case 0:
                del changed[a:]
            case 1:
                for place in (a, *((b,) if k % 2 else ())):
                    changed[place] ^= 1 << dice.randrange(8)
            case 2:
                length = min(length, n - max(a, b))
                changed[a : a + length], changed[b : b + length] = (
                    content[b : b + length],
                    content[a : a + length],
                )
            case 3:
                changed[a : a + length] = dice.randbytes(len(changed[a : a + length]))
            case 4:
                changed[a:a] = content[b : b + length]
        if changed != content:
            yield bytes(changed)


def are_equal(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(are_equal(a[key], b[key]) for key in a)
        )
    return type(a) is type(b) and a == b


def read_variants(path, read, count, foreign_files, harmless=0):
    """Call `read` on every damaged variant of the file at `path`.

    It must raise a UserError of one line that names the folder, and leave the file unchanged. At
    most `harmless` times, it may return the correct values instead.
    """
    whole, expected, fed, unharmed = path.read_bytes(), read(), 0, 0
    for variant in vary(whole, count, foreign_files):
        path.write_bytes(variant)
        fed += 1
        try:
            there = read()
        except UserError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error)
            assert path.read_bytes() == variant
        else:
            assert are_equal(there, expected), f"variant {fed} was read as something else"
            unharmed += 1
    path.write_bytes(whole)
    assert are_equal(read(), expected) and fed >= count * 0.95 and unharmed <= harmless


def test_damaged_distilled_file(tmp_path, foreign_files):
    path = tmp_path / "distilled.pt"
    files.save(path, "distilled", make_set().content())
    read_variants(path, lambda: vars(load_distilled(path)), 600, foreign_files)


def test_damaged_target(tmp_path, foreign_files):
    path = tmp_path / "target.pt"
    files.save(path, "target", make_network())

    class Source:
        name, image_size, fingerprint = "pets", 32, "f"

    read_variants(
        path,
        lambda: load_target(path, Source, CPU, "fp32").network.state_dict(),
        500,
        foreign_files,
    )


def write_checkpoints(folder, steps=2):
    """Write a checkpoint after each of `steps` steps; return a function that resumes the run."""
    run, x = Run(folder, "x.pt", SETTINGS), torch.zeros(5)
    adam = torch.optim.Adam([x.requires_grad_()])
    run.resume(CPU, {"x": Tensors(x=x), "adam": adam})
    for step in range(steps):
        x.grad = torch.ones(5)
        adam.step()
        run.done["train"] = step + 1
        run.checkpoint()

    def read():
        run, x = Run(folder, "x.pt", SETTINGS), torch.zeros(5)
        adam = torch.optim.Adam([x.requires_grad_()])
        run.resume(CPU, {"x": Tensors(x=x), "adam": adam})
        return {"x": x.detach(), "adam": adam.state_dict()["state"], "done": run.done}

    return read


def test_damaged_only_checkpoint(tmp_path, foreign_files):
    read = write_checkpoints(tmp_path / "run", steps=1)
    read_variants(tmp_path / "run" / "checkpoint.pt", read, 500, foreign_files)


def test_damaged_newest_checkpoint(tmp_path, foreign_files, capsys):
    """Expect an error for another kind of file, or else a warning and the previous checkpoint."""
    read, folder = write_checkpoints(tmp_path / "run"), tmp_path / "run"
    newest = folder / "checkpoint.pt"
    whole, fell_back = newest.read_bytes(), 0
    assert read()["done"] == {"train": 2}
    for variant in vary(whole, 200, foreign_files):
        newest.write_bytes(variant)
        try:
            there = read()
        except UserError as error:
            assert "not a checkpoint file" in str(error)
        else:
            assert (
                there["done"] == {"train": 1} and 0 < there["x"].abs().max() < 0.0015
            )  # one Adam step
            assert (
                not newest.exists() and (folder / "checkpoint.damaged.pt").read_bytes() == variant
            )
            shown = capsys.readouterr().err
            assert shown.startswith(f"warning: {newest}: ") and shown.count("\n") == 1
            fell_back += 1
    assert fell_back >= 190
    newest.unlink(missing_ok=True)
    assert (
        read()["done"] == {"train": 1} and not capsys.readouterr().err
    )  # as after a kill between two renames


def test_damaged_settings(tmp_path, foreign_files):
    write_checkpoints(tmp_path / "run", steps=1)
    path = tmp_path / "run" / "config.json"
    # Blanks and the case of JSON escapes are harmless.
    read_variants(
        path,
        lambda: Run(tmp_path / "run", "x.pt", SETTINGS).settings,
        500,
        foreign_files,
        harmless=10,
    )
    for variant in vary(path.read_bytes(), 100, foreign_files):
        path.write_bytes(variant)
        with pytest.raises(UserError):
            Run(tmp_path / "run", "x.pt", SETTINGS | {"lr": 0.2})


@pytest.mark.parametrize("name", ["train.npy", "train.labels.npy", "train.json"])
def test_damaged_prepared_images(tmp_path, foreign_files, name):
    for i in range(6):
        path = tmp_path / "pets" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(
            path
        )

    def read():
        images = load_images("pets", "train", 8, tmp_path)
        return {
            key: value.clone() if torch.is_tensor(value) else value
            for key, value in vars(images).items()
        }

    read()
    path = tmp_path / "prepared" / "pets-8px" / name
    # A record of another format is harmless: the images are decoded again.
    read_variants(path, read, 250, foreign_files, harmless=20 if name == "train.json" else 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arch="transformer"), "unknown network transformer"),
        (dict(arch=["convnet3"]), "unknown network"),
        (dict(arch="convnet4"), "do not fit convnet4"),
        (dict(width="wide"), "width wide"),
        (dict(width=float("nan")), "width nan"),
        (dict(width=0.05), "do not fit"),
        (dict(image_size=16.5), "image size 16.5"),
        (dict(network=[1, 2]), "not tensors"),
        (dict(network={"fc.weight": "a"}), "not tensors"),
        (dict(network={"fc.weight": torch.zeros(2, 2)}), "do not fit"),
        (dict(num_outputs="ten"), "num_outputs ten"),
        (dict(meta=None), "meta"),
    ],
)
def test_network_files_with_wrong_values_and_valid_checksum(tmp_path, changes, message):
    path = tmp_path / "file.pt"
    content = make_network() | dict(
        network=models.build("convnet3", 32, 3, 0.02).state_dict(), num_outputs=3, meta={}
    )
    files.save(path, "model", content | changes)
    with pytest.raises(UserError, match=message) as refused:
        saved.rebuild(saved.load_model(path))
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_network_files_with_values_that_are_not_finite(tmp_path):
    content = make_network()
    content["network"]["features.0.weight"][0, 1, 0, 0] = torch.nan
    files.save(tmp_path / "t.pt", "target", content)

    class Source:
        name, image_size, fingerprint = "pets", 32, "f"

    with pytest.raises(UserError, match=r"not finite \(features.0.weight\)"):
        load_target(tmp_path / "t.pt", Source, CPU, "fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(state={}), "does not fit this run"),
        (dict(state={"x": {"x": torch.zeros(1)}}), r"shape \(1,\), not \(5,\)"),
        (dict(state={"x": {"x": "a"}}), "does not fit this run"),
        (dict(state=None), "does not fit this run"),
        (dict(done=[3]), "does not fit this run"),
        (dict(settings={"lr": 0.2}), "lr: 0.2 stored, 0.1 now"),
        (dict(settings=None), "no settings"),
        (dict(device="cuda"), "was written on cuda"),
    ],
)
def test_checkpoints_with_wrong_values_and_valid_checksum(tmp_path, changes, message):
    run = Run(tmp_path, "x.pt", SETTINGS)
    content = dict(
        done={"train": 1}, device="cpu", settings=SETTINGS, state={"x": {"x": torch.zeros(5)}}
    )
    files.save(tmp_path / "checkpoint.pt", "checkpoint", content | changes)
    with pytest.raises(UserError, match=message):
        run.resume(CPU, {"x": Tensors(x=torch.zeros(5))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_kind=["feature"]), "target_kind"),
        (dict(meta=[1]), "meta must be a dictionary"),
        (dict(meta={"preset": ["digits"]}), "preset of the wrong type"),
        (dict(meta={"seed": "0"}), "seed of the wrong type"),
        (dict(images=torch.eye(3).to_sparse()), "must be tensors"),
        (dict(targets=torch.full((4, 5), torch.inf)), "not finite"),
    ],
)
def test_distilled_files_with_wrong_values_and_valid_checksum(tmp_path, changes, message):
    files.save(tmp_path / "d.pt", "distilled", make_set().content() | changes)
    with pytest.raises(UserError, match=message):
        load_distilled(tmp_path / "d.pt")
