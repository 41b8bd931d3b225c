"""The naive bilevel method: gradient, objective on fixed draws, and the command."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pretrain
from data import augment
from data.distilled import load_distilled
from data.images import load_images
from distillers import __main__ as distillers
from distillers import ssl_bilevel, unroll
from distillers.method import parse_args
from models import barlow_twins
from tests.conftest import make_stopping_steps
from utils import run
from utils.errors import UserError
from utils.presets import preset
from utils.run import read_log

ARGS = SimpleNamespace(off_diagonal=0.1, inner_lr=0.3, precision="fp32")
VIEWS = SimpleNamespace(crop_min=0.3, jitter=0.8, greyscale=0.2, solarise=0.2, flip=0.5)
TOY = [
    "--source",
    "digits",
    "--num-images",
    "12",
    "--width",
    "0.03",
    "--projector-dim",
    "16",
    "--inner-steps",
    "2",
    "--inner-batch",
    "8",
    "--outer-batch",
    "32",
    "--outer-steps",
    "4",
    "--log-every",
    "1",
]


def draw_normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def tiny():
    """Return a small network with projector in float64, three batches of views, and real views."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.AvgPool2d(3), nn.Flatten()
    )
    learner = nn.Sequential(network, barlow_twins.projector(8, 4)).double()
    for module in learner.modules():
        if isinstance(module, nn.ReLU):
            module.forward = nn.functional.softplus  # smooth, for central differences
    inner = [(draw_normal(3 * k, 6, 3, 8, 8), draw_normal(3 * k + 1, 6, 3, 8, 8)) for k in range(3)]
    return (
        learner,
        unroll.flatten_parameters(learner),
        inner,
        (draw_normal(20, 9, 3, 8, 8), draw_normal(21, 9, 3, 8, 8)),
    )


def compute_objective(learner, start, inner, outer):
    """Compute the objective with one graph through all steps and Barlow Twins by its formula."""

    def loss(theta, views):
        z = [
            torch.func.functional_call(learner, unroll.unflatten_parameters(theta, learner), (x,))
            for x in views
        ]
        z = [(each - each.mean(0)) / (each.var(0, correction=0) + 1e-5).sqrt() for each in z]
        c = z[0].T @ z[1] / len(z[0])
        weights = torch.full((4, 4), 0.1, dtype=c.dtype).fill_diagonal_(1)
        return (weights * (c - torch.eye(4, dtype=c.dtype)) ** 2).sum() / 4

    theta = start.clone().requires_grad_()
    for views in inner:
        theta = theta - 0.3 * torch.autograd.grad(loss(theta, views), theta, create_graph=True)[0]
    return loss(theta, outer)


