"""The experiment on Theorem 1: gradients against central differences, statistics, and a run."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from experiments import bias
from models import barlow_twins
from tests.conftest import run_command

UNIFORM = torch.full((1, bias.OUTCOMES), 1 / bias.OUTCOMES, dtype=torch.float64)


@pytest.fixture(scope="module")
def setup():
    generator = torch.Generator().manual_seed(0)
    x_syn, x_real = bias.draw_images(generator)
    return x_syn, x_real, *bias.make_problems(x_syn, x_real, generator)


def list_problems(setup):
    _, _, ssl, krr, _ = setup
    return ssl | {"MSE": krr}


@pytest.mark.parametrize("name", ["Barlow Twins", "SimCLR", "masking", "MSE"])
def test_meta_gradient_agrees_with_central_differences(setup, name):
    """Compare under unequal weights of the outcomes."""
    x, problem, h = setup[0], list_problems(setup)[name], 1e-4
    weights = torch.tensor([[3.0, 1, 0, 2, 1, 1]], dtype=torch.float64) / 8
    theta = bias.minimise(problem, weights, x)
    v, a = bias.implicit_gradient(problem, theta, weights, x)
    for seed in range(2):
        direction = torch.randn(
            x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        up, down = (
            problem.outer(bias.minimise(problem, weights, x + s * h * direction, theta[0])[0])
            for s in (1, -1)
        )
        torch.testing.assert_close(
            (v[0] @ a[0] * direction.flatten()).sum(), (up - down) / (2 * h), rtol=1e-4, atol=1e-8
        )


@pytest.mark.parametrize("name", ["Barlow Twins", "SimCLR", "masking", "MSE"])
def test_minimiser_is_a_local_minimum(setup, name):
    """Check that the gradient is below 1e-10 and that nearby points have a higher loss."""
    x, problem = setup[0], list_problems(setup)[name]
    theta = bias.minimise(problem, UNIFORM, x)[0].requires_grad_()
    loss = problem.inner(theta, UNIFORM[0], x)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() < 1e-10
    noise = torch.randn(
        20, len(theta), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert all(problem.inner(theta + 1e-3 * each, UNIFORM[0], x) > loss for each in noise)


def test_mse_gradient_equals_that_of_the_closed_form(setup):
    """Compare the meta-gradient of the MSE problem with that of the closed form.

    Both hold the trace that scales the ridge constant.
    """
    x, _, _, krr, closed = setup
    v, a = bias.implicit_gradient(krr, bias.minimise(krr, UNIFORM, x), UNIFORM, x)
    images = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(closed(images).mean(), images)
    torch.testing.assert_close(v[0] @ a[0], expected.flatten(), rtol=1e-6, atol=1e-10)


def test_losses_equal_their_formulas(setup):
    generator = torch.Generator().manual_seed(1)
    z1, z2 = (torch.randn(8, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        bias.barlow_twins_loss(z1, z2), barlow_twins.barlow_twins_loss(z1, z2, bias.OFF_DIAGONAL)
    )
    z = torch.cat([z1, z2])
    z = z / (1 + z.norm(dim=1, keepdim=True) ** 2).sqrt()
    terms = []
    for i in range(16):
        j = (i + 8) % 16
        others = sum(math.exp(z[i] @ z[k] / bias.TEMPERATURE) for k in range(16) if k != i)
        terms.append(-math.log(math.exp(z[i] @ z[j] / bias.TEMPERATURE) / others))
    assert bias.simclr_loss(z1, z2).item() == pytest.approx(sum(terms) / 16, rel=1e-12)
    x = setup[0]
    theta = torch.randn(256, generator=generator, dtype=torch.float64)
    left_half = x.view(8, 4, 4).clone()
    left_half[:, :, 2:] = 0  # quarters 1 and 3, the second and fourth of 2 x 2, are hidden
    error = (left_half.flatten(1) @ theta.view(16, 16) - x).view(8, 4, 4)[:, :, 2:]
    hidden = [pair for pair in range(6) if bias.make_masks()[pair].view(4, 4)[:, 2:].sum() == 0]
    assert len(hidden) == 1
    torch.testing.assert_close(bias.masking_losses(theta, x)[hidden[0]], error.square().mean())


def test_shifts_move_by_one_pixel():
    x = torch.arange(1.0, 17).double().view(4, 4)
    moved = (x.view(1, 16) @ bias.make_shifts()).view(4, 4, 4)
    zero = torch.zeros(4, dtype=torch.float64)
    expected = {"up": torch.cat([x[1:], zero[None]]), "down": torch.cat([zero[None], x[:-1]])}
    expected |= {
        "left": torch.cat([x[:, 1:], zero[:, None]], 1),
        "right": torch.cat([zero[:, None], x[:, :-1]], 1),
    }
    assert all(any(torch.equal(each, there) for there in moved) for each in expected.values())


def test_multisets_enumerate_all_draws():
    for r in (1, 2, 4):
        counts, probability = bias.list_multisets(r)
        assert (
            probability.sum().item() == pytest.approx(1, abs=1e-12) and (counts.sum(1) == r).all()
        )
        torch.testing.assert_close(
            probability @ counts, torch.full((6,), r / 6, dtype=torch.float64)
        )
    counts, probability = bias.list_multisets(2)
    double = (counts == 2).any(1)
    assert probability[double].tolist() == pytest.approx([1 / 36] * 6) and len(counts) == 21


def test_terms_of_the_proof_sum_to_the_bias():
    """Check the decomposition for dependent random v and A."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64) + v[:, :, None]
    v_true, a_true = torch.ones(3, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64)
    g = torch.einsum("np,npq->nq", v, a)
    parts = bias.split_bias(v.mean(0), a.mean(0), g.mean(0), v_true, a_true)
    torch.testing.assert_close(sum(parts.values()), g.mean(0) - v_true @ a_true)
    covariance = (
        torch.stack(
            [
                torch.cov(torch.stack([v[:, k], a[:, k, j]]), correction=0)[0, 1]
                for k in range(3)
                for j in range(5)
            ]
        )
        .view(3, 5)
        .sum(0)
    )
    torch.testing.assert_close(parts["covariance"], covariance)


