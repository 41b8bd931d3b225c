"""Exported sets and networks are exact and usable without this package; damage is an error."""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import kd
import models
import pretrain
from analysis import figures
from data import exported
from data.distilled import Distilled, distilled_file, load_distilled, results_folder
from distillers.__main__ import main as distillers
from evaluation import fid, results
from models.saved import load_model
from publishing import cards, dd_ranking, export, standalone
from tests.conftest import ROOT, run_command
from tests.hub import Hub
from utils import files
from utils.errors import UserError
from utils.run import shareable_command

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file

CIFAR10 = {"source": "cifar10", "method": "dm", "seed": 0, "preset": "digits"}


def make_set(kind="feature", m=20, **meta):
    """Return random images with random targets of a kind: 20 classes or features."""
    g = torch.Generator().manual_seed(1)
    targets = {
        "feature": torch.randn(m, 20, generator=g),
        "soft": torch.randn(m, 20, generator=g),
        "class": torch.randint(20, (m,), generator=g),
        "none": torch.zeros(m, 0),
    }[kind]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    return Distilled(
        torch.randn(m, 3, 32, 32, generator=g), targets, kind, mean, std, CIFAR10 | meta
    )


def save_set(folder, distilled):
    path = folder / "runs" / "cifar10" / "dm" / "seed0" / "distilled.pt"
    path.parent.mkdir(parents=True)
    files.save(path, "distilled", distilled.content())
    return path


