"""FRePo: its objective and LAMB against their formulas (float64), and the command on digits."""

import json
import math

import pytest
import torch

import models
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import balanced_subset
from distillers import __main__ as distillers
from distillers import frepo
from distillers.krr import centred_one_hot
from distillers.pool import Member, Pool
from tests.conftest import make_stopping_steps, run_command
from utils import cli, run
from utils.optim import LAMB, make_schedule

TOY = [
    "--source",
    "digits",
    "--num-images",
    "20",
    "--width",
    "0.125",
    "--outer-steps",
    "6",
    "--outer-batch",
    "64",
    "--pool-size",
    "2",
    "--pool-steps",
    "3",
    "--log-every",
    "1",
]


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Features:
    """A member of the pool whose features are a smooth function of the pixels."""

    def __init__(self):
        self.weight = randn(0, 3 * 16, 30) / 7

    precision = "fp32"

    def embed(self, x, chunk=0):
        return (x.flatten(1) @ self.weight).tanh()


def compute_objective(x_real, y_real, x_syn, y_syn, ridge, trace):
    """Compute both terms by loops over images, and the head as an explicit primal solution.

    `trace` is held constant.
    """
    f, g, m = Features().embed(x_syn), Features().embed(x_real), len(x_syn)
    damping = ridge * trace / m
    head = (
        torch.linalg.inv(f.T @ f + damping * torch.eye(f.shape[1], dtype=torch.float64))
        @ f.T
        @ y_syn
    )
    squares = sum(0.5 * ((g[i] @ head - y_real[i]) ** 2).sum() for i in range(len(g))) / len(g)
    margins = 0
    for y in y_syn:
        first, second = sorted(y, reverse=True)[:2]
        margins = margins + (first - second if first - second < 1 / len(y) else 1 / len(y)) / m
    return squares - margins


def test_objective_and_gradients_equal_the_formula():
    x_real, y_real = randn(1, 7, 3, 4, 4), centred_one_hot(torch.arange(7) % 4, 4).double()
    x, y = randn(2, 5, 3, 4, 4).requires_grad_(), (0.5 * randn(3, 5, 4)).requires_grad_()
    first = y.detach().topk(2).values
    assert 0 < ((first[:, 0] - first[:, 1]) < 1 / 4).sum() < 5  # some labels within the margin
    ridge, f = 1e-2, Features().embed(x.detach())
    trace = (f @ f.T).trace()
    loss = frepo.objective(Features(), x_real, y_real, x, y, ridge)
    loss.backward()
    torch.testing.assert_close(
        loss, compute_objective(x_real, y_real, x, y, ridge, trace), rtol=1e-9, atol=0
    )
    for tensor in (x, y):
        for seed in range(6):
            direction, h, ends = randn(10 + seed, *tensor.shape), 1e-5, []
            for sign in (1, -1):
                moved = (tensor + sign * h * direction).detach()
                pair = (moved, y.detach()) if tensor is x else (x.detach(), moved)
                ends.append(compute_objective(x_real, y_real, *pair, ridge, trace))
            numeric = (ends[0] - ends[1]) / (2 * h)
            torch.testing.assert_close(
                (tensor.grad * direction).sum(), numeric, rtol=1e-6, atol=1e-9
            )


def test_label_margin_changes_only_labels_within_the_margin():
    y = torch.tensor([[0.9, -0.1, -0.1, -0.1], [0.2, 0.1, 0.0, -0.3]], requires_grad=True)
    margin = frepo.label_margin(y)
    assert margin.item() == pytest.approx(-(0.25 + 0.1) / 2)
    margin.backward()
    torch.testing.assert_close(y.grad, torch.tensor([[0.0, 0, 0, 0], [-0.5, 0.5, 0, 0]]))


def test_one_hot_labels_are_centred():
    expected = torch.tensor([[-1.0, -1, 3, -1], [3, -1, -1, -1]]) / 4
    torch.testing.assert_close(centred_one_hot(torch.tensor([2, 0]), 4), expected)


def test_lamb_follows_its_formula_over_three_steps():
    """Compare with Algorithm 2 without weight decay. A tensor of zeros first takes an Adam step."""
    tensors = [
        randn(0, 4, 3).requires_grad_(),
        torch.zeros(5, dtype=torch.float64, requires_grad=True),
    ]
    lamb, lr = LAMB(tensors, lr=0.1), 0.1
    expected = [t.detach().clone() for t in tensors]
    m, v = [torch.zeros_like(t) for t in expected], [torch.zeros_like(t) for t in expected]
    for t in (1, 2, 3):
        for i, tensor in enumerate(tensors):
            g = tensor.grad = randn(10 * t + i, *tensor.shape) * 10**i
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            r = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-6)
            size = math.sqrt((expected[i] ** 2).sum())
            expected[i] = expected[i] - lr * (size / math.sqrt((r**2).sum()) if size else 1) * r
        lamb.step()
        for tensor, value in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor.detach(), value, rtol=1e-12, atol=1e-12)


def test_lamb_does_not_move_without_a_gradient():
    weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    weights[0].grad = torch.zeros(3)
    LAMB(weights, lr=0.1).step()
    assert all(torch.equal(weight.detach(), torch.ones_like(weight)) for weight in weights)


def test_schedule_is_a_cosine_to_a_tenth():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, rates = make_schedule(optimizer, "cosine_to_tenth", 100), {}
    for step in range(101):
        rates[step] = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
    assert (rates[0], rates[50], rates[100]) == pytest.approx((2.0, 1.1, 0.2))


