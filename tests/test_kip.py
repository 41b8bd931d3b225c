"""KIP: kernels against wide networks and arc-cosine formulas, the objective, and the command."""

import json
import math
from argparse import Namespace

import pytest
import torch
from torch.nn import functional as F

from data.distilled import load_distilled
from data.images import load_images
from data.subsets import balanced_subset
from distillers import __main__ as distillers
from distillers import kip, ntk
from tests.conftest import make_stopping_steps, run_command
from utils import cli, run

TOY = [
    "--source",
    "digits",
    "--num-images",
    "20",
    "--outer-steps",
    "5",
    "--outer-batch",
    "60",
    "--log-every",
    "1",
]
CONV = ["--kernel", "conv", "--depth", "1", "--num-images", "10", "--outer-batch", "20"]


def make_images(seed, n, size=5):
    return torch.randn(
        n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def estimate_kernel(name, x, y, depth, width, inits):
    """Sum df(x)/dw df(y)/dw over the parameters; average over `inits` networks of finite width."""
    total = 0
    for seed in range(inits):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, g=g):
            return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

        size, c_in, parameters = x.shape[-1], 3, []
        for _ in range(depth):
            fan_in = (
                (9 * c_in,) if name == "conv" else (c_in * size**2 if not parameters else width,)
            )
            parameters += [draw(width, *fan_in), draw(width)]
            c_in = width
        parameters += [draw(1, width * size**2 if name == "conv" else width), draw(1)]

        def rows(images, parameters=parameters, size=size):
            jacobian = []
            for image in images:
                a = image[None] if name == "conv" else image.reshape(1, -1)
                for i, (w, b) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
                    last = i == depth
                    scale = math.sqrt(2 / w.shape[1])
                    if name == "conv" and not last:
                        a = F.conv2d(a, scale * w.reshape(width, -1, 3, 3), 0.1 * b, padding=1)
                    else:
                        a = F.linear(a.flatten(1), scale * w, 0.1 * b)
                    a = a if last else a.relu()
                gradients = torch.autograd.grad(a.sum(), parameters)
                jacobian.append(torch.cat([each.flatten() for each in gradients]))
            return torch.stack(jacobian)

        total = total + rows(x) @ rows(y).T
    return total / inits


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [("fc", 1, 2000), ("fc", 3, 500), ("conv", 1, 500), ("conv", 3, 200)],
)
def test_kernel_is_the_limit_of_a_wide_network(name, depth, width, inits=16):
    x, y = make_images(0, 3, 4), make_images(1, 2, 4)
    y[0] = x[0] + 0.1 * y[0]  # a close pair
    wide, ours = estimate_kernel(name, x, y, depth, width, inits), ntk.KERNELS[name](x, y, depth)
    error = (ours - wide).abs().max()
    assert error < 8 * ours.max() / math.sqrt(width * inits)
    others = [
        ntk.KERNELS[kind](x, y, d)
        for kind in ntk.KERNELS
        for d in (1, 2, 3)
        if (kind, d) != (name, depth)
    ]
    assert all((other - wide).abs().max() > 2 * error for other in others)