def run_without_package(*words, cwd):
    """Run Python in a folder where this package cannot be imported; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(distilled, weights, roots, tmp_path_factory):
    """Export the toy set after probes of a network pre-trained on it and of an untrained one."""
    probe = ["--dataset", "digits", "--protocol", "linear", "--labels-per-class", "5", *roots]
    finetune.main(["--weights", str(weights), *probe])
    finetune.main(["--weights", "none", "--arch", "convnet3", "--width", "0.125", *probe])
    out = tmp_path_factory.mktemp("exported") / "toy"
    distillers(["export", str(distilled), str(out), "--license", "cc-by-4.0"])
    return out


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


# Export and load a set


def test_exported_set_is_exact(distilled, folder):
    before, after = load_distilled(distilled), load_distilled(folder)
    for name in ("images", "targets", "mean", "std"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.target_kind == "feature" and after.meta["name"] == "toy"
    assert before.meta == {
        name: value for name, value in after.meta.items() if name not in ("name", "recipe")
    }
    assert after.meta["recipe"]["epochs"] == 3 and after.meta["recipe"]["width"] == 0.125


def test_export_is_reproducible(distilled, folder, tmp_path):
    distillers(["export", str(distilled), str(tmp_path / "toy"), "--license", "cc-by-4.0"])
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 20 + 6
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "toy" / name).read_bytes()


def test_checksums_cover_all_files_except_the_card(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert listed.keys() == there - {"README.md", "SHA256SUMS"} and lines[-1].endswith(
        "  distilled.safetensors"
    )
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_pngs_are_the_rounded_pixels(folder):
    pixels = load_distilled(folder).pixels()
    shown = np.stack(
        [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]
    )
    assert shown.shape == (20, 32, 32, 3) and shown.dtype == np.uint8
    assert np.abs(shown - 255 * pixels.permute(0, 2, 3, 1).numpy()).max() <= 1
    assert Image.open(folder / "preview.png").size[0] == 10 * 66 + 2


def test_pretraining_on_the_folder_gives_the_same_weights(folder, weights, tmp_path, roots):
    """Use the recipe in the set, and write to the run root."""
    flags = [*roots[:2], "--run-root", tmp_path, "--precision", "fp32"]  # as `weights`
    run_command("pretrain.py", "--distilled", folder, *flags)
    again = load_model(
        tmp_path / "digits" / "toy" / "seed0" / "convnet3-x0.125" / "seed0" / "model.pt"
    )
    assert again["meta"]["method"] == "krr_st" and again["meta"]["settings"]["epochs"] == 3
    for name, value in load_model(weights)["network"].items():
        assert torch.equal(value, again["network"][name])


def test_other_scripts_accept_the_folder(folder, weights, roots, tmp_path):
    made, root = str(folder), ["--run-root", str(tmp_path / "runs"), *roots[:2]]
    fid.main(["--distilled", made, "--network", str(weights), *root])
    (line,) = results.read(tmp_path / "runs" / "digits" / "toy" / "seed0" / "results.jsonl")
    assert line["num_images"] == 20
    figures.main(["images", "--distilled", made, "--out", str(tmp_path / "x.png"), *roots[:2]])
    assert (tmp_path / "x.png").is_file()
    student, teacher = tmp_path / "student" / "model.pt", tmp_path / "teacher" / "model.pt"
    for path in (student, teacher):
        path.parent.mkdir()
        shutil.copy(weights, path)
    finetune.main(["--weights", str(teacher), "--dataset", "digits", "--steps", "1", *roots])
    teacher = next(teacher.parent.glob("*/model.pt"))
    kd.main(
        [
            "--weights",
            str(student),
            "--distilled",
            made,
            "--teacher",
            str(teacher),
            "--dataset",
            "digits",
            "--epochs",
            "1",
            *roots,
        ]
    )
    (line,) = results.read(student.parent / "results.jsonl")
    assert line["protocol"] == "kd" and line["images"]["num_images"] == 20
    distillers(["export", str(teacher), str(tmp_path / "net")])
    assert "| fine-tuned on | digits |" in (tmp_path / "net" / "README.md").read_text()


def test_results_of_an_exported_set_stay_in_the_run_root(tmp_path):
    hostile = make_set()
    hostile.meta |= {"source": "../../elsewhere", "name": ".."}
    home = results_folder(tmp_path / "x.safetensors", hostile, tmp_path / "runs")
    assert home == tmp_path / "runs" / "_.._elsewhere" / "set" / "seed0"
    assert results_folder(tmp_path / "a" / "distilled.pt", hostile, tmp_path) == tmp_path / "a"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", "x"),
        ("arch", 3),
        ("lr", -1.0),
        ("lr", "0.1"),
        ("epochs", 2.5),
        ("augment", 1),
        ("lr", float("inf")),
        ("batch_size", 0),
    ],
)
def test_invalid_recipe_is_an_error(name, value):
    distilled = make_set()
    distilled.meta["recipe"] = {name: value}
    usual = {"arch": "convnet3", "width": 0.25, "lr": 0.1, "epochs": 5, "augment": False}
    usual |= {"steps": 0, "batch_size": 10}
    with pytest.raises(UserError, match=f"x: invalid recipe: {name}"):
        pretrain.read_recipe(distilled, "x", usual)
    distilled.meta["recipe"] = {"epochs": 7, "unknown": 1}
    assert pretrain.read_recipe(distilled, "x", usual) == usual | {"epochs": 7}
    distilled.meta["recipe"] = {"epochs": 0}
    with pytest.raises(UserError, match="neither epochs nor steps"):
        pretrain.read_recipe(distilled, "x", usual)


# Without this package


def test_load_py_gives_the_same_weights_without_this_package(folder, weights, tmp_path):
    assert (
        run_without_package(folder / "load.py", cwd=tmp_path) == "wrote network.pt, a state dict\n"
    )
    trained = torch.load(tmp_path / "network.pt", weights_only=True)
    original = load_model(weights)["network"]
    assert trained.keys() == original.keys()
    assert all(torch.equal(trained[name], original[name]) for name in original)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_load_py_supports_every_recipe(kind, tmp_path):
    """Include augmentation, schedules, warm-up and a smaller last batch."""
    path, few = (
        save_set(tmp_path, make_set(kind)),
        ["--steps", "6"] if kind == "soft" else ["--epochs", "3"],
    )
    run_command("pretrain.py", "--distilled", path, "--width", "0.05", "--batch-size", "8", *few)
    distillers(["export", str(path), str(tmp_path / "out")])
    run_without_package(tmp_path / "out" / "load.py", cwd=tmp_path)
    original = load_model(path.parent / "convnet3-x0.05" / "seed0" / "model.pt")
    trained = torch.load(tmp_path / "network.pt", weights_only=True)
    assert (
        original["meta"]["settings"]["augment"]
        and original["meta"]["settings"]["schedule"] != "constant"
    )
    assert all(torch.equal(trained[name], value) for name, value in original["network"].items())


def test_images_without_targets_are_exported_with_a_loader_only(tmp_path):
    d = make_set("none")
    distillers(["export", str(save_set(tmp_path, d)), str(tmp_path / "out")])
    code = (
        "from load import load; d, info = load()\n"
        "print(len(d), info['target_kind'], info['mean'].tolist())"
    )
    assert run_without_package("-c", code, cwd=tmp_path / "out") == f"20 none {d.mean.tolist()}\n"
    assert "def pretrain" not in (tmp_path / "out" / "load.py").read_text()
    assert torch.equal(load_distilled(tmp_path / "out").images, d.images)


def test_load_py_exits_with_an_error_for_a_damaged_set(copy):
    content = bytearray((copy / "distilled.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "distilled.safetensors").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "load.py"], cwd=copy, capture_output=True, text=True, timeout=1800
    )
    assert (
        done.returncode == 1
        and "distilled.safetensors: damaged or altered" in done.stderr.splitlines()[-1]
    )


def test_exported_network_computes_the_same_without_this_package(weights, tmp_path):
    out = tmp_path / "net"
    distillers(["export", str(weights), str(out)])
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import network, torch; n, x = network.load(), torch.load('../x.pt')\n"
        "torch.save({'y': n(x).detach(), 'f': n.embed(x).detach()}, '../y.pt')"
    )
    run_without_package("-c", code, cwd=out)
    content, there = load_model(weights), torch.load(tmp_path / "y.pt")
    network = models.saved.rebuild(content).eval()
    torch.testing.assert_close(there["y"], network(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there["f"], network.embed(x), rtol=1e-5, atol=1e-6)
    assert all(
        torch.equal(v, content["network"][k])
        for k, v in load_file(out / "model.safetensors").items()
    )
    exported.verify(out, "model.safetensors")
    assert "convnet3-x0.125" in (out / "README.md").read_text()


@pytest.mark.parametrize("arch", [*models.ARCHITECTURES])
def test_exported_code_of_each_network_builds_it(arch, tmp_path):
    width = 1.0 if arch == "resnet50_target" else 0.25
    standalone.write(
        tmp_path / "network.py", "A network.", standalone.collect_network_code(arch, 64, 7, width)
    )
    source = (tmp_path / "network.py").read_text()
    assert not re.search(r"^(from|import) (models|utils|data)\b", source, re.MULTILINE)
    uses_torchvision = bool(re.search(r"^(from|import) torchvision\b", source, re.MULTILINE))
    named = cards.required_packages(models.label(arch, width))
    assert uses_torchvision == ("torchvision" in named)
    space = {}
    exec(compile(source, "network.py", "exec"), space)
    torch.manual_seed(3)
    theirs = space["build"]().state_dict()
    torch.manual_seed(3)
    ours = models.build(arch, 64, 7, width).state_dict()
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )
    assert all(ours[name].stride() == theirs[name].stride() for name in ours)


# Damaged folders


def rewrite(folder, change):
    """Change the header or tensors of the set's file and update the checksums."""
    path = folder / "distilled.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["distilled"])
    tensors = load_file(path)
    change(header, tensors)
    export.save_tensors(path, tensors, distilled=header)
    exported.write_sums(folder, path.name)