def test_member_takes_an_adam_step_on_half_the_summed_squares():
    torch.manual_seed(0)
    member = Member(
        "convnet3", 32, 4, 0.02, torch.device("cpu"), lr=3e-4, weight_decay=0.0, optimizer="adam"
    )
    x, y = randn(0, 6, 3, 32, 32).float(), randn(1, 6, 4).float()
    network = models.build("convnet3", 32, 4, 0.02)
    network.load_state_dict(member.network.state_dict())
    loss = 0.5 * (network.train()(x) - y).square().sum(1).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    member.train_step(x, y)
    for before, after, gradient in zip(
        network.parameters(), member.network.parameters(), gradients, strict=True
    ):
        large = gradient.abs() > 1e-4  # the first step of Adam is the sign of the gradient
        torch.testing.assert_close(
            (after - before)[large], -3e-4 * gradient.sign()[large], rtol=1e-2, atol=0
        )


def run_method(root, *flags, seed=0):
    """Run the method in this process; return the set and its log."""
    distillers.main(["frepo", "--run-root", str(root), *TOY, *flags, "--seed", str(seed)])
    folder = root / "digits" / "frepo" / f"seed{seed}"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_distilled(folder / "distilled.pt"), log


@pytest.fixture
def data(data_root):
    return ["--data-root", str(data_root)]


def test_command_starts_from_balanced_images_and_scaled_labels(data_root, data, tmp_path):
    run_command(
        "-m", "distillers", "frepo", "--run-root", tmp_path, *TOY, *data, "--outer-lr", "1e-12"
    )
    d = load_distilled(tmp_path / "digits" / "frepo" / "seed0" / "distilled.pt")
    source = load_images("digits", "train", 32, data_root)
    chosen = balanced_subset(source, 20, 0)
    assert d.target_kind == "soft" and d.meta["method"] == "frepo"
    torch.testing.assert_close(d.images, source.normalised(chosen, "cpu"), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        d.targets, torch.eye(10)[source.labels[chosen]] - 0.1
    )  # sqrt(10 / 10) = 1


def test_initial_labels_shrink_with_the_number_of_classes(data, tmp_path, monkeypatch):
    source = load_images("digits", "train", 32, data[1])
    source.classes = [*source.classes, *(f"none{i}" for i in range(30))]
    monkeypatch.setattr("distillers.method.load_images", lambda *a: source)
    monkeypatch.setattr(
        frepo,
        "METHOD",
        frepo.Method(**vars(frepo.METHOD) | dict(choose=lambda *a: torch.arange(20))),
    )
    d, _ = run_method(tmp_path, *data, "--outer-lr", "1e-12")
    torch.testing.assert_close(d.targets, (torch.eye(40)[source.labels[:20]] - 1 / 40) / 2)


def test_objective_decreases_on_digits(data, tmp_path):
    d, log = run_method(
        tmp_path, *data, "--outer-steps", "30", "--outer-lr", "0.03", "--outer-batch", "100"
    )
    assert d.meta["objective_distilled"] < d.meta["objective_initial"] - 0.1
    distil = [line for line in log if line["phase"] == "distil"]
    assert (
        len(distil) == 30
        and distil[0]["lr"] == 0.03
        and distil[-1]["lr"] == pytest.approx(0.003, rel=0.05)
    )
    assert d.images.isfinite().all() and not d.targets.requires_grad


def test_seed_determines_the_set(data, tmp_path):
    first, _ = run_method(tmp_path / "a", *data)
    again, _ = run_method(tmp_path / "b", *data)
    other, _ = run_method(tmp_path / "a", *data, seed=1)
    assert torch.equal(first.images, again.images) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)


def test_members_train_on_at_most_pool_batch_images(data, tmp_path, monkeypatch):
    sizes, step = [], Member.train_step
    monkeypatch.setattr(
        Member, "train_step", lambda self, x, y: (sizes.append((len(x), len(y))), step(self, x, y))
    )
    run_method(tmp_path, *data, "--pool-batch", "8")
    assert len(sizes) > 3 and set(sizes) == {(8, 8)}


def test_stopped_run_resumes_to_the_same_set(data, tmp_path, monkeypatch):
    """Stop once while the pool is initialised and once while the set is learned."""
    flags = [*data, "--pool-batch", "15"]
    whole, log = run_method(tmp_path / "whole", *flags)

    for at in (("initialise pool", 0), ("distil", 3)):
        with monkeypatch.context() as patch, pytest.raises(run.Stopped):
            patch.setattr(run.Run, "steps", make_stopping_steps([at]))
            run_method(tmp_path / "parts", *flags)
    parts, log_of_parts = run_method(tmp_path / "parts", *flags)
    assert torch.equal(parts.images, whole.images) and torch.equal(parts.targets, whole.targets)
    assert [line["loss"] for line in log_of_parts] == [line["loss"] for line in log]


def test_reinitialised_member_has_a_new_adam_state():
    pool = Pool(
        1,
        2,
        torch.Generator().manual_seed(0),
        arch="convnet3",
        image_size=32,
        num_outputs=4,
        width=0.01,
        device=torch.device("cpu"),
        lr=3e-4,
        weight_decay=0.0,
        optimizer="adam",
    )
    [member] = pool.members
    x, y = randn(0, 3, 3, 32, 32).float(), randn(1, 3, 4).float()
    for expected in (1, 2, 0):
        pool.advance(member, x, y)
        assert member.steps == expected and isinstance(member.optimizer, torch.optim.Adam)
    assert not member.optimizer.state


def test_number_of_images_must_be_a_multiple_of_the_classes(capsys, data, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.run(
            distillers.main,
            ["frepo", *TOY, *data, "--run-root", str(tmp_path), "--num-images", "15"],
        )
    assert stop.value.code == 2 and "not a multiple" in capsys.readouterr().err
