"""The oracle: pre-training on all images of a source, and its row in the tables."""

import importlib
import json

import pytest
import torch

import distill
import models
import pretrain
from analysis import tables
from data.distilled import load_distilled
from data.images import load_images
from distillers import method
from models.saved import load_model
from models.target import load_target
from tests.conftest import make_stopping_steps, run_command
from utils import files, run
from utils.errors import UserError
from utils.presets import preset

PLACE = "full/seed0/convnet3-x0.125"


@pytest.fixture
def toy(roots, runs, tmp_path):
    """Return the flags of a toy oracle on the digits."""
    return [
        "--source",
        "digits",
        *roots[:2],
        "--run-root",
        str(tmp_path),
        "--width",
        "0.125",
        "--log-every",
        "1",
        "--target-network",
        str(runs / "target" / "seed0" / "target.pt"),
    ]


@pytest.fixture
def source(data_root):
    return load_images("digits", "train", 32, data_root)


def read_losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_oracle_equals_pretraining_on_a_set_of_all_images(toy, roots, runs, source, tmp_path):
    """Check that the oracle uses the recipe for features on X_t and g_phi(X_t), and learns."""
    steps = ["--steps", "25", "--batch-size", "100"]
    pretrain.main([*toy, *steps])
    target = load_target(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu"), "fp32"
    )
    every = torch.arange(len(source))
    whole = method.make_distilled(
        source.normalised(every, "cpu"), target.features_of(source), "feature", source
    )
    whole.meta |= dict(source="digits", method="all", preset="digits")
    files.save(tmp_path / "all" / "distilled.pt", "distilled", whole.content())
    with pytest.MonkeyPatch.context() as patch:  # this recipe counts epochs
        recipe = preset("digits", "pretrain", "feature") | dict(epochs=0, steps=25)
        patch.setattr(
            pretrain, "preset", lambda name, stage, *kind: recipe if kind else preset(name, stage)
        )
        pretrain.main(
            [
                "--distilled",
                str(tmp_path / "all" / "distilled.pt"),
                "--width",
                "0.125",
                "--batch-size",
                "100",
                "--log-every",
                "1",
            ]
        )
    oracle, feature_recipe = (
        tmp_path / top for top in (f"digits/{PLACE}/seed0", "all/convnet3-x0.125/seed0")
    )
    curve = read_losses(oracle)
    assert curve == read_losses(feature_recipe) and len(curve) == 25 and curve[-1] < 0.5 * curve[0]
    expected = load_model(feature_recipe / "model.pt")["network"]
    made = load_model(oracle / "model.pt")["network"]
    assert (
        all(torch.equal(value, expected[name]) for name, value in made.items())
        and made.keys() == expected.keys()
    )


def test_first_loss_and_gradient_equal_those_of_the_mean_squared_error(toy, runs, source, tmp_path):
    """Use the whole source as one batch, so that the order does not matter."""
    pretrain.main([*toy, "--steps", "1", "--batch-size", str(len(source))])
    target = load_target(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu"), "fp32"
    )
    torch.manual_seed(0)
    network = models.build("convnet3", 32, 64, 0.125).train()
    x = source.normalised(torch.arange(len(source)), "cpu")
    loss = (network(x) - target.features(x)).square().mean()
    loss.backward()
    norm = sum(weight.grad.square().sum() for weight in network.parameters()).sqrt()
    [line] = [
        json.loads(text)
        for text in (tmp_path / f"digits/{PLACE}/seed0/log.jsonl").read_text().splitlines()
    ]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["gradient"] == pytest.approx(norm.item(), rel=1e-3)


def test_stopped_oracle_resumes_to_the_same_weights(toy, tmp_path, monkeypatch):
    toy = [*toy, "--steps", "20", "--batch-size", "100"]  # ends in the second epoch
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    pretrain.main([*toy, "--run-root", whole])
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", make_stopping_steps([("pre-train", 6)]))
        pretrain.main([*toy, "--run-root", parts])
    pretrain.main([*toy, "--run-root", parts])
    first, again = (load_model(f"{top}/digits/{PLACE}/seed0/model.pt") for top in (whole, parts))
    assert all(
        torch.equal(value, again["network"][name]) for name, value in first["network"].items()
    )


def test_oracle_takes_as_many_steps_as_the_set_of_the_preset():
    for name, wanted in (
        ("cifar100", 4000),
        ("tinyimagenet", 8000),
        ("imagenet", 4000),
        ("imagenette", 1000),
        ("quick-tinyimagenet", 240),
    ):
        recipe, feature_recipe = (
            preset(name, "pretrain", "source", "convnet4"),
            preset(name, "pretrain", "feature", "convnet4"),
        )
        assert recipe["steps"] == wanted and recipe["epochs"] == 0
        assert {key for key in recipe if recipe[key] != feature_recipe[key]} == {"steps", "epochs"}