FAULTS = {
    "flipped": (
        lambda f: _flip(f / "distilled.safetensors", 100),
        "distilled.safetensors: damaged or altered",
    ),
    "cut": (
        lambda f: _cut(f / "distilled.safetensors", -1),
        "distilled.safetensors: damaged or altered",
    ),
    "empty": (
        lambda f: _cut(f / "distilled.safetensors", 0),
        "distilled.safetensors: damaged or altered",
    ),
    "other code": (lambda f: _flip(f / "load.py", 20), "load.py: damaged or altered"),
    "other picture": (
        lambda f: _flip(f / "images" / "0003.png", 50),
        "0003.png: damaged or altered",
    ),
    "no set": (
        lambda f: (f / "distilled.safetensors").unlink(),
        "not an exported set (no distilled.safetensors)",
    ),
    "no list": (lambda f: (f / "SHA256SUMS").unlink(), "not an exported set (no SHA256SUMS)"),
    "cut list": (lambda f: _cut(f / "SHA256SUMS", -1), "SHA256SUMS: truncated"),
    "shorter list": (lambda f: _cut(f / "SHA256SUMS", 85 * 3), "SHA256SUMS: "),
    "empty list": (lambda f: _cut(f / "SHA256SUMS", 0), "SHA256SUMS: truncated"),
    "foreign list": (
        lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\0x\n"),
        "SHA256SUMS: damaged (line 1",
    ),
    "newer": (lambda f: rewrite(f, lambda h, t: h.update(format=2)), "exported set of format 2"),
    "no meta": (
        lambda f: rewrite(f, lambda h, t: h.pop("meta")),
        "not an exported set (KeyError: 'meta')",
    ),
    "odd meta": (
        lambda f: rewrite(f, lambda h, t: h.update(meta=3)),
        "not an exported set (TypeError",
    ),
    "odd seed": (
        lambda f: rewrite(f, lambda h, t: h["meta"].update(seed="x")),
        "seed of the wrong type",
    ),
    "no images": (
        lambda f: rewrite(f, lambda h, t: t.pop("images")),
        "not an exported set (SafetensorError",
    ),
    "fewer": (
        lambda f: rewrite(f, lambda h, t: t.update(targets=t["targets"][1:])),
        "19 targets for 20 images",
    ),
    "not finite": (
        lambda f: rewrite(f, lambda h, t: t["images"].fill_(torch.nan)),
        "values that are not finite",
    ),
}


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _cut(path, end):
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_folder_is_a_one_line_error(copy, fault):
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_distilled(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_commands_exit_with_this_error(copy, roots):
    _cut(copy / "distilled.safetensors", 1000)
    done = run_command("pretrain.py", "--distilled", copy, *roots, check=False)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "damaged or altered" in done.stderr
    )
    with pytest.raises(UserError, match="damaged or altered"):
        distillers(["export", str(copy), "--push", "me/toy"])


