"""Encoders of each kind, features from a file, and errors for unsuitable ones."""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import distill
import pretrain
import pretrain_target
from data.distilled import load_distilled
from data.images import load_images
from data.originals import Originals, resize
from data.prepare import decode
from distillers import kmeans, method, random_features
from evaluation import fid, quality
from models import build
from models.encoders import load_encoder
from models.features import project, read_features, reduce_features
from models.saved import load_matching
from models.target import load_target
from tests.conftest import DISTILL, make_stopping_steps, run_command
from utils import cli, files, run
from utils.errors import UserError

CPU = torch.device("cpu")
ENCODER = """
import torch


class Tiny(torch.nn.Module):
    image_size = 24

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 12, 5, stride=2)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def half():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))


def text():
    return "no module"


def maps():
    return torch.nn.Conv2d(3, 4, 3)


def broken():
    raise RuntimeError("weights are gone")


class NotFinite(Tiny):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Pair(Tiny):
    def forward(self, x):
        return x, x


class FailsOnAttribute(Tiny):
    def forward(self, x):
        return super().forward(x).last_hidden_state


class FailsOnKey(Tiny):
    def forward(self, x):
        return {"features": x}["pooled"]


class SizeOfTwo(Tiny):
    image_size = (24, 24)


class NoSize(Tiny):
    image_size = 0


class FailsOnSize(Tiny):
    def forward(self, x):
        assert x.shape[-1] == 24, "takes 24 px"
        return super().forward(x)
"""
SMALL = ["--image-size", "32", "--preset", "digits"]


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "tiny.py"
    path.write_text(ENCODER)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write class folders with 60 images of 40 x 48 pixels. The classes are colours."""
    top = tmp_path_factory.mktemp("photos") / "photos"
    generator = np.random.default_rng(0)
    for name, colour in (("blue", (0, 0, 120)), ("red", (120, 0, 0))):
        (top / "train" / name).mkdir(parents=True)
        (top / "test" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 120, (40, 48, 3)) + np.array(colour)
            Image.fromarray(pixels.astype(np.uint8)).save(top / "train" / name / f"{i:02d}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(top / "test" / name / "0.png")
    return top


@pytest.fixture(scope="module")
def flags(tmp_path_factory, photos):
    top = tmp_path_factory.mktemp("encoded")
    return [
        "--source",
        str(photos),
        *SMALL,
        "--data-root",
        str(top / "data"),
        "--run-root",
        str(top / "runs"),
    ]


@pytest.fixture(scope="module")
def target_path(flags, encoder_file, photos):
    """Compute the features of the photos by `Tiny`, keep three components, return target.pt."""
    pretrain_target.main([*flags, "--encoder", f"{encoder_file}:Tiny", "--pca", "3"])
    [path] = find_files(flags, "target.pt")
    return path


def find_files(flags, name):
    return sorted(Path(flags[-1]).rglob(name))


@pytest.fixture(scope="module")
def source(flags, photos):
    return load_images(str(photos), "train", 32, flags[flags.index("--data-root") + 1])


def load_tiny(encoder_file):
    return load_encoder(f"{encoder_file}:Tiny", CPU)


def test_features_are_those_of_the_raw_images_at_the_encoder_size(
    target_path, encoder_file, photos, source
):
    """Compare with features of the raw files decoded at 24 px, centred and projected."""
    paths = sorted((photos / "train").rglob("*.png"))
    pixels = (
        torch.from_numpy(np.stack([decode(path, 24) for path in paths])).permute(0, 3, 1, 2) / 255
    )
    encoded = load_tiny(encoder_file)(pixels).double()
    centred = encoded - encoded.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    saved = files.load(target_path, "target")
    assert saved["variance_kept"] == pytest.approx(
        (values[:3].square().sum() / values.square().sum()).item(), rel=1e-5
    )
    assert saved["zeros"] == pytest.approx((encoded == 0).double().mean().item())
    table = load_target(target_path, source, CPU, "fp32").features_of(source).double()
    expected = centred @ directions[:3].T
    rms = expected.square().mean().sqrt()
    assert saved["rms"] == pytest.approx(rms.item(), rel=1e-5)
    assert table.square().mean().item() == pytest.approx(1, rel=1e-5)
    expected /= rms
    torch.testing.assert_close(
        table.abs(), expected.abs(), rtol=1e-3, atol=1e-5
    )  # the sign of a component is arbitrary
    mean, components = (saved["reduction"][name].double() for name in ("mean", "components"))
    again = mean + rms * table @ components
    error = (again - encoded).square().sum()
    torch.testing.assert_close(error, values[3:].square().sum(), rtol=1e-3, atol=1e-6)


def test_target_records_the_encoder(target_path, encoder_file):
    encoder = files.load(target_path, "target")["encoder"]
    assert encoder["name"] == "tiny.py:Tiny" and encoder["image_size"] == 24 and encoder["from_raw"]
    assert encoder["version"].endswith(hashlib.sha256(ENCODER.encode()).hexdigest()[:12])
    module, sha = load_tiny(encoder_file).module, hashlib.sha256()
    for name in ("conv.bias", "conv.weight"):
        value = module.state_dict()[name]
        sha.update(f"{name} {tuple(value.shape)} torch.float32\0".encode())
        sha.update(value.numpy().tobytes())
    assert encoder["weights"] == sha.hexdigest()


def test_encoder_computes_features_of_new_images(target_path, encoder_file, source):
    target = load_target(target_path, source, CPU, "fp32")
    index = torch.tensor([3, 41])
    x = source.normalised(index, CPU)
    kept = files.load(target_path, "target")["reduction"]
    encoded = load_tiny(encoder_file)(resize(source.raw(index, CPU), 24))
    expected = (encoded - kept["mean"]) @ kept["components"].T * kept["scale"]
    torch.testing.assert_close(target.features(x), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "differs"),
    [
        ("manual_seed(3)", "manual_seed(4)", r"\(other weights, features of the same images\)"),
        (".mean((2, 3))", ".amax((2, 3))", r"\(other features of the same images\)"),
    ],
)
def test_changed_encoder_is_an_error_for_new_images(
    target_path, encoder_file, source, before, after, differs
):
    target = load_target(target_path, source, CPU, "fp32")
    encoder_file.write_text(ENCODER.replace(before, after))
    try:
        with pytest.raises(UserError, match=f"has changed since the features .*{differs}") as error:
            target.features(source.normalised(torch.tensor([0]), CPU))
    finally:
        encoder_file.write_text(ENCODER)
    assert "rerun pretrain_target.py" in str(error.value)


def test_comment_does_not_change_an_encoder(target_path, encoder_file, source):
    encoder_file.write_text(f"# A comment.\n{ENCODER}")
    try:
        load_target(target_path, source, CPU, "fp32").features(source.normalised([0], CPU))
    finally:
        encoder_file.write_text(ENCODER)


def test_newer_package_may_serve_new_images_but_not_with_another_normalisation(
    flags, source, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    here = replace_run_root(tmp_path / "runs", flags, "--encoder-size", "32")
    given = ["--encoder", "torchvision:resnet18", "--weights", str(tmp_path / "w.pth")]
    pretrain_target.main([*given, *here])
    [path] = (tmp_path / "runs").rglob("target.pt")
    x = source.normalised(torch.tensor([0, 1]), CPU)
    expected = load_target(path, source, CPU, "fp32").features(x)
    monkeypatch.setattr(torchvision, "__version__", "9.9")
    assert torch.equal(load_target(path, source, CPU, "fp32").features(x), expected)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms
    monkeypatch.setitem(preset.keywords, "mean", (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"\(other mean, features of the same images\)"):
        load_target(path, source, CPU, "fp32").features(x)


def replace_run_root(folder, flags, *more):
    """Return the flags with another run root."""
    return [*flags[:-1], str(folder), *more]


def test_features_from_a_file_give_the_same_set_as_the_encoder(
    flags, encoder_file, photos, source, tmp_path
):
    """Compare the targets and the distilled sets. Those of both file formats are bit-identical."""
    safetensors = pytest.importorskip("safetensors.torch")
    paths = sorted((photos / "train").rglob("*.png"))
    pixels = (
        torch.from_numpy(np.stack([decode(path, 24) for path in paths])).permute(0, 3, 1, 2) / 255
    )
    encoded = load_tiny(encoder_file)(pixels)
    np.save(tmp_path / "f.npy", encoded.numpy())
    safetensors.save_file({"features": encoded}, str(tmp_path / "f.safetensors"))
    sets = []
    for name in ("encoder", "npy", "safetensors"):
        given = ["--features", str(tmp_path / f"f.{name}")]
        given = ["--encoder", f"{encoder_file}:Tiny"] if name == "encoder" else given
        here = replace_run_root(tmp_path / name, flags)
        pretrain_target.main([*here, *given, "--pca", "5"])
        distill.main([*here, *DISTILL])
        [path] = find_files(here, "distilled.pt")
        sets.append(load_distilled(path))
    for other in sets[1:]:
        torch.testing.assert_close(other.targets, sets[0].targets, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.images, sets[0].images, rtol=1e-3, atol=1e-3)
    assert torch.equal(sets[1].images, sets[2].images) and sets[0].targets.shape == (20, 5)


def test_listing_gives_the_order_of_the_rows(flags, photos, source):
    root = flags[flags.index("--data-root") + 1]
    done = run_command("-m", "data.prepare", photos, "--size", "32", "--data-root", root, "--list")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    train = [row for row in rows if row[0] == "train"]
    assert [int(row[1]) for row in train] == list(range(60))
    for index in (0, 29, 30, 59):
        assert np.array_equal(decode(Path(train[index][2]), 32), source.pixels[index])


def test_damaged_files_have_no_row(photos, encoder_file, tmp_path):
    top = tmp_path / "some"
    top.mkdir()
    for i in range(120):
        Image.fromarray(np.full((30, 30, 3), 2 * i, np.uint8)).save(top / f"{i:03d}.png")
    (top / "007.png").write_bytes(b"not an image")
    source = load_images(str(top), "train", 32, tmp_path / "data")
    originals = Originals(source, "train", 24, tmp_path / "data")
    pixels = torch.cat([*originals.batches([0, 50, 100], 50)])
    grey = (pixels.mean((1, 2, 3)) * 255 / 2).round().int().tolist()
    assert originals.from_raw and grey == [i for i in range(120) if i != 7]


def test_prepared_images_are_enlarged_without_the_raw_ones(tmp_path, capsys):
    top = tmp_path / "data" / "pets" / "train"
    top.mkdir(parents=True)
    Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(top / "a.png")
    source = load_images("pets", "train", 32, tmp_path / "data")
    (top / "a.png").unlink()
    originals = Originals(source, "train", 48, tmp_path / "data")
    [pixels] = originals.batches([0], 8)
    assert not originals.from_raw and "resizing the prepared images" in capsys.readouterr().out
    torch.testing.assert_close(pixels, resize(source.raw(torch.tensor([0]), CPU), 48))


def test_interrupted_features_resume_to_the_same_bytes(flags, encoder_file, tmp_path, monkeypatch):
    monkeypatch.setattr("models.features.BATCH", 16)
    given = ["--encoder", f"{encoder_file}:Tiny", "--pca", "0"]
    pretrain_target.main([*replace_run_root(tmp_path / "whole", flags), *given])
    parts = [*replace_run_root(tmp_path / "parts", flags), *given]
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", make_stopping_steps([("features", 1)]))
        pretrain_target.main(parts)
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):  # no checkpoint, as after a kill
        write = pretrain_target.FeatureTable.write

        def killed(self, start, features):
            write(self, start, features + 1)
            raise KeyboardInterrupt

        patch.setattr(pretrain_target.FeatureTable, "write", killed)
        pretrain_target.main(parts)
    pretrain_target.main(parts)
    whole, again = (
        find_files([str(tmp_path / name)], "features.npy") for name in ("whole", "parts")
    )
    assert whole[0].read_bytes() == again[0].read_bytes() and not find_files(
        [str(tmp_path)], "encoded.npy"
    )


def test_later_stages_accept_the_features_of_an_encoder(target_path, flags, source):
    target = load_target(target_path, source, CPU, "fp32")
    method.main(random_features.METHOD, [*flags, "--num-images", "20"])
    method.main(kmeans.METHOD, [*flags, "--num-images", "20"])
    distill.main([*flags, *DISTILL, "--augment-outer"])
    found = {path.parts[-3]: load_distilled(path) for path in find_files(flags, "distilled.pt")}
    chosen = torch.tensor(found["random_features"].meta["initial"])
    assert torch.equal(found["random_features"].targets, target.features_of(source)[chosen])
    assert found["krr_st"].meta["deviations"]["target.encoder"][0] == "encoder tiny.py:Tiny"
    pretrain.main([*flags, "--width", "0.125", "--steps", "2"])
    [model] = find_files(flags, "model.pt")
    assert files.load(model, "model")["num_outputs"] == 3
    [krr_st] = [path for path in find_files(flags, "distilled.pt") if "krr_st" in path.parts]
    fid.main(
        [
            "--distilled",
            str(krr_st),
            "--source",
            flags[1],
            "--network",
            str(target_path),
            *flags[6:8],
        ]
    )
    [line] = [
        text
        for path in find_files(flags, "results.jsonl")
        for text in path.read_text().splitlines()
    ]
    assert '"network": "encoder tiny.py:Tiny' in line


def test_features_of_test_images_are_those_of_the_raw_images(
    target_path, flags, photos, encoder_file, source
):
    target = load_target(target_path, source, CPU, "fp32")
    root = Path(flags[-3])
    stored = target.test_features(source, load_images(flags[1], "test", 32, root), root)
    paths = [photos / "test" / name / "0.png" for name in ("blue", "red")]
    pixels = np.stack([decode(path, 24) for path in paths])
    features = load_tiny(encoder_file)(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).double()
    mean, components = (target.reduction[name].double() for name in ("mean", "components"))
    expected = (features - mean) @ components.T * target.reduction["scale"]
    torch.testing.assert_close(stored.double(), expected, rtol=1e-4, atol=1e-4)


def test_features_from_a_file_cannot_serve_new_images(flags, tmp_path, source, get_error):
    np.save(tmp_path / "f.npy", np.random.default_rng(0).normal(size=(60, 4)))
    here = replace_run_root(tmp_path / "runs", flags)
    pretrain_target.main([*here, "--features", str(tmp_path / "f.npy")])
    line = get_error(distill, *here, *DISTILL, "--augment-outer")
    assert "there is no network for new images" in line
    assert "--reference needs a target network, not" in get_error(
        distill, *here, *DISTILL, "--reference"
    )


@pytest.fixture
def get_error(capsys):
    """Return a function that runs a script which must fail, and returns its one-line error."""

    def call(script, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(script.main, [*map(str, flags)])
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.strip() and "it/s]" not in line
        ]
        assert stop.value.code == 2 and len(lines) == 1 and "error: " in lines[0]
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("resnet18", "must be torchvision:NAME"),
        ("torchvision:", "must be torchvision:NAME"),
        ("torchvision:resnet_18", "Unknown model"),
        ("torchvision:resnet18:IMAGENET", "has no weights IMAGENET; available: IMAGENET1K_V1"),
        ("torchvision:squeezenet1_0", "no linear classifier"),
        ("hub:facebookresearch", "must be hub:OWNER/REPO:ENTRY"),
        ("missing.py:encoder", "no such file"),
        ("{file}:none", "has no attribute 'none'"),
        ("{file}:text", "must return a torch.nn.Module, not str"),
        ("{file}:maps", "must return features (b, d); 2 images gave (2, 4, 222, 222)"),
        ("{file}:broken", "weights are gone"),
        ("{file}:NotFinite", "returns values that are not finite"),
        ("{file}:Pair", "must return a float tensor of features, not tuple"),
        (
            "{file}:FailsOnSize --encoder-size 20",
            "AssertionError: takes 24 px); if it needs another size, use --encoder-size",
        ),
        ("{file}:FailsOnAttribute", "AttributeError: 'Tensor' object has no attribute 'last_hi"),
        ("{file}:FailsOnKey", "fails on images of 24 px (KeyError: 'pooled')"),
        ("{file}:SizeOfTwo", "image_size must be a positive integer, not (24, 24)"),
        ("{file}:NoSize --encoder-size 0", "image_size must be a positive integer, not 0"),
        ("{file}:Tiny --weights w.pt", "--weights requires a torchvision: or timm: encoder"),
        ("{file}:Tiny --features f.npy", "not allowed with argument --encoder"),
    ],
)
def test_unsuitable_encoders_are_errors(
    get_error, flags, encoder_file, tmp_path, monkeypatch, what, message
):
    if "squeezenet" in what:
        monkeypatch.setattr(
            torchvision.models,
            "get_model",
            lambda name, weights: torchvision.models.squeezenet1_0(),
        )
    words = what.format(file=encoder_file).split()
    line = get_error(pretrain_target, *replace_run_root(tmp_path, flags), "--encoder", *words)
    assert message in line and not (tmp_path / "photos").exists()


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "raft_small"])
def test_network_for_another_task_is_an_error_before_the_download(name, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: pytest.fail("download"))
    with pytest.raises(UserError, match=f"torchvision:{name}: is not a classification network"):
        load_encoder(f"torchvision:{name}", CPU)


@pytest.mark.parametrize("name", ["own", "json"])
def test_encoder_file_may_define_dataclasses_and_shadows_no_module(name, tmp_path):
    path = tmp_path / f"{name}.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n\n\n"
        f"@dataclass\nclass Settings:\n    size: int = 24\n\n{ENCODER}"
    )
    before = sys.modules.get(name)
    assert load_encoder(f"{path}:Tiny", CPU).image_size == 24
    assert sys.modules.get(name) is before


def test_failed_download_error_names_the_alternative(get_error, flags, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    line = get_error(
        pretrain_target, *replace_run_root(tmp_path, flags), "--encoder", "torchvision:resnet18"
    )
    assert "network is unreachable" in line and "--weights" in line


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((59, 4)), "59 rows for 60 images"),
        (np.ones(60), "must be numbers of shape (n, d), not float64 (60,)"),
        (np.ones((60, 0)), "must be numbers of shape (n, d)"),
        (np.full((60, 2), np.nan), "not finite"),
        (np.full((60, 2), "text"), "must be numbers of shape (n, d)"),
        (b"not an array", "not a readable .npy or .safetensors file"),
        (None, "no such file"),
    ],
)
def test_unsuitable_feature_files_are_errors(get_error, flags, tmp_path, array, message):
    path = tmp_path / "f.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    assert message in get_error(
        pretrain_target, *replace_run_root(tmp_path, flags), "--features", path
    )


def test_unsuitable_safetensors_files_are_errors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(
        {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, str(tmp_path / "two.safetensors")
    )
    with pytest.raises(UserError, match="must hold one tensor, not 2"):
        read_features(tmp_path / "two.safetensors", 3)
    (tmp_path / "bad.safetensors").write_bytes(b"\1" * 30)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_features(tmp_path / "bad.safetensors", 3)


def test_missing_package_error_says_what_to_install(get_error, flags, tmp_path, monkeypatch):
    for package in ("timm", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "f.safetensors").write_bytes(b"")
    here = replace_run_root(tmp_path, flags)
    assert "pip install timm" in get_error(pretrain_target, *here, "--encoder", "timm:resnet18")
    line = get_error(pretrain_target, *here, "--features", tmp_path / "f.safetensors")
    assert "pip install safetensors" in line


def test_torchvision_encoder_loads_weights_from_a_file(tmp_path):
    """Compare with the features before the classifier, of inputs normalised for the weights."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder("torchvision:resnet18", CPU, tmp_path / "w.pth", 64)
    x = torch.rand(2, 3, 64, 64)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), network((x - mean) / std))
    assert encoder.facts["entry"] == "w.pth" and encoder.facts["mean"] == [0.485, 0.456, 0.406]
    encoder = load_encoder("torchvision:resnet18", CPU, tmp_path / "w.pth")
    assert encoder.image_size == 224