def test_fc_kernel_equals_the_arc_cosine_formulas():
    x, y, depth = make_images(0, 3), make_images(1, 2), 2

    def arc(
        a,
        b,
        c,
        # E relu(u) relu(v), E relu'(u) relu'(v) of normal (u, v), variances a, b, covariance c
    ):
        angle = math.acos(c / math.sqrt(a * b))
        cosine = math.cos(angle)
        value = math.sqrt(a * b) * (math.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
        return value, (math.pi - angle) / (2 * math.pi)

    for i in range(3):
        for j in range(2):
            a, b, c = (
                2 * (u * v).sum().item() / 75 + 0.01
                for u, v in ((x[i],) * 2, (y[j],) * 2, (x[i], y[j]))
            )
            theta = c
            for _ in range(depth):
                value, slope = arc(a, b, c)
                a, b, c = (2 * each + 0.01 for each in (a / 2, b / 2, value))
                theta = c + theta * 2 * slope
            assert ntk.fc(x, y, depth)[i, j].item() == pytest.approx(theta, rel=1e-12)


def test_conv_kernel_equals_loops_over_pairs_of_pixels():
    """Compare for one and two layers, with all offsets between pixels."""
    x, y, size = make_images(2, 1, 3), make_images(3, 1, 3), 3
    places = [(r, c) for r in range(size) for c in range(size)]
    shifts = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]

    def window(k):
        def at(p, q):
            return (
                sum(k.get(((p[0] + r, p[1] + c), (q[0] + r, q[1] + c)), 0.0) for r, c in shifts) / 9
            )

        return {(p, q): at(p, q) for p in places for q in places}

    def start(a, b):
        return {
            (p, q): (a[0, :, p[0], p[1]] * b[0, :, q[0], q[1]]).sum().item() / 3
            for p in places
            for q in places
        }

    for depth in (1, 2):
        k = {"xx": start(x, x), "yy": start(y, y), "xy": start(x, y)}
        theta = dict.fromkeys(k["xy"], 0.0)
        for _ in range(depth):
            s = {
                key: {pair: 2 * v + 0.01 for pair, v in window(value).items()}
                for key, value in k.items()
            }
            theta = {pair: s["xy"][pair] + 2 * v for pair, v in window(theta).items()}
            slopes = {}
            for key, (a, b) in {"xx": ("xx", "xx"), "yy": ("yy", "yy"), "xy": ("xx", "yy")}.items():
                k[key] = {}
                for p, q in s[key]:
                    norm = math.sqrt(s[a][p, p] * s[b][q, q])
                    angle = math.acos(max(-1.0, min(1.0, s[key][p, q] / norm)))
                    slopes[p, q] = (math.pi - angle) / (2 * math.pi)  # the kernel between x and y
                    k[key][p, q] = norm * (
                        math.sin(angle) / (2 * math.pi) + slopes[p, q] * math.cos(angle)
                    )
            theta = {pair: theta[pair] * slopes[pair] for pair in theta}
        expected = 2 * sum(k["xy"][p, p] + theta[p, p] for p in places) / 9 + 0.01
        assert ntk.conv(x, y, depth).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["fc", "conv"])
def test_kernel_is_symmetric_and_positive_definite(name):
    x = make_images(0, 12)
    k = ntk.kernel(name, x, x, 3)
    torch.testing.assert_close(k, k.T, rtol=1e-12, atol=0)
    assert torch.linalg.eigvalsh(k).min() > 1e-3
    torch.testing.assert_close(
        k.diagonal(), torch.stack([ntk.kernel(name, e[None], e[None], 3)[0, 0] for e in x])
    )


