"""Algorithm 1 on digits: a stored loss curve, exact resumption, and the departures."""

import json
import os
from pathlib import Path

import pytest
import torch

import distill
import models
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import (
    balanced_subset,
    gaussian_images,
    measured_subsets,
    measurement_subset,
    random_subset,
    used_subset,
)
from distillers import method
from distillers.pool import Member
from models.target import NetworkTarget, load_target
from tests.conftest import DISTILL, make_stopping_steps
from utils import files, run
from utils.errors import UserError
from utils.presets import preset

CURVE = Path(__file__).parent / "digits_curve.json"


def distil(runs, *flags):
    """Run distill.py in this process; return the distilled set and the lines of its log."""
    distill.main(["--source", "digits", "--run-root", str(runs), *flags])
    folder = runs / "digits" / "krr_st" / "seed0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_distilled(folder / "distilled.pt"), [
        line for line in log if line["phase"] == "distil"
    ]


@pytest.fixture
def toy(roots, runs):
    """Return the flags of a toy distillation with the toy target network."""
    return [
        *DISTILL,
        *roots[:2],
        "--target-network",
        str(runs / "target" / "seed0" / "target.pt"),
        "--log-every",
        "1",
    ]


def test_digits_preset_reproduces_its_first_20_losses(data_root, tmp_path):
    """Compare the losses with the stored curve, for an untrained target network with seed 0.

    After an intended change of the losses, run this test with WRITE_CURVE=1 in the environment to
    store the new curve.
    """
    source = load_images("digits", "train", 32, data_root)
    torch.manual_seed(0)
    network = models.build("resnet18_target", 32, 0, preset("digits", "target")["width"])
    network(source.normalised(torch.arange(256), "cpu"))  # running statistics of real images
    content = dict(
        network=network.state_dict(),
        arch="resnet18_target",
        width=preset("digits", "target")["width"],
        image_size=32,
        source="digits",
        fingerprint=source.fingerprint,
    )
    files.save(tmp_path / "target.pt", "target", content)
    flags = ["--outer-steps", "20", "--log-every", "1", "--data-root", str(data_root)]
    flags += ["--precision", "fp32"]  # on all machines
    _, log = distil(tmp_path, *flags, "--target-network", str(tmp_path / "target.pt"))
    losses = [line["loss"] for line in log]
    if os.environ.get("WRITE_CURVE"):
        CURVE.write_text(json.dumps(losses, indent=1) + "\n")
    assert losses == pytest.approx(json.loads(CURVE.read_text()), rel=0.02)
    assert losses[-1] < losses[0]


CHEAPER = ("--pool-batch", "5", "--updates-per-batch", "2", "--averaged-steps", "7")


@pytest.mark.parametrize("flags", [(), CHEAPER], ids=["paper", "cheaper"])
def test_stopped_run_resumes_to_the_same_set(toy, tmp_path, monkeypatch, flags):
    """Stop once while the pool is initialised and once while the set is learned."""
    toy = [*toy, *flags, "--outer-steps", "9"]
    toy += ["--pool-steps", "4"]  # members are reinitialised
    whole, log = distil(tmp_path / "whole", *toy)

    for at in (("initialise pool", 1), ("distil", 4)):
        with monkeypatch.context() as patch, pytest.raises(run.Stopped):
            patch.setattr(run.Run, "steps", make_stopping_steps([at]))
            distil(tmp_path / "parts", *toy)
    parts, log_of_parts = distil(tmp_path / "parts", *toy)
    assert torch.equal(parts.images, whole.images) and torch.equal(parts.targets, whole.targets)
    assert [line["loss"] for line in log_of_parts] == [line["loss"] for line in log]
    assert not list((tmp_path / "parts").rglob("checkpoint.pt"))