@pytest.mark.parametrize(
    "name", ["vit_b_16", "convnext_tiny", "mobilenet_v3_small", "swin_t", "vgg11"]
)
def test_torchvision_networks_lose_only_their_classifier(name, monkeypatch):
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights: get_model(name, weights=None)
    )
    encoder = load_encoder(f"torchvision:{name}", CPU)
    widths = dict(vit_b_16=768, convnext_tiny=768, mobilenet_v3_small=1024, swin_t=768, vgg11=4096)
    assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, widths[name])


def test_timm_encoder_loads_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth")
    encoder = load_encoder("timm:vit_tiny_patch16_224", CPU, tmp_path / "w.pth")
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(2 * x - 1), pre_logits=True)
    torch.testing.assert_close(encoder(x), expected)
    assert encoder.image_size == 224 and encoder.facts["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match="has no such model"):
        load_encoder("timm:vit_none", CPU)
    with pytest.raises(UserError, match="no_such_tag: RuntimeError"):
        load_encoder("timm:resnet18.no_such_tag", CPU)


def test_hub_encoder_is_loaded_from_a_local_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch\n\n\ndef mean_colour(pretrained=True):\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
    )
    encoder = load_encoder(f"hub:{tmp_path}:mean_colour", CPU, size=8)
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(encoder(x), (x.mean((2, 3)) - mean) / std)
    with pytest.raises(UserError, match="hub:"):
        load_encoder(f"hub:{tmp_path}:no_such_entry", CPU)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder.", "model.backbone."])