def test_card_may_be_edited_and_pictures_may_be_deleted(copy):
    (copy / "README.md").write_text("mine")
    shutil.rmtree(copy / "images")
    assert len(load_distilled(copy).images) == 20


def test_changed_bytes_load_or_are_a_one_line_error(copy):
    """Update the checksums, so that the reader itself meets the damage."""
    path = copy / "distilled.safetensors"
    content, draw = path.read_bytes(), np.random.default_rng(0)
    for position in [*draw.integers(0, 9000, 40), *draw.integers(9000, len(content), 5)]:
        changed = bytearray(content)
        changed[position] = draw.integers(256)
        path.write_bytes(changed)
        exported.write_sums(copy, path.name)
        try:
            load_distilled(copy)
        except UserError as error:
            assert "\n" not in str(error)


# Writing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{set}", "{there}"], "exists; choose another folder"),
        (["{set}", "{new}", "--name", "a/b"], "--name a/b: must be a plain word"),
        (["{there}", "{new}"], "a folder; give a distilled.pt or a model.pt"),
        (["{there}"], "not an exported folder; to export, also give"),
        (["{missing}", "{new}"], "no such file"),
        (["{net}", "{new}", "--dd-ranking"], "--dd-ranking requires a distilled set"),
        (
            ["{set}", "{new}", "--dd-ranking"],
            "DD-Ranking scores a set by the accuracy of classifiers",
        ),
    ],
)
def test_failed_export_leaves_no_file(distilled, weights, tmp_path, words, message):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    paths = dict(
        set=distilled,
        net=weights,
        missing=tmp_path / "x.pt",
        there=tmp_path / "there",
        new=tmp_path / "new",
    )
    with pytest.raises(UserError, match=re.escape(message)):
        distillers(["export", *(word.format(**paths) for word in words)])
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and len(
        [*paths["there"].iterdir()]
    ) == 1