def test_gradient_agrees_with_one_graph_and_central_differences(tiny):
    learner, start, inner, outer = tiny
    loss, by_views = ssl_bilevel.meta_gradient(learner, start, inner, outer, ARGS)
    leaves = [[x.clone().requires_grad_() for x in views] for views in inner]
    expected = compute_objective(learner, start, leaves, outer)
    torch.testing.assert_close(loss, expected.detach())
    flat = [x for views in leaves for x in views]
    for ours, theirs in zip(
        [g for each in by_views for g in each], torch.autograd.grad(expected, flat), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    h = 1e-5
    for seed in range(3):
        directions = [
            [draw_normal(100 + 10 * seed + 2 * k + i, *x.shape) for i, x in enumerate(each)]
            for k, each in enumerate(inner)
        ]
        up, down = (
            compute_objective(
                learner,
                start,
                [
                    [x + s * h * d for x, d in zip(*pair, strict=True)]
                    for pair in zip(inner, directions, strict=True)
                ],
                outer,
            ).detach()
            for s in (1, -1)
        )
        product = sum(
            (g * d).sum()
            for pair in zip(by_views, directions, strict=True)
            for g, d in zip(*pair, strict=True)
        )
        torch.testing.assert_close(product, (up - down) / (2 * h), rtol=1e-4, atol=1e-9)


def test_gradient_passes_through_the_views(data_root, roots):
    """Compare with central differences under a fixed draw, on grey and on coloured images.

    The gradient of hue is zero on grey images.
    """
    source = load_images("digits", "train", 32, data_root)
    source = SimpleNamespace(mean=source.mean, std=source.std)
    for images in (
        0.3 + 0.1 * draw_normal(0, 4, 3, 32, 32).clamp(-2, 2),
        0.4 + 0.1 * draw_normal(1, 4, 1, 32, 32).clamp(-2, 2),
    ):
        pixels = images.expand(4, 3, 32, 32)
        x = (
            (pixels - source.mean.double()[:, None, None]) / source.std.double()[:, None, None]
        ).requires_grad_()

        def objective(x):
            views = ssl_bilevel.two_views(x, source, torch.Generator().manual_seed(5), VIEWS)
            return sum((draw_normal(7, *seen.shape) * seen).sum() for seen in views)

        (gradient,) = torch.autograd.grad(objective(x), x)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        if images.shape[1] == 3:  # hue is not differentiable at grey
            direction, h = draw_normal(9, *x.shape), 1e-7
            difference = (objective(x + h * direction) - objective(x - h * direction)).detach() / (
                2 * h
            )
            torch.testing.assert_close(
                (gradient * direction).sum(), difference, rtol=1e-4, atol=1e-4
            )


def test_hue_of_grey_images_has_a_finite_gradient():
    x = (
        torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        .expand(2, 3, 4, 4)
        .clone()
        .requires_grad_()
    )
    turned = augment.shift_hue(x, torch.tensor([0.1, -0.2]))
    torch.testing.assert_close(turned, x)
    turned.sum().backward()
    assert x.grad.isfinite().all()


def test_objective_on_a_fixed_draw_decreases(tiny):
    """Take twenty small steps with the same theta_0 and views."""
    learner, start, inner, outer = copy.deepcopy(tiny)
    losses = []
    for _ in range(20):
        loss, by_views = ssl_bilevel.meta_gradient(learner, start, inner, outer, ARGS)
        losses.append(loss.item())
        inner = [
            tuple(x - 0.3 * g for x, g in zip(*pair, strict=True))
            for pair in zip(inner, by_views, strict=True)
        ]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


@pytest.fixture
def distil(roots, tmp_path):
    def call(*flags, top="runs"):
        distillers.main(
            ["ssl_bilevel", *TOY, *roots[:2], "--run-root", str(tmp_path / top), *flags]
        )
        [artefact] = (tmp_path / top).rglob("distilled.pt")
        return artefact

    return call


def test_command_writes_images_without_targets(distil, data_root, capsys):
    artefact = distil()
    d = load_distilled(artefact)
    assert (
        d.images.shape == (12, 3, 32, 32)
        and d.target_kind == "none"
        and "fresh_noise" not in d.meta
    )
    source = load_images("digits", "train", 32, data_root)
    initial = source.normalised(torch.tensor(d.meta["initial"]), torch.device("cpu"))
    moved = (d.images - initial).abs()
    assert 0 < moved.max() <= 0.02 * 4 * 1.01  # Adam moves a pixel by at most lr per step
    lines = read_log(artefact.parent)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["gradient"] > 0 for line in lines)
    assert json.loads((artefact.parent / "config.json").read_text())["settings"]["inner_steps"] == 2
    assert "loss on real images after training" in capsys.readouterr().out
    with pytest.raises(UserError, match="without targets"):
        pretrain.main(["--distilled", str(artefact), "--width", "0.03"])


@pytest.mark.long
def test_stopped_run_resumes_to_the_same_set_and_the_seed_determines_it(distil, monkeypatch):
    whole = load_distilled(distil())
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", make_stopping_steps([("distil", 1)]))
        distil(top="parts")
    parts, other = (
        load_distilled(distil(top="parts")),
        load_distilled(distil("--seed", "1", top="other")),
    )
    assert torch.equal(parts.images, whole.images)
    assert not torch.equal(other.images, whole.images)
    assert parts.meta["objective_distilled"] == whole.meta["objective_distilled"]


def test_settings_depend_on_the_source():
    for name in ("cifar100", "tinyimagenet", "digits"):
        ours, krr, target = (preset(name, stage) for stage in ("ssl_bilevel", "distill", "target"))
        assert all(ours[key] == krr[key] for key in ("num_images", "arch", "width", "outer_lr"))
        assert all(
            ours[key] == target[key] for key in ("projector_dim", "off_diagonal", *vars(VIEWS))
        )


def test_inner_batch_of_zero_takes_all_images():
    assert parse_args(ssl_bilevel.METHOD, ["--inner-batch", "0"]).inner_batch == 0