def test_checkpoints_of_other_libraries_load_into_our_target_network(prefix, tmp_path, capsys):
    torch.manual_seed(0)
    theirs = build("resnet18_target", 32, 0, 0.125).features
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    state |= {
        "projector.0.weight": torch.ones(2, 2),
        "momentum_backbone.conv1.weight": torch.ones(1),
    }
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.ckpt")
    ours = build("resnet18_target", 32, 0, 0.125).features
    load_matching(ours, tmp_path / "c.ckpt")
    assert all(
        torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items()
    )
    shown = capsys.readouterr().out
    assert "skipped entries: projector.0.weight, momentum_backbone.conv1.weight" in shown
    del state[prefix + "conv1.weight"]
    torch.save(state, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match=r"it lacks conv1\.weight"):
        load_matching(ours, tmp_path / "c.ckpt")
    torch.save({prefix + "conv1.weight": torch.ones(3)} | state, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match=r"other shapes of conv1\.weight"):
        load_matching(ours, tmp_path / "c.ckpt")


def test_no_reduction_to_as_many_dimensions_or_more(tmp_path):
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for count in (0, 4, 9):
        reduction, facts = reduce_features(array, tmp_path / "f.npy", count)
        assert reduction["components"] is None and facts["variance_kept"] == 1.0
        assert np.array_equal(np.load(tmp_path / "f.npy"), array)
        x = torch.rand(3, 4)
        assert torch.equal(project(x, **reduction), x)