def test_initial_set_is_random_real_images_with_target_features(toy, roots, runs, tmp_path):
    source = load_images("digits", "train", 32, roots[1])
    index = random_subset(source, 20, 0)
    assert len(set(index.tolist())) == 20 and not torch.equal(index, random_subset(source, 20, 1))
    target = load_target(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu"), "fp32"
    )
    x = source.normalised(index, "cpu")
    learned, _ = distil(tmp_path, *toy, "--outer-lr", "1e-12")
    torch.testing.assert_close(learned.images, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(learned.targets, target.features(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        target.features_of(source)[index], target.features(x), rtol=1e-4, atol=1e-5
    )


def test_distillation_lowers_the_outer_loss(toy, tmp_path):
    learned, log = distil(
        tmp_path, *toy, "--outer-steps", "60", "--outer-lr", "0.02", "--outer-batch", "256"
    )
    assert learned.meta["outer_loss_distilled"] < 0.8 * learned.meta["outer_loss_initial"]
    assert len(log) == 60 and log[0]["lr"] == 0.02 and log[-1]["lr"] < 0.02 / 20
    assert learned.targets.requires_grad is False and learned.images.isfinite().all()


@pytest.mark.parametrize(
    "flag",
    [
        "--keep-pool-count",
        "--raw-init",
        "--augment-outer",
        "--ridge-per-image",
        "--no-bias-column",
        "--random-targets",
        "--random-images",
    ],
)
def test_each_departure_changes_the_result(toy, tmp_path, flag):
    toy = [*toy, "--outer-steps", "12"]
    usual, _ = distil(tmp_path / "usual", *toy)
    other, _ = distil(tmp_path / "other", *toy, flag)
    assert not torch.equal(usual.images, other.images)
    if flag == "--raw-init":  # the images are pixels already
        assert other.mean.tolist() == [0, 0, 0] and other.std.tolist() == [1, 1, 1]
        assert (other.images - other.pixels()).abs().mean() < 0.05
        torch.testing.assert_close(usual.pixels(), other.pixels(), rtol=0, atol=0.2)


def test_members_train_on_pool_batch_images(toy, tmp_path, monkeypatch):
    sizes, chosen, train_step = [], set(), Member.train_step

    def spy(self, x, y):
        assert not x.requires_grad and len(x) == len(y)
        sizes.append(len(x))
        chosen.update(x[:, 0, 16, 16].tolist())
        train_step(self, x, y)

    monkeypatch.setattr(Member, "train_step", spy)
    distil(tmp_path / "all", *toy)
    assert {*sizes} == {20}
    sizes.clear()
    chosen.clear()
    distil(tmp_path / "part", *toy, "--pool-batch", "5", "--outer-lr", "1e-12")
    assert {*sizes} == {5} and len(chosen) > 5  # drawn anew for each step


def test_updates_of_one_batch_share_the_features_of_the_real_images(toy, tmp_path, monkeypatch):
    outer_loss, calls = distill.outer_loss, []

    def spy(member, x_real, y_real, x_syn, y_syn, args, fallbacks=None, f_real=None):
        loss = outer_loss(member, x_real, y_real, x_syn, y_syn, args, fallbacks, f_real)
        if f_real is not None:
            again = outer_loss(member, x_real, y_real, x_syn, y_syn, args)
            assert torch.equal(loss, again)
            calls.append((id(member), x_real.sum().item(), x_syn.detach().clone()))
        return loss

    monkeypatch.setattr(distill, "STEP", distill.STEP._replace(loss=spy))
    _, log = distil(tmp_path, *toy, "--updates-per-batch", "3", "--outer-lr", "0.02")
    groups = [calls[k : k + 3] for k in range(0, len(calls), 3)]
    assert len(groups) == len(log) == 4
    for group in groups:
        assert len({call[:2] for call in group}) == 1
        assert not torch.equal(group[0][2], group[1][2])
    assert len({group[0][1] for group in groups}) == 4
    # Each update takes a step of the linear schedule: 12 of them in 4 outer steps.
    rates = [line["lr"] for line in log]
    assert rates == pytest.approx([0.02 * (1 - k / 12 * (1 - 1e-3)) for k in (2, 5, 8, 11)])


def test_averaged_steps_returns_the_mean_of_the_last_sets(toy, tmp_path, monkeypatch):
    sets, update_picture = [], method.update_picture

    def spy(run, args, step, to_set):
        sets.append(to_set())
        update_picture(run, args, step, to_set)

    monkeypatch.setattr(method, "update_picture", spy)
    toy = [*toy, "--outer-steps", "6", "--outer-lr", "0.1"]
    learned, _ = distil(tmp_path, *toy, "--averaged-steps", "4")
    images = torch.stack([each.images for each in sets])
    targets = torch.stack([each.targets for each in sets])
    assert len(images) == 6 and (images[-1] - images[2]).abs().max() > 0.05
    torch.testing.assert_close(learned.images, images[2:].mean(0))
    torch.testing.assert_close(learned.targets, targets[2:].mean(0))
    assert learned.meta["deviations"]["distill.averaged_steps"] == [4, 0]


def test_source_images_limits_the_run_to_a_subset(toy, roots, tmp_path, monkeypatch):
    """Check that features of images outside the subset are not used: they are NaN here."""
    source = load_images("digits", "train", 32, roots[1])
    used = used_subset(source, 100, 0)
    assert torch.equal(used[:20], random_subset(source, 20, 0)) and len(used.unique()) == 100
    features_of = NetworkTarget.features_of

    def spoiled(self, images):
        features = torch.full((len(images), self.feature_dim), float("nan"))
        features[used] = features_of(self, images)[used]
        return features

    monkeypatch.setattr(NetworkTarget, "features_of", spoiled)
    learned, log = distil(tmp_path, *toy, "--source-images", "100")
    assert learned.images.isfinite().all() and len(log) == 4
    assert {*learned.meta["initial"]} <= {*used.tolist()}
    assert learned.meta["deviations"]["distill.source_images"] == [100, 0]
    losses = [name for name in learned.meta if name.startswith("outer_loss")]
    assert len(losses) == 4 and all(learned.meta[name] > 0 for name in losses)
    parts = measured_subsets(source, used, 64)
    assert {*parts["source images"].tolist()} <= {*used.tolist()}
    assert not {*parts["other images"].tolist()} & {*used.tolist()}
    assert [len(part.unique()) for part in parts.values()] == [64, 64]
    with pytest.raises(UserError, match="digits has only 1437 images"):
        distil(tmp_path / "more", *toy, "--source-images", "2000")
    with pytest.raises(UserError, match="fewer than --num-images 20"):
        distil(tmp_path / "fewer", *toy, "--source-images", "19")
    for flags in (("--source-images", "100"), ("--updates-per-batch", "2")):
        with pytest.raises(UserError, match="--reference excludes --source-images and --updates"):
            distil(tmp_path / "slow", *toy, *flags, "--reference")


def test_all_source_images_leave_no_others(data_root):
    source = load_images("digits", "train", 32, data_root)
    used = used_subset(source, 0, 3)
    assert torch.equal(used, torch.arange(len(source)))
    parts = measured_subsets(source, used, 64)
    assert [*parts] == ["source images"]
    assert torch.equal(parts["source images"], measurement_subset(source, 64))


def test_random_targets_are_standard_normal_and_recorded(toy, tmp_path):
    flags = ["--random-targets", "--name", "variant", "--outer-lr", "1e-12"]
    distill.main(["--source", "digits", "--run-root", str(tmp_path), *toy, *flags])
    d = load_distilled(tmp_path / "digits" / "variant" / "seed0" / "distilled.pt")
    assert (
        abs(d.targets.mean()) < 0.1 and abs(d.targets.std() - 1) < 0.1
    )  # N(0, 1), not positive features
    assert d.meta["method"] == "variant" and d.meta["deviations"]["distill.random_targets"] == [
        True,
        False,
    ]
    assert d.meta["deviations"]["distill.outer_steps"] == [4, 300] and d.meta["deviations"][
        "target.epochs"
    ] == [1, 30]


def test_random_images_start_from_noise(toy, tmp_path):
    flags = ["--random-images", "--name", "noise", "--outer-lr", "1e-12"]
    words = ["--source", "digits", "--run-root", str(tmp_path), *toy]
    distill.main([*words, *flags])
    distill.main([*words, "--outer-lr", "1e-12"])
    noise, usual = (
        load_distilled(tmp_path / "digits" / name / "seed0" / "distilled.pt")
        for name in ("noise", "krr_st")
    )
    assert 0.5 < noise.images.std() < 1.5
    torch.testing.assert_close(noise.targets, usual.targets)  # features of real images
    assert noise.meta["initial"] is None and "distance_from_initial" not in noise.meta
    assert usual.meta["initial"] is not None


def test_noise_uses_only_the_images_that_it_may_use(data_root):
    source, used = load_images("digits", "train", 32, data_root), torch.tensor([5, 70, 900])
    noise = gaussian_images(source, used, 20, torch.Generator().manual_seed(0)).flatten(1)
    x = source.normalised(used, torch.device("cpu")).flatten(1)
    basis = torch.linalg.qr((x - x.mean(0)).T[:, :2]).Q  # three deviations have rank 2
    apart = noise - x.mean(0)
    torch.testing.assert_close(apart @ basis @ basis.T, apart, rtol=1e-3, atol=1e-3)
    assert apart.norm() > 1


@pytest.mark.long
def test_noise_has_the_mean_and_covariance_of_the_source(data_root):
    source = load_images("digits", "train", 32, data_root)
    x = source.normalised(torch.arange(len(source)), torch.device("cpu")).flatten(1).double()
    used, generator = torch.arange(len(source)), torch.Generator().manual_seed(0)
    noise = gaussian_images(source, used, 4000, generator).flatten(1).double()
    mean, covariance = x.mean(0), torch.cov(x.T, correction=0)
    assert (noise.mean(0) - mean).square().sum() < 0.01 * covariance.trace()
    _, directions = torch.linalg.eigh(covariance)
    expected = directions[:, -20:].T @ covariance @ directions[:, -20:]
    found = directions[:, -20:].T @ torch.cov(noise.T) @ directions[:, -20:]
    torch.testing.assert_close(found.diagonal(), expected.diagonal(), rtol=0.1, atol=0)
    assert (found - expected).abs().max() < 0.1 * expected.max()
    nearest = torch.cdist(noise[:100], x).min(1).values
    own = torch.cdist(x[:100], x).topk(2, largest=False).values[:, 1]
    assert nearest.min() > own.median()  # no copy of a real image


def test_names_must_be_plain_words(toy, tmp_path):
    for name in ("target", "../x"):
        with pytest.raises(UserError, match="plain word"):
            distill.main(["--source", "digits", "--run-root", str(tmp_path), *toy, "--name", name])


def test_seed_determines_the_set(toy, tmp_path):
    first, _ = distil(tmp_path / "a", *toy)
    again, _ = distil(tmp_path / "b", *toy)
    assert torch.equal(first.images, again.images)
    distill.main(["--source", "digits", "--run-root", str(tmp_path / "a"), *toy, "--seed", "1"])
    other = load_distilled(tmp_path / "a" / "digits" / "krr_st" / "seed1" / "distilled.pt")
    assert not torch.equal(first.images, other.images)


def test_balanced_subset_has_the_same_number_per_class(data_root):
    source = load_images("digits", "train", 32, data_root)
    assert source.labels[balanced_subset(source, 30, 0)].bincount().tolist() == [3] * 10
    with pytest.raises(UserError, match="multiple"):
        balanced_subset(source, 31, 0)
