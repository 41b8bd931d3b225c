"""The highest-loss images of the digits: errors by loops, seeds, resuming, and bad input."""

import pytest
import torch

import models
from data.distilled import load_distilled
from data.images import load_images
from distillers import __main__ as distillers
from distillers import high_loss
from models.target import load_target
from tests.conftest import make_stopping_steps
from utils import run
from utils.errors import UserError

TOY = ["--num-images", "20", "--width", "0.03", "--experts", "2", "--log-every", "1"]


@pytest.fixture
def select_images(roots, runs, tmp_path):
    """Return a function that runs the command with the toy target and returns the set."""

    def call(*flags, seed=0, top="runs"):
        target = str(runs / "target" / "seed0" / "target.pt")
        places = [*roots[:2], "--run-root", str(tmp_path / top), "--target-network", target]
        distillers.main(
            ["high_loss", "--source", "digits", *places, "--seed", str(seed), *TOY, *flags]
        )
        return load_distilled(
            tmp_path / top / "digits" / "high_loss" / f"seed{seed}" / "distilled.pt"
        )

    return call


@pytest.fixture(scope="module")
def source(data_root):
    return load_images("digits", "train", 32, data_root)


@pytest.fixture(scope="module")
def features(source, runs):
    target = load_target(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu"), "fp32"
    )
    return target.features_of(source)


def compute_errors(k, arch, x, z, lr, momentum, weight_decay, batch_size):
    """Compute the error of each image under expert k after one epoch of SGD: (n,) float64."""
    torch.manual_seed(k)
    network = models.build(arch, 32, z.shape[1], 0.03).train()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(k))
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for index in order.split(batch_size):
        loss = ((network(x[index]) - z[index]) ** 2).sum() / (len(index) * z.shape[1])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for p, v, gradient in zip(network.parameters(), velocity, gradients, strict=True):
                v.mul_(momentum).add_(gradient + weight_decay * p)
                p -= lr * v
    network.eval()
    with torch.no_grad():
        return torch.stack(
            [((network(x[i : i + 1])[0] - z[i]) ** 2).sum() / z.shape[1] for i in range(len(x))]
        )


@pytest.mark.parametrize(
    ("arch", "seed"), [("dc_convnet3", 0), ("dc_convnet3", 1), ("convnet3", 0)]
)
def test_images_have_the_highest_mean_error_of_the_experts(
    select_images, source, features, arch, seed
):
    x = source.normalised(torch.arange(len(source)), "cpu")
    errors = (
        sum(
            compute_errors(k, arch, x, features, 0.2, 0.8, 1e-2, 300)
            for k in (2 * seed, 2 * seed + 1)
        )
        / 2
    )
    flags = ["--expert-lr", "0.2", "--expert-momentum", "0.8", "--expert-weight-decay", "1e-2"]
    d = select_images("--arch", arch, "--expert-batch", "300", *flags, seed=seed)
    index = torch.tensor(d.meta["initial"])
    assert len(set(index.tolist())) == 20
    found, expected = errors[index], errors.sort(descending=True).values[:20]
    torch.testing.assert_close(
        found, expected, rtol=1e-3, atol=1e-4
    )  # equal up to ties by rounding
    assert found.min() > errors.mean()
    assert d.target_kind == "feature" and torch.equal(d.targets, features[index])
    torch.testing.assert_close(d.images, x[index], rtol=0, atol=0)
    assert d.meta["method"] == "high_loss" and d.meta["distance_from_initial"] == 0


def test_hardest_images_are_sorted_with_the_first_of_ties():
    assert high_loss.select_hardest(torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0]), 3).tolist() == [
        1,
        3,
        2,
    ]


@pytest.mark.long
def test_seed_determines_the_images(select_images):
    first, again, other = (
        select_images(seed=seed, top=top) for seed, top in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert (
        torch.equal(first.images, again.images) and first.meta["initial"] != other.meta["initial"]
    )


def test_stopped_run_resumes_to_the_same_set(select_images, monkeypatch):
    whole = select_images("--expert-batch", "300", top="whole")  # 5 steps per epoch
    with monkeypatch.context() as patch:
        patch.setattr(
            run.Run,
            "steps",
            make_stopping_steps(left := [("experts", 2), ("experts", 4), ("experts", 7)]),
        )
        for _ in range(3):
            with pytest.raises(run.Stopped):
                select_images("--expert-batch", "300", top="parts")
    assert not left
    assert (
        select_images("--expert-batch", "300", top="parts").meta["initial"] == whole.meta["initial"]
    )


def test_more_images_than_the_source_has(select_images, tmp_path):
    with pytest.raises(UserError, match="digits has only"):
        select_images("--num-images", "5000")
    assert not (tmp_path / "runs").exists()


def test_diverging_expert_is_an_error_with_advice(select_images):
    with pytest.raises(
        UserError, match=r"experts, step \d+ of \d+: .*not finite.*lower the learning rate"
    ):
        select_images("--expert-lr", "1e30")


def test_missing_target(roots, tmp_path):
    with pytest.raises(UserError, match=r"make it with: python pretrain_target.py"):
        distillers.main(
            ["high_loss", "--source", "digits", *roots[:2], "--run-root", str(tmp_path)]
        )