def test_features_of_one_image_are_not_reduced(tmp_path):
    array = np.arange(1, 5, dtype=np.float32)[None]
    for count in (0, 1, 3, 9):
        reduction, facts = reduce_features(array, tmp_path / "f.npy", count)
        assert reduction["components"] is None and facts["variance_kept"] == 1.0
        assert np.array_equal(np.load(tmp_path / "f.npy"), array)


def test_scale_of_the_features_does_not_matter(tmp_path):
    """Compare features with 8 times the features: equal after the division, with or without PCA."""
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for count in (0, 2):
        stored = []
        for name, factor in (("a.npy", 1), ("b.npy", 8)):
            reduction, facts = reduce_features(factor * array, tmp_path / name, count, True)
            stored.append(np.load(tmp_path / name))
            rows = project(torch.from_numpy(factor * array), **reduction)
            np.testing.assert_allclose(rows, stored[-1], rtol=1e-5, atol=1e-6)
            assert reduction["scale"] == pytest.approx(1 / facts["rms"])
        np.testing.assert_allclose(np.abs(stored[0]), np.abs(stored[1]), rtol=1e-4, atol=1e-5)
        assert np.mean(np.square(stored[0])) == pytest.approx(1, rel=1e-5)
    reduction, facts = reduce_features(np.zeros((5, 3)), tmp_path / "c.npy", 0, True)
    assert facts["rms"] == 0 and reduction["scale"] == 1