@pytest.mark.parametrize("name", ["fc", "conv"])
def test_chunks_change_neither_values_nor_gradients(name):
    x, results = make_images(0, 7), []
    for chunk in (1, 3 * 25 * 2, 10**9):
        y = make_images(1, 3).requires_grad_()
        k = ntk.kernel(name, x, y, 2, chunk)
        (k * torch.arange(21.0).reshape(7, 3)).sum().backward()
        assert k.shape == (7, 3)
        results.append((k.detach(), y.grad))
    for k, gradient in results[1:]:
        torch.testing.assert_close(k, results[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-10, atol=1e-12)


def compute_objective(name, x_real, y_real, x, y, ridge, depth, trace):
    """Compute the objective from the kernel, with the trace of the ridge held constant."""
    k = ntk.KERNELS[name]
    damped = k(x, x, depth) + ridge * trace / len(x) * torch.eye(len(x), dtype=torch.float64)
    return 0.5 * (y_real - k(x_real, x, depth) @ torch.linalg.inv(damped) @ y).square().mean()


@pytest.mark.parametrize(("name", "depth"), [("fc", 3), ("conv", 2)])
def test_objective_and_gradient_equal_the_formula(name, depth):
    """Compare with central differences. One image of each set has an area of constant colour."""
    x_real, x = make_images(0, 6), make_images(1, 4)
    x_real[0, :, :3], x[0, :, :3] = 0.3, 0.3
    labels = torch.eye(3, dtype=torch.float64)
    y_real, y = labels[[0, 1, 2, 0, 1, 2]], labels[[0, 1, 2, 0]] - 1 / 3
    trace, ridge = ntk.KERNELS[name](x, x, depth).trace(), 1e-2
    x.requires_grad_(), y.requires_grad_()
    args = Namespace(kernel=name, depth=depth, ridge=ridge)
    loss = kip.objective(x_real.float(), y_real.float(), x, y, args)
    loss.backward()
    x_real = x_real.float().double()
    torch.testing.assert_close(
        loss, compute_objective(name, x_real, y_real, x, y, ridge, depth, trace), rtol=1e-10, atol=0
    )
    for tensor, other in ((x, y), (y, x)):
        for seed in range(4):
            direction = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            if tensor is x:
                direction[0, :, :3] = 0  # no derivative at 0
            h, ends = 1e-5, []
            for sign in (1, -1):
                moved = (tensor + sign * h * direction).detach()
                pair = (moved, other.detach()) if tensor is x else (other.detach(), moved)
                ends.append(compute_objective(name, x_real, y_real, *pair, ridge, depth, trace))
            numeric = (ends[0] - ends[1]) / (2 * h)
            torch.testing.assert_close(
                (tensor.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-9
            )


def test_gradient_is_finite_where_images_are_equal_or_opposite():
    x = make_images(0, 2).requires_grad_()
    k = ntk.kernel("conv", torch.cat([x.detach(), -x.detach(), torch.zeros_like(x)]), x, 3)
    (k.sum() + ntk.kernel("conv", x, x, 3).sum()).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 100


def run_method(root, *flags, seed=0):
    """Run the method in this process; return the set and its log."""
    distillers.main(["kip", "--run-root", str(root), *TOY, *flags, "--seed", str(seed)])
    folder = root / "digits" / "kip" / f"seed{seed}"
    return load_distilled(folder / "distilled.pt"), [
        json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def data(data_root):
    return ["--data-root", str(data_root)]


def test_command_writes_balanced_images_with_their_labels(data_root, data, tmp_path):
    run_command("-m", "distillers", "kip", "--run-root", tmp_path, *TOY, *CONV, *data)
    d = load_distilled(tmp_path / "digits" / "kip" / "seed0" / "distilled.pt")
    assert (
        d.target_kind == "soft"
        and d.images.shape == (10, 3, 32, 32)
        and d.images.dtype == torch.float32
    )
    torch.testing.assert_close(d.targets, torch.eye(10) - 0.1)
    source = load_images("digits", "train", 32, data_root)
    start = source.normalised(balanced_subset(source, 10, 0), "cpu")
    assert 0 < (d.images - start).abs().max() < 0.5  # five steps of at most about 0.04


def test_objective_decreases_on_digits(data, tmp_path):
    d, log = run_method(tmp_path, *data, "--outer-steps", "30", "--outer-batch", "300")
    assert d.meta["objective_distilled"] < 0.7 * d.meta["objective_initial"]
    assert len(log) == 30


def test_learned_labels_change_and_lower_the_objective(data, tmp_path):
    plain, _ = run_method(tmp_path / "a", *data, "--outer-steps", "20")
    learned, _ = run_method(tmp_path / "b", *data, "--outer-steps", "20", "--learn-labels")
    fixed = torch.eye(10)[torch.arange(10).repeat_interleave(2)] - 0.1
    assert torch.allclose(plain.targets, fixed) and (learned.targets - fixed).abs().max() > 0.05
    assert not learned.targets.requires_grad


def test_seed_determines_the_set(data, tmp_path):
    first, _ = run_method(tmp_path / "a", *data)
    again, _ = run_method(tmp_path / "b", *data)
    other, _ = run_method(tmp_path / "a", *data, seed=1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)


def test_stopped_run_resumes_to_the_same_set(data, tmp_path, monkeypatch):
    whole, log = run_method(tmp_path / "whole", *data, "--learn-labels")
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        patch.setattr(run.Run, "steps", make_stopping_steps([("distil", 2)]))
        run_method(tmp_path / "parts", *data, "--learn-labels")
    parts, log_of_parts = run_method(tmp_path / "parts", *data, "--learn-labels")
    assert torch.equal(parts.images, whole.images) and torch.equal(parts.targets, whole.targets)
    assert [line["loss"] for line in log_of_parts] == [line["loss"] for line in log]


def test_batches_are_balanced_or_all_images(data_root):
    source = load_images("digits", "train", 32, data_root)
    g = torch.Generator().manual_seed(0)
    counts = [
        source.labels[kip.balanced_batch(source, size, g)].bincount().tolist()
        for size in (3, 60, 1430)
    ]
    least = int(source.labels.bincount().min())
    assert counts == [[1] * 10, [6] * 10, [least] * 10] and least < 143
    assert torch.equal(kip.balanced_batch(source, 5000, g), torch.arange(len(source)))
    assert not torch.equal(kip.balanced_batch(source, 60, g), kip.balanced_batch(source, 60, g))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--kernel", "nngp"], "--kernel nngp: choose one of fc, conv"),
        (["--depth", "0"], "--depth"),
        (["--num-images", "15"], "not a multiple"),
    ],
)
def test_bad_flags_are_errors(capsys, data, tmp_path, flags, word):
    with pytest.raises(SystemExit) as stop:
        cli.run(distillers.main, ["kip", *TOY, *data, "--run-root", str(tmp_path), *flags])
    assert stop.value.code == 2 and word in capsys.readouterr().err