def summarise_sample(shift, seed, draws=200, q=30):
    noise = torch.randn(
        draws, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    truth = torch.ones(q, dtype=torch.float64)
    g = truth + shift + noise
    groups = g.view(bias.GROUPS, -1, q).sum(1)
    squares = (g - truth).square().sum()
    return bias.summarise(
        groups, draws // bias.GROUPS, squares, truth, torch.Generator().manual_seed(0)
    )


def test_intervals_and_p_values_have_their_nominal_level():
    """Check the level of intervals and p-values on 200 unbiased samples.

    About 5 % are outside the 95 % interval, and about 5 % have p < 0.05. The mean of the unbiased
    estimate of the squared norm is 0. The bounds are four standard deviations.
    """
    rows = [summarise_sample(0.0, seed) for seed in range(200)]
    assert sum(abs(row["along"]) > row["along_half"] for row in rows) <= 22
    assert 0 < sum(row["p"] < 0.05 for row in rows) <= 22
    squares = torch.tensor([math.copysign(row["norm"] ** 2, row["norm"]) for row in rows])
    assert abs(squares.mean()) < 4 * squares.std() / math.sqrt(200)


def test_known_bias_is_detected_and_measured():
    shift = torch.zeros(30, dtype=torch.float64)
    shift[3] = 1.0
    row = summarise_sample(shift, 0)
    assert row["p"] < 0.001 and row["norm"] == pytest.approx(1 / math.sqrt(30), rel=0.25)
    assert row["along"] == pytest.approx(1 / 30, abs=3 * row["along_half"])
    assert row["sd"] == pytest.approx(
        1, rel=0.1
    )  # 30 coordinates of variance 1, over the norm of 30 ones


def test_zero_difference_is_no_bias():
    truth = torch.ones(5, dtype=torch.float64)
    groups = (4 * (truth + 1e-15)).expand(bias.GROUPS, 5)
    row = bias.summarise(
        groups, 4, torch.tensor(0.0).double(), truth, torch.Generator().manual_seed(0)
    )
    assert row["p"] == 1 and row["sd"] == 0 and abs(row["along"]) < 1e-12


@pytest.mark.long
def test_fast_run_confirms_the_theorem(tmp_path):
    """Check each row: bias for the self-supervised inner problems only, and the proof's terms.

    The sampled bias must agree with the exact one.
    """
    out = run_command("-m", "experiments.bias", "--fast", "--out", tmp_path).stdout
    rows = [json.loads(line) for line in (tmp_path / "bias.jsonl").read_text().splitlines()]
    assert (tmp_path / "bias.png").stat().st_size > 10_000
    assert len(rows) == 2 * 8 and out.count("\n| ") == len(rows)
    for row in rows:
        ssl = row["gradient"] == "bilevel" and not row["loss"].startswith("MSE")
        assert row["biased"] == ssl, row
        if ssl:
            assert abs(row["along"]) > row["along_half"] and row["left_over"] < 1e-12
            assert row["along"] == pytest.approx(row["exact_along"], abs=2 * row["along_half"])
            assert row["norm"] == pytest.approx(row["exact_norm"], rel=0.15)
            parts = row["dv"] + row["da"] + row["both"] + row["covariance"]
            assert parts == pytest.approx(row["along"], rel=1e-9)
        elif row["gradient"] == "bilevel":
            assert row["sd"] < bias.ROUNDING and abs(row["norm"]) < bias.ROUNDING
        else:
            assert row["sd"] > 0.1 and row["noise"] > 0.01


def test_seed_determines_the_rows():
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    gradients = F.one_hot(torch.arange(6)).double()
    first, again, other = (bias.measure_sampled_row(gradients, 2, 100, each) for each in generator)
    assert first == again and first["along"] != other["along"]