def measure_quality(source, features):
    return quality.measure_quality(source, lambda index: features[index], "convnet3", 0.125, CPU)


def test_target_no_better_than_an_untrained_student_gives_a_warning(source, capsys):
    """Check one-hot labels, which are better than an untrained student, and noise, which is not."""
    good = torch.nn.functional.one_hot(source.labels).float()
    found = measure_quality(source, good)
    assert (
        found["linear"] == found["knn"] == 100.0
        and found["n"] == 30
        and found["student"] == "convnet3-x0.125"
    )
    noise = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    bad = measure_quality(source, noise)
    assert not quality.is_better(bad) and bad["untrained"] == found["untrained"]
    quality.print_quality(bad)
    assert "distilling this target may not help" in capsys.readouterr().err
    better = dict(linear=80.0, knn=0, untrained=dict(linear=70.0, knn=0), student="s")
    assert quality.is_better(better | dict(n=1000)) and not quality.is_better(better | dict(n=100))


def test_quality_check_needs_labels_and_keeps_the_state_of_the_generator(source):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measure_quality(source, torch.rand(60, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    unlabelled = argparse.Namespace(labels=None)
    assert quality.measure_quality(unlabelled, None, "convnet3", 1.0, CPU) is None


def test_error_for_damaged_features_names_the_file_with_their_checksum(
    target_path, source, tmp_path
):
    for name in ("target.pt", "features.npy"):
        shutil.copy(target_path.parent / name, tmp_path)
    content = bytearray((tmp_path / "features.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "features.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"features.npy: damaged .*; delete .*target.pt to"):
        load_target(tmp_path / "target.pt", source, CPU, "fp32")