@pytest.mark.long
def test_model_records_the_oracle_and_tables_have_its_row(toy, roots, tmp_path):
    pretrain.main([*toy, "--steps", "2"])
    path = tmp_path / f"digits/{PLACE}/seed0/model.pt"
    meta = load_model(path)["meta"]
    assert (meta["method"], meta["source"], meta["num_images"]) == ("full", "digits", 1437)
    assert meta["deviations"]["pretrain.steps"] == [2, 300] and meta["deviations"][
        "target.epochs"
    ] == [1, 30]
    assert "num_images" not in meta["deviations"] and "pretrain.epochs" not in meta["deviations"]
    done = run_command(
        "finetune.py", "--weights", path, "--dataset", "digits", "--protocol", "knn", *roots[:2]
    )
    assert "\nfull convnet3 -> digits (knn): " in done.stdout
    shown = tables.format_tables(tables.gather_results([tmp_path]))["digits"]
    assert "| full source (oracle) (convnet3-x0.125 at 32 px, m = 1437, digits) |" in shown


def test_name_of_a_method_is_an_error(toy, tmp_path):
    pretrain.main([*toy, "--steps", "2", "--name", "full_10x.encoder"])
    path = tmp_path / "digits/full_10x.encoder/seed0/convnet3-x0.125/seed0/model.pt"
    assert load_model(path)["meta"]["method"] == "full_10x.encoder"
    for name in ("krr_st", "random.encoder", "target", "a/b"):
        with pytest.raises(UserError, match=f"--name {name}: must be a plain word"):
            pretrain.main([*toy, "--name", name])


def test_pretraining_on_a_set_records_no_flags_of_a_source(weights, distilled):
    config = json.loads((weights.parent / "config.json").read_text())["settings"]
    assert not {"target_network", "preset", "image_size"} & config.keys()
    own = {
        name: pair
        for name, pair in load_model(weights)["meta"]["deviations"].items()
        if name not in load_distilled(distilled).meta["deviations"]
    }
    assert own == {"pretrain.epochs": [3, 300]}


def test_inconsistent_flags_are_errors(toy, distilled, tmp_path, capsys):
    both = ["--distilled", str(distilled)]
    for flags, word in (
        ([*toy, *both], "not allowed with"),
        ([], "one of the arguments --distilled --source"),
        ([*both, "--image-size", "32"], "--image-size requires --source"),
        ([*both, "--preset", "digits"], "--preset requires --source"),
        ([*both, "--target-network", "x.pt"], "--target-network requires --source"),
        ([*both, "--name", "x"], "--name requires --source"),
    ):
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(flags)
        assert stopped.value.code == 2 and word in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"no such file; make it with: python pretrain_target.py --source digits"
    ):
        pretrain.main([*toy[:4], "--run-root", str(tmp_path)])


def distil(*flags):
    """Run a method and return the set that it writes."""
    words = [str(flag) for flag in flags]
    if words[0] == "krr_st":
        chosen = distill.METHOD
    else:
        chosen = importlib.import_module(f"distillers.{words[0]}").METHOD
    method.main(chosen, ["--source", "digits", *words[1:]])
    return load_distilled(
        f"{words[words.index('--run-root') + 1]}/digits/{words[0]}/seed0/distilled.pt"
    )


KRR = [
    "--width",
    0.125,
    "--outer-steps",
    6,
    "--outer-batch",
    64,
    "--pool-size",
    2,
    "--pool-steps",
    3,
]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("krr_st", KRR),
        ("krr_st", [*KRR, "--raw-init"]),
        ("dm", ["--width", 0.125, "--outer-steps", 2, "--real-batch", 8]),
        ("kip", ["--outer-steps", 2, "--outer-batch", 32]),
    ],
)
def test_distance_from_the_initial_images_is_stored_and_printed(
    roots, runs, source, tmp_path, capsys, name, flags
):
    """Compare with the distance between the set and its initial pixels in float64."""
    target = (
        ["--target-network", runs / "target" / "seed0" / "target.pt"] if name == "krr_st" else []
    )
    d = distil(name, *roots[:2], "--run-root", tmp_path, "--num-images", 10, *target, *flags)
    pixels = d.images.double() * d.std[:, None, None] + d.mean[:, None, None]
    initial = source.pixels[torch.tensor(d.meta["initial"])].permute(0, 3, 1, 2).double() / 255
    moved = ((pixels - initial) / source.std.double()[:, None, None]).square().mean().sqrt().item()
    assert d.meta["distance_from_initial"] == pytest.approx(moved, rel=1e-4) and moved > 1e-4
    assert (
        f"initial images: {d.meta['distance_from_initial']:.4f} standard deviations"
        in capsys.readouterr().out.splitlines()[-1]
    )


def test_other_methods_have_no_distance(roots, runs, tmp_path, capsys):
    target = ["--target-network", runs / "target" / "seed0" / "target.pt"]
    for name, flags in (
        ("random", []),
        ("random_features", target),
        ("kmeans", target),
    ):  # real images
        d = distil(name, *roots[:2], "--run-root", tmp_path, "--num-images", 10, *flags)
        assert d.meta["distance_from_initial"] == 0 and len(set(d.meta["initial"])) == 10
    capsys.readouterr()
    noise = distil("gaussian", *roots[:2], "--run-root", tmp_path, "--num-images", 10)
    assert noise.meta["initial"] is None and "distance_from_initial" not in noise.meta
    assert "moved" not in capsys.readouterr().out