@pytest.mark.parametrize(
    ("module", "package"), [("safetensors", "safetensors"), ("huggingface_hub", "huggingface_hub")]
)
def test_missing_package_is_named(monkeypatch, folder, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
        load_distilled(folder if package == "safetensors" else "hf:some/where")


@pytest.mark.parametrize("depth", range(4))
def test_results_and_target_networks_are_not_searched_at_the_root(depth):
    path = Path("/", *"abc"[:depth], "distilled.pt")
    meta = {"settings": {"target_network": "0" * 12}}
    assert export.find_untrained_results(path) == []
    if depth < 3:
        assert export.describe_target_network(path, meta) == f"target.pt {'0' * 12}"


def test_command_on_the_card_has_no_local_path(tmp_path):
    words = [
        "/home/me/repo/distill.py",
        "--source",
        "my photos",
        "--data-root",
        "/home/me/data",
        "--device=cpu",
        "--target-network",
        "/home/me/target.pt",
        "--run-root=/x",
        "--log-every",
        "5",
        "--width=0.5",
        "--reference",
    ]
    files.write_json(tmp_path / "config.json", {"command": words, "settings": {}})
    shown = (
        "python distill.py --source 'my photos' --target-network target.pt --width=0.5 --reference"
    )
    assert shareable_command(tmp_path) == shown and shareable_command(tmp_path / "none") is None
    files.write_json(
        tmp_path / "config.json",
        {"command": ["python -m distillers dm", "--seed", "1"], "settings": {}},
    )
    assert shareable_command(tmp_path) == "python -m distillers dm --seed 1"


def test_accuracies_are_grouped_as_mean_and_standard_deviation():
    base = dict(
        arch="convnet3",
        width=0.5,
        image_size=32,
        dataset="cifar10",
        protocol="linear",
        labels_per_class=5,
    )
    lines = [base | {"accuracy": value} for value in (40.0, 42.0, 47.0)]
    lines += [base | {"accuracy": 60.0, "labels_per_class": 0, "protocol": "full"}, {"fid": 3.0}]
    scratch = [base | {"accuracy": 30.0}, base | {"accuracy": 1.0, "image_size": 64}]
    deviation = statistics.pstdev([40, 42, 47])
    assert cards.group_accuracies(lines, scratch) == [
        ["convnet3-x0.5 at 32 px", "cifar10", "full", "all", "60.00 ± 0.00 (n=1)", ""],
        [
            "convnet3-x0.5 at 32 px",
            "cifar10",
            "linear",
            "5 per class",
            f"43.00 ± {deviation:.2f} (n=3)",
            "30.00 ± 0.00 (n=1)",
        ],
    ]


def test_r2_is_no_accuracy_on_the_card():
    base = dict(arch="convnet3", width=0.5, image_size=32, dataset="cifar10", accuracy=40.0)
    r2, linear = base | dict(protocol="r2", accuracy=61.0), base | dict(protocol="linear")
    accuracies, table = cards.format_accuracies([linear, r2]).split("## R^2")
    assert "| linear | all | 40.00 ± 0.00 (n=1) |" in accuracies and "61.00" not in accuracies
    assert "| network | data set | R^2 in % |" in table
    assert "| convnet3-x0.5 at 32 px | cifar10 | 61.00 ± 0.00 (n=1) |" in table
    assert "Not measured." in cards.format_accuracies([r2])
    assert "R^2" not in cards.format_accuracies([linear])


def test_card_describes_the_set(folder, distilled, weights):
    text = (folder / "README.md").read_text()
    (line,) = (
        line
        for line in results.read(weights.parent / "results.jsonl")
        if line["labels_per_class"] == 5
    )
    digest = hashlib.sha256((folder / "distilled.safetensors").read_bytes()).hexdigest()
    target = files.digest(distilled.parents[2] / "target" / "seed0" / "target.pt")
    for said in (
        "| source | digits |",
        "| method | KRR-ST |",
        "| images | 20 of 32 x 32 pixels |",
        digest,
        "`cc-by-4.0`",
        "python distill.py --source digits --num-images 20",
        "features of the target network, 64 numbers",
        f"resnet18_target-x0.125, Barlow Twins, on digits (target.pt {target})",
        "| convnet3-x0.125 at 32 px | digits | linear | 5 per class | ",
        f"| {line['accuracy']:.2f} ± 0.00 (n=1) | ",
    ):
        assert said in text
    assert str(distilled.parents[3]) not in text and "/tmp" not in text
    both = r"5 per class \| \d+\.\d\d ± 0\.00 \(n=1\) \| \d+\.\d\d ± 0\.00 \(n=1\) \|$"
    assert re.search(both, text, re.MULTILINE)  # with and without pre-training


# The Hub


def test_cards_have_valid_metadata(folder, weights, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    distillers(["export", str(weights), str(tmp_path / "net")])
    card = hub.DatasetCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "cc-by-4.0" and card.data.pretty_name == "toy"
    assert {"dataset-distillation", "self-supervised-learning"} <= set(card.data.tags)
    assert card.data.task_categories == [
        "image-feature-extraction"
    ] and card.data.size_categories == ["n<1K"]
    card = hub.ModelCard.load(tmp_path / "net" / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "unknown" and card.data.pipeline_tag == "image-feature-extraction"


@pytest.mark.parametrize("kind", ["feature", "class"])
def test_datasets_opens_the_folder_offline(kind, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    d = make_set(kind)
    distillers(["export", str(save_set(tmp_path, d)), str(tmp_path / "out")])
    read = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    pixels, expected = (
        np.stack([np.asarray(image) for image in read["image"]]),
        255 * d.pixels().permute(0, 2, 3, 1),
    )
    assert pixels.shape == expected.shape and np.abs(pixels - expected.numpy()).max() <= 1
    assert np.array_equal(
        np.array(read["target"]).astype(d.targets.numpy().dtype), d.targets.numpy()
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    constants = {
        "ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield hub
    hub.close()
    exported.download.cache_clear()


def test_set_can_be_uploaded_and_loaded_from_the_hub(hub, copy, distilled):
    push = ["export", str(copy), "--push", "me/toy"]
    distillers(push)
    there = {
        str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()
    }
    assert hub.files("datasets/me/toy") == there and hub.repositories["datasets/me/toy"]["private"]
    assert hub.cards == [{"repoType": "dataset", "content": there["README.md"].decode()}]
    hub.requests.clear()
    back = load_distilled("hf:me/toy")
    assert torch.equal(back.images, load_distilled(distilled).images) and back.meta["name"] == "toy"
    served = {
        line.rpartition("/")[2] for line in hub.requests if "GET /datasets/me/toy/resolve" in line
    }
    assert served == {"distilled.safetensors", "SHA256SUMS"}

    (first,) = {
        digits for line in hub.requests for digits in re.findall(r"/resolve/([0-9a-f]{40})", line)
    }
    (copy / "images" / "0019.png").unlink()  # the upload must delete it on the Hub
    rewrite(copy, lambda header, tensors: header.update(name="second"))
    distillers(push)
    assert "images/0019.png" not in hub.files("datasets/me/toy")
    exported.download.cache_clear()
    assert load_distilled("hf:me/toy").meta["name"] == "second"
    assert load_distilled(f"hf:me/toy@{first}").meta["name"] == "toy"


def test_network_can_be_uploaded(hub, weights, tmp_path):
    distillers(["export", str(weights), str(tmp_path / "net"), "--push", "me/net"])
    assert hub.files("models/me/net").keys() == {
        "README.md",
        "SHA256SUMS",
        "model.safetensors",
        "network.py",
    }


def test_errors_of_the_hub_are_one_line(hub, copy, monkeypatch):
    hub.repositories["datasets/me/empty"] = {"private": False, "commits": [{"README.md": b""}]}
    for name, message in {
        "hf:me/nothing": "cannot be downloaded (RepositoryNotFoundError",
        "hf:me/empty@v9": "cannot be downloaded (RevisionNotFoundError",
        "hf:me/empty": "not an exported set (no distilled.safetensors and no SHA256SUMS)",
        "hf:me": "must be hf:USER/NAME or hf:USER/NAME@REVISION",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"{name}: {message}")) as error:
            load_distilled(name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # refuses
    with pytest.raises(UserError, match=r"--push me/toy: failed.*ConnectError") as error:
        distillers(["export", str(copy), "--push", "me/toy"])
    assert "\n" not in str(error.value)


def test_damaged_download_is_an_error(hub, copy):
    distillers(["export", str(copy), "--push", "me/toy"])
    _flip(copy / "distilled.safetensors", 200)
    hub.files("datasets/me/toy")["distilled.safetensors"] = (
        copy / "distilled.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="damaged or altered"):
        load_distilled("hf:me/toy")


# DD-Ranking


def make_labelled_set(per_class=2, classes=10):
    d = make_set("class", m=per_class * classes)
    d.targets = torch.arange(classes).repeat(per_class)  # 0 1 ... 9 0 1 ... 9
    return d


def test_dd_ranking_file_has_images_by_class_in_its_normalisation(tmp_path):
    d = make_labelled_set()
    distillers(["export", str(save_set(tmp_path, d)), str(tmp_path / "out"), "--dd-ranking"])
    tensors = load_file(tmp_path / "out" / "dd_ranking.safetensors")
    assert tensors["labels"].tolist() == [c for c in range(10) for _ in range(2)]
    for position, index in ((0, 0), (1, 10), (2, 1), (19, 19)):
        for channel, (mean, std) in enumerate(
            zip((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), strict=True)
        ):
            pixels = d.images[index, channel].double() * d.std[channel] + d.mean[channel]
            torch.testing.assert_close(
                tensors["images"][position, channel].double(),
                (pixels - mean) / std,
                rtol=0,
                atol=1e-5,
            )
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'LabelRobustScoreHard(dataset="CIFAR10", ipc=2,' in text
    assert "dd_ranking.safetensors" in (tmp_path / "out" / "SHA256SUMS").read_text()


def test_error_explains_why_dd_ranking_cannot_score_a_set():
    uneven, few, other = make_labelled_set(), make_labelled_set(classes=9), make_labelled_set()
    uneven.targets[0] = 1
    other.meta["source"] = "pets"
    for d, message in (
        (
            make_set("feature"),
            "this set has a target network's features instead of labels",
        ),
        (make_set("soft"), "needs class labels, but the targets of this set are soft"),
        (uneven, "the same number of images of each of 10 classes, but this set has 1 to 3 images"),
        (few, "this set has 0 to 2 images per class"),
        (other, "this set is from pets"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            dd_ranking.convert(d)


def test_distilled_file_finds_the_file_of_a_set(folder, distilled):
    assert (
        distilled_file(folder) == folder / "distilled.safetensors"
        and distilled_file(distilled) == distilled
    )


def test_set_of_this_repository_is_small_and_pretrains_a_network(tmp_path):
    folder = ROOT / "sets" / "cifar10"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000
    d = load_distilled(distilled_file(str(folder)))
    assert d.images.shape == (50, 3, 32, 32) and d.targets.shape == (50, 256)
    assert d.target_kind == "feature" and d.meta["initial"] is None  # no real images
    words = ["--distilled", str(folder), "--arch", "convnet3", "--width", "0.25"]
    pretrain.main([*words, "--epochs", "2", "--run-root", str(tmp_path)])
    model = load_model(tmp_path / "cifar10" / "cifar10" / "seed0/convnet3-x0.25/seed0/model.pt")
    assert model["num_outputs"] == 256 and model["meta"]["settings"]["lr"] == 0.1
