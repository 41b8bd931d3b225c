"""The protocol r2 of finetune.py: R^2 of a pre-trained head for the target features."""

import json

import pytest
import torch
from sklearn.metrics import r2_score

import finetune
from data.images import load_images, normalise
from evaluation import probes
from models import saved
from models.target import load_target
from tests.conftest import TARGET, run_command
from utils.errors import UserError

CPU = torch.device("cpu")


def test_r2_is_the_explained_variance_over_all_dimensions():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 5, 9])
    predicted = targets + torch.randn(50, 3, generator=generator, dtype=torch.float64)
    expected = r2_score(targets.numpy(), predicted.numpy(), multioutput="variance_weighted")
    assert probes.r2_percent(predicted, targets) == pytest.approx(100 * expected, rel=1e-12)
    assert probes.r2_percent(targets, targets) == 100
    assert probes.r2_percent(targets.mean(0).expand(50, 3), targets) == pytest.approx(0, abs=1e-9)


def test_command_compares_the_head_with_the_target_on_test_images(
    weights, runs, data_root, roots, tmp_path
):
    words = ["--weights", str(weights), "--dataset", "digits", *roots, "--protocol", "r2"]
    run_command("finetune.py", *words)
    lines = [json.loads(x) for x in (weights.parent / "results.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["protocol"] == "r2"]

    train, test = (load_images("digits", split, 32, data_root) for split in ("train", "test"))
    target = load_target(runs / "target" / "seed0" / "target.pt", train, CPU, "fp32")
    x = normalise(test.raw(torch.arange(len(test)), CPU), train.mean, train.std)
    model = saved.load_model(weights)
    with torch.no_grad():
        features = target.network.eval().embed(x)
        predicted = saved.rebuild(model).eval()(x)
    residual = ((predicted - features) ** 2).sum()
    expected = 100 * (1 - residual / ((features - features.mean(0)) ** 2).sum())
    assert line["accuracy"] == pytest.approx(expected.item(), abs=0.01)
    stored = target.test_features(train, test, data_root)
    torch.testing.assert_close(stored, features, rtol=1e-4, atol=1e-4)

    before = len(lines)
    run_command("finetune.py", *words)  # already in results.jsonl
    assert len((weights.parent / "results.jsonl").read_text().splitlines()) == before


def test_other_targets_and_label_flags_are_errors(weights, roots, tmp_path, capsys):
    words = ["--weights", str(weights), "--dataset", "digits", *roots, "--protocol", "r2"]
    other = [*roots[:2], "--run-root", str(tmp_path)]
    run_command("pretrain_target.py", "--source", "digits", *TARGET, *other, "--seed", "1")
    target = tmp_path / "digits" / "target" / "seed1" / "target.pt"
    with pytest.raises(UserError, match="was not pre-trained on the features of"):
        finetune.main([*words, "--target-network", str(target)])
    for flags in (
        [*words, "--labels-per-class", "2"],
        [*words[:-1], "linear", "--target-network", str(target)],
    ):
        with pytest.raises(SystemExit, match="2"):
            finetune.main(flags)
    shown = capsys.readouterr().err
    assert "--protocol r2 trains on no labels" in shown
    assert "--target-network requires --protocol r2" in shown
