"""Measure the bias of the gradient through a self-supervised inner problem (Theorem 1).

    python -m experiments.bias --out runs/bias       # about 3 minutes on one CPU core
    python -m experiments.bias --fast                # seconds: fewer draws, fewer r

The distilled images X_s are 8 of scikit-learn's digits at 4 x 4 pixels, and the real images X_t are
100 others. The network theta is linear, and all numbers are float64. The augmentation has 6
outcomes xi, so that L(theta; X) = E_xi[l_xi(theta, X)] is a sum:

    Barlow Twins, SimCLR    two different ones of 4 one-pixel shifts are the views of all images
    masked reconstruction   one of the 6 masks that hide two quarters of each image
    MSE                     equation 2 of the paper with a ridge head; independent of xi

theta*(X_s) minimises L(theta; X_s) + mu/2 |theta - theta_0|^2. The second term is the same for all
xi; without it, Barlow Twins and SimCLR have whole surfaces of minimisers. theta^(X_s) minimises the
same with L replaced by the mean of r drawn l_xi. Both are found by Newton's method from theta_0,
theta^ also from theta*, and the lower minimum is used.

The table has three kinds of gradients:

    bilevel      dL(theta^(X_s); X_t)/dX_s, by the implicit function theorem; the true gradient is
                 dL(theta*(X_s); X_t)/dX_s
    ordinary     the gradient with respect to theta at theta_0 of the mean of r drawn losses; an
                 unbiased estimator for any loss
    mini-batch   the outer gradient of KRR-ST on r random real images

A single Barlow Twins loss of a correlation pooled over the r pairs would be biased, because the
loss is not linear in the correlation.

Prints a Markdown table, and writes bias.jsonl and bias.png to --out. All columns except p are in
units of the norm of the true gradient:

    along        bias in the direction of the true gradient, with a 95 % interval. As in the proof,
                 it is split into the shift of the means E[v]E[A] - v*A* and the covariance of
                 v = dL/dtheta and A = dtheta^/dX_s.
    norm         norm of the whole bias without the noise of the draws: an unbiased estimate of its
                 square, and the signed root of this estimate
    exact        along and norm by summation over all possible draws, for small r
    sd           root of the summed variances of one gradient
    p            p-value of the hypothesis that no coordinate is biased, by sign flips of the
                 largest |t| of all coordinates
    biased       whether p is below 5 % / number of rows
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator, ScalarFormatter
from scipy import stats
from sklearn.datasets import load_digits
from torch.func import grad, jacfwd, jacrev, vmap

from distillers.krr import ridge_predict
from utils import cli, files, progress
from utils.plots import COLOURS, INK, MARKERS, label_axis, make_panels, save_figure
from utils.run import package_versions

SIDE, IMAGES, REAL = 4, 8, 100  # pixels of a side, m, n
PIXELS = SIDE * SIDE
OUTPUTS, FEATURES = 3, 32  # d_y, and d_h of the ridge head's random features
OUTCOMES = 6  # number of outcomes xi
OFF_DIAGONAL, TEMPERATURE = 0.1, 0.5  # Barlow Twins, SimCLR
PULL, RIDGE = (
    1.0,
    0.01,
)  # mu of two-view losses (a tenth for masking); ridge of KRR-ST's head, relative to the trace
TOLERANCE = 1e-11  # largest entry of the inner gradient at a minimiser
STEPS, HALVINGS = 200, 40  # most steps of Newton's method and of its line search
CHUNK = 16  # inner problems solved at once; larger ones gain little and take more memory
GROUPS, FLIPS = 50, 9999  # groups of draws for standard errors; sign flips for p
ROUNDING = 1e-9  # differences below this fraction of the true gradient are rounding errors
SIZES, DRAWS = (1, 2, 4, 8, 16, 32), 250  # r; a multiple of GROUPS
ENUMERATED = 126  # most multisets of outcomes to sum over


class Problem(NamedTuple):
    """An inner problem.

    Args:
        losses: `losses(theta, x)` returns l_xi for all xi, (D,), of images x (n, 16).
        outer: `outer(theta)` returns the loss () on X_t.
        start: theta_0 (p,).
        mu: weight of the quadratic penalty on theta - theta_0.
    """

    losses: Callable
    outer: Callable
    start: torch.Tensor
    mu: float

    def inner(self, theta, weights, x):
        """Return the inner loss () with weight weights[xi], (D,), for each outcome xi."""
        return weights @ self.losses(theta, x) + self.mu / 2 * (theta - self.start).square().sum()


def draw_images(generator):
    """Return X_s (m, 16) and X_t (n, 16).

    These are digits averaged over 2 x 2 pixels, centred per pixel and scaled to unit variance.
    """
    x = F.avg_pool2d(torch.tensor(load_digits().images)[:, None], 2).flatten(1)
    x = (x - x.mean(0)) / (x - x.mean(0)).std()
    chosen = torch.randperm(len(x), generator=generator)
    return x[chosen[:IMAGES]], x[chosen[IMAGES : IMAGES + REAL]]


def make_shifts():
    """Return one-pixel shifts with zero padding as matrices: x @ make_shifts() is (4, n, 16)."""
    pixels = F.pad(torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, SIDE, SIDE), [1] * 4)
    corners = ((0, 1), (1, 0), (1, 2), (2, 1))
    return torch.stack(
        [pixels[:, top : top + SIDE, left : left + SIDE].flatten(1) for top, left in corners]
    )


def make_masks():
    """Return a mask for each pair of hidden quarters: (6, 16) of ones and zeros."""
    quarter = (
        torch.arange(4)
        .view(2, 2)
        .repeat_interleave(SIDE // 2, 0)
        .repeat_interleave(SIDE // 2, 1)
        .flatten()
    )
    return torch.stack(
        [((quarter != a) & (quarter != b)).double() for a, b in itertools.combinations(range(4), 2)]
    )


def barlow_twins_loss(z1, z2):
    """Return `barlow_twins.barlow_twins_loss` with operations that vmap can differentiate twice."""
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    off = z1.T @ z2 / len(z1) - torch.eye(OUTPUTS, dtype=z1.dtype)
    on = off.diagonal().square().sum()
    return on + OFF_DIAGONAL * (off.square().sum() - on)


def simclr_loss(z1, z2):
    """Return the SimCLR loss, averaged over the embeddings of both views, (n, d) each.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
    equation 1. Vectors are normalised as z / (1 + |z|^2)^(1/2), which is smooth at 0.
    """
    z = torch.cat([z1, z2])
    z = z / (1 + z.square().sum(1, keepdim=True)).sqrt()
    similar = z @ z.T / TEMPERATURE  # (2n, 2n)
    other = similar.masked_fill(
        torch.eye(len(z), dtype=torch.bool), -math.inf
    )  # excludes the pair with itself
    return (torch.logsumexp(other, 1) - similar.roll(len(z1), 1).diagonal()).mean()


def two_views(loss):
    """Return `losses` for a loss of the embeddings of two views."""
    first, second = torch.tensor([*itertools.combinations(range(4), 2)]).T
    shifted = make_shifts()

    def losses(theta, x):
        z = x @ shifted @ theta.view(PIXELS, OUTPUTS)  # (4, n, d_y)
        return vmap(loss)(z[first], z[second])

    return losses


def masking_losses(theta, x):
    """Return `losses` of masked reconstruction by a linear map: squared error per hidden pixel."""
    seen = make_masks()[:, None]  # (6, 1, 16)
    error = (x * seen) @ theta.view(PIXELS, PIXELS) - x
    return (error * (1 - seen)).square().sum((1, 2)) / (len(x) * PIXELS / 2)


def make_problems(x_syn, x_real, generator):
    """Return the inner problems.

    Returns:
        Dict of name to self-supervised `Problem`; the `Problem` of KRR-ST; a function of X_s that
        returns the outer loss of KRR-ST for each real image, (n,), in closed form.
    """

    def made(losses, start, mu):
        return Problem(losses, lambda theta: losses(theta, x_real).mean(), start, mu)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    encoder = normal(PIXELS * OUTPUTS) / math.sqrt(PIXELS)
    ssl = {
        "Barlow Twins": made(two_views(barlow_twins_loss), encoder, PULL),
        "SimCLR": made(two_views(simclr_loss), encoder, PULL),
        "masking": made(
            masking_losses, torch.zeros(PIXELS * PIXELS, dtype=torch.float64), PULL / 10
        ),
    }
    # As in the paper, g_phi is trained on X_t by Barlow Twins, and Y_s = g_phi(X_s).
    uniform = torch.full((1, OUTCOMES), 1 / OUTCOMES, dtype=torch.float64)
    phi = minimise(ssl["Barlow Twins"], uniform, x_real)[0].view(PIXELS, OUTPUTS)
    y_syn, y_real = x_syn @ phi, x_real @ phi
    weights = normal(PIXELS, FEATURES) / math.sqrt(PIXELS)

    def f(x):
        return torch.tanh(x @ weights)

    def mse(theta, x):
        error = y_syn - f(x) @ theta.view(FEATURES, OUTPUTS)
        return 0.5 * error.square().sum().expand(OUTCOMES)

    def outer(theta):
        return F.mse_loss(f(x_real) @ theta.view(FEATURES, OUTPUTS), y_real)

    head = torch.zeros(FEATURES * OUTPUTS, dtype=torch.float64)
    krr = Problem(mse, outer, head, RIDGE * f(x_syn).square().sum().item())

    def closed(x):
        predicted = ridge_predict(f(x_real), f(x), y_syn, RIDGE, bias=False)
        return (predicted - y_real).square().mean(1)

    return ssl, krr, closed


def minimise(problem, weights, x, start=None):
    """Minimise the inner loss for each row of `weights` (k, D) by Newton's method.

    Absolute values of the curvature are used, so that saddle points repel. Steps are halved until
    the loss decreases.

    Args:
        problem: a `Problem`.
        weights: weights of the outcomes (k, D).
        x: images (n, 16).
        start: initial theta (p,); default: the problem's.

    Returns:
        Minima theta (k, p), to `TOLERANCE`.

    Raises:
        RuntimeError: no convergence in `STEPS` steps.
    """
    loss = vmap(lambda theta, weights: problem.inner(theta, weights, x))
    slope = vmap(grad(lambda theta, weights: problem.inner(theta, weights, x)))
    curvature = vmap(jacrev(grad(lambda theta, weights: problem.inner(theta, weights, x))))
    start = problem.start if start is None else start
    result, active = start.repeat(len(weights), 1), torch.arange(len(weights))
    for _ in range(STEPS):
        theta, w = result[active], weights[active]
        gradient = slope(theta, w)
        far = gradient.abs().amax(1) > TOLERANCE
        if not far.any():
            return result
        theta, w, gradient, active = theta[far], w[far], gradient[far], active[far]
        values, vectors = torch.linalg.eigh(curvature(theta, w))
        along = (vectors.mT @ gradient[:, :, None])[:, :, 0] / values.abs().clamp(
            min=problem.mu / 10
        )
        step = -(vectors @ along[:, :, None])[:, :, 0]
        before, expected = loss(theta, w), (gradient * step).sum(1)
        size = torch.ones_like(before)
        for _ in range(HALVINGS):
            worse = (
                loss(theta + size[:, None] * step, w)
                > before + 1e-4 * size * expected + 1e-14 * before.abs()
            )
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        result[active] = theta + size[:, None] * step
    raise RuntimeError(
        f"{len(active)} of {len(weights)} inner problems did not converge in {STEPS} steps"
    )


def lower_minimum(problem, weights, x, start):
    """Run `minimise` from the problem's start and from `start`; return the lower minimum (k, p)."""
    both = torch.stack(
        [minimise(problem, weights, x, each) for each in (problem.start, start)]
    )  # (2, k, p)
    first, second = (
        vmap(lambda theta, w: problem.inner(theta, w, x))(theta, weights) for theta in both
    )
    return torch.where((second < first)[:, None], both[1], both[0])


def implicit_gradient(problem, theta, weights, x):
    """Return v = dL(theta; X_t)/dtheta (k, p) and A = dtheta/dX_s (k, p, q) at minimisers.

    By the implicit function theorem, A = -H^-1 d^2 l/dtheta dX_s. The meta-gradient is v A.
    `theta` (k, p) are the minimisers for `weights` (k, D).

    Raises:
        torch.linalg.LinAlgError: the Hessian H is not positive definite, so theta is no minimum.
    """

    def parts(theta, weights):
        mixed = jacfwd(grad(problem.inner), argnums=2)(theta, weights, x).flatten(1)  # (p, q)
        return jacrev(grad(problem.inner))(theta, weights, x), mixed, grad(problem.outer)(theta)

    h, mixed, v = vmap(parts)(theta, weights)
    return v, -torch.cholesky_solve(mixed, torch.linalg.cholesky(h))


def sum_over_draws(problem, counts, weights, x, start, truth):
    """Sum v, A, the meta-gradient v A and its squared distance from the truth over draws.

    Args:
        problem: a `Problem`.
        counts: number or probability of each row of `weights` in each group of draws, (G, k).
        weights: distinct draws (k, D).
        x: images (n, 16).
        start: as for `lower_minimum`.
        truth: true gradient (q,).

    Returns:
        Sums for each group: (G, p), (G, p, q), (G, q), (G,).
    """
    total = None
    for w, n in progress.progress_bar(
        [*zip(weights.split(CHUNK), counts.split(CHUNK, 1), strict=True)], desc="inner problems"
    ):
        v, a = implicit_gradient(problem, lower_minimum(problem, w, x, start), w, x)
        g = torch.einsum("kp,kpq->kq", v, a)
        part = (
            n @ v,
            (n @ a.flatten(1)).view(len(n), *a.shape[1:]),
            n @ g,
            n @ (g - truth).square().sum(1),
        )
        total = [sum(each) for each in zip(total, part, strict=True)] if total else part
    return total


def split_bias(v, a, g, v_true, a_true):
    """Split the bias mean(g) - g_true as in the proof.

    Returns the shift of v, of A, of both, and the covariance, (q,) each. v, a and g are means over
    draws.
    """
    dv, da = v - v_true, a - a_true
    return dict(dv=dv @ a_true, da=v_true @ da, both=dv @ da, covariance=g - v @ a)


def jackknife(statistic, groups, *sums):
    """Return `statistic` of the sums over all groups, and half the width of its 95 % interval.

    The interval leaves out one group at a time.
    """
    whole = [each.sum(0) for each in sums]
    value = statistic(groups, *whole)
    left = torch.stack(
        [
            statistic(groups - 1, *(w - each[i] for w, each in zip(whole, sums, strict=True)))
            for i in range(groups)
        ]
    )
    error = ((groups - 1) / groups * (left - left.mean(0)).square().sum(0)).sqrt()
    return value, stats.t.ppf(0.975, groups - 1) * error


def sign_flips(differences, size, generator):
    """Return the p-value of the hypothesis that the errors are symmetric about 0.

    It is the fraction of random signs with a largest |t| of at least the observed one.

    Args:
        differences: mean errors of the groups (G, q).
        size: norm of the true gradient.
        generator: CPU generator.
    """
    n = len(differences)
    square = differences.square().mean(0)

    def largest(means):
        error = ((square - means.square()).clamp(min=0) / (n - 1)).sqrt()
        return ((means.abs() - ROUNDING * size).clamp(min=0) / (error + ROUNDING * size)).amax(1)

    signs = torch.randint(2, (FLIPS, n), generator=generator).to(differences.dtype) * 2 - 1
    observed = largest(differences.mean(0, keepdim=True))
    return (1 + (largest(signs @ differences / n) >= observed).sum().item()) / (1 + FLIPS)


def summarise(g_sums, per_group, squares, truth, generator):
    """Return the columns that all kinds of gradients have.

    Args:
        g_sums: sums of gradients over groups of draws (G, q).
        per_group: draws per group.
        squares: sum of all squared distances from `truth`.
        truth: true gradient (q,).
        generator: CPU generator.
    """
    size, groups = truth.norm(), len(g_sums)
    draws, differences = groups * per_group, g_sums / per_group - truth
    off = differences.mean(0)
    spread = (squares - draws * off.square().sum()).clamp(min=0) / (
        draws - 1
    )  # trace of the covariance of a gradient

    along = differences @ truth / size**2  # (G,)
    noise = (differences - differences.mean(0)).square().sum() / (groups * (groups - 1)) / size**2
    square = off.square().sum() / size**2 - noise  # its expectation is the squared norm of the bias
    return dict(
        draws=draws,
        size=size.item(),
        along=along.mean().item(),
        along_half=(stats.t.ppf(0.975, groups - 1) * along.std() / math.sqrt(groups)).item(),
        norm=math.copysign(square.abs().sqrt().item(), square),
        noise=noise.sqrt().item(),
        sd=(spread.sqrt() / size).item(),
        p=sign_flips(differences, size, generator),
    )


def list_multisets(r):
    """Return all multisets of r outcomes as counts (k, D), and their probabilities (k,)."""
    rows = [
        torch.bincount(torch.tensor(each), minlength=OUTCOMES)
        for each in itertools.combinations_with_replacement(range(OUTCOMES), r)
    ]
    counts = torch.stack(rows).double()
    log = math.lgamma(r + 1) - torch.lgamma(counts + 1).sum(1) - r * math.log(OUTCOMES)
    return counts, log.exp()


def measure_bilevel_row(problem, x_syn, r, draws, generator):
    """Return a row for the meta-gradient with r drawn outcomes."""
    uniform = torch.full((1, OUTCOMES), 1 / OUTCOMES, dtype=torch.float64)
    best = minimise(problem, uniform, x_syn)
    v_true, a_true = (each[0] for each in implicit_gradient(problem, best, uniform, x_syn))
    truth, size = v_true @ a_true, (v_true @ a_true).norm()
    drawn = torch.multinomial(uniform.expand(draws, -1), r, replacement=True, generator=generator)
    drawn = F.one_hot(drawn, OUTCOMES).sum(1).double()  # (draws, D)
    few = math.comb(OUTCOMES + r - 1, r) <= ENUMERATED
    every, probability = list_multisets(r) if few else (drawn[:0], drawn[:0, 0])
    distinct, which = torch.cat([every, drawn]).unique(dim=0, return_inverse=True)
    each = F.one_hot(which, len(distinct)).double()
    exact = probability @ each[: len(every)]  # (k,)
    counts = torch.cat([each[len(every) :].view(GROUPS, -1, len(distinct)).sum(1), exact[None]])
    *sums, squares = sum_over_draws(problem, counts, distinct / r, x_syn, best[0], truth)
    exact_g, sums = sums[2][-1], [each[:-1] for each in sums]  # v, A and v A
    row = summarise(sums[2], draws // GROUPS, squares[:-1].sum(), truth, generator)

    def split(n, v, a, g):
        parts = split_bias(*(each / (n * (draws // GROUPS)) for each in (v, a, g)), v_true, a_true)
        return torch.stack([part @ truth for part in parts.values()]) / size**2

    values, halves = jackknife(split, GROUPS, *sums)
    names = ("dv", "da", "both", "covariance")
    row |= dict(zip(names, values.tolist(), strict=True))
    row |= {f"{name}_half": half for name, half in zip(names, halves.tolist(), strict=True)}
    mean_v, mean_a, mean_g = (each.sum(0) / draws for each in sums)
    parts = split_bias(mean_v, mean_a, mean_g, v_true, a_true)
    row["left_over"] = ((mean_g - truth - sum(parts.values())).norm() / size).item()
    row["covariance_norm"] = (parts["covariance"].norm() / size).item()
    if few:
        bias = exact_g - truth
        row |= dict(
            exact_along=(bias @ truth / size**2).item(), exact_norm=(bias.norm() / size).item()
        )
    return row


def measure_sampled_row(gradients, r, draws, generator):
    """Return a row for the mean of r rows of `gradients` (D, q), drawn with replacement.

    The truth is the mean of all rows.
    """
    uniform = torch.full((draws, len(gradients)), 1.0, dtype=torch.float64)
    drawn = torch.multinomial(uniform, r, replacement=True, generator=generator)
    g = F.one_hot(drawn, len(gradients)).sum(1).double() / r @ gradients  # (draws, q)
    groups = g.view(GROUPS, -1, g.shape[1]).sum(1)
    return summarise(
        groups,
        draws // GROUPS,
        (g - gradients.mean(0)).square().sum(),
        gradients.mean(0),
        generator,
    )


def measure(sizes, draws, seed):
    """Return all rows as dicts."""
    generator = torch.Generator().manual_seed(seed)
    x_syn, x_real = draw_images(generator)
    ssl, krr, closed = make_problems(x_syn, x_real, generator)
    rows = []

    def add(loss, gradient, r, row):
        rows.append(dict(loss=loss, gradient=gradient, r=r, seed=seed) | row)

    for r in progress.progress_bar(sizes, desc="r"):
        for name, problem in (ssl | {"MSE (KRR-ST)": krr}).items():
            add(name, "bilevel", r, measure_bilevel_row(problem, x_syn, r, draws, generator))
        for name, problem in ssl.items():
            each = jacfwd(lambda theta, problem=problem: problem.losses(theta, x_syn))(
                problem.start
            )  # (D, p)
            add(name, "ordinary", r, measure_sampled_row(each, r, draws, generator))
        each = torch.autograd.functional.jacobian(closed, x_syn).flatten(1)  # (n, q)
        add("MSE (KRR-ST)", "mini-batch", r, measure_sampled_row(each, r, draws, generator))
    for row in rows:
        row["biased"] = row["p"] < 0.05 / len(rows)
    return rows


def format_markdown(rows):
    """Return `rows` as a Markdown table."""
    lines = [
        "| loss | gradient | r | along | part: means | part: covariance | norm "
        "| exact: along, norm | sd | p | biased |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = [
            row["loss"],
            row["gradient"],
            str(row["r"]),
            f"{row['along']:+.3f} ± {row['along_half']:.3f}",
        ]
        split = ""
        if "covariance" in row:
            split = (
                f"{row['dv'] + row['da'] + row['both']:+.3f}",
                f"{row['covariance']:+.3f} ± {row['covariance_half']:.3f}",
            )
        exact = f"{row['exact_along']:+.3f}, {row['exact_norm']:.3f}" if "exact_norm" in row else ""
        cells += [
            *(split or ("", "")),
            f"{row['norm']:.3f}",
            exact,
            f"{row['sd']:.2f}",
            f"{row['p']:.4f}",
        ]
        lines.append("| " + " | ".join([*cells, "yes" if row["biased"] else "no"]) + " |")
    return "\n".join(lines).replace("-0.000", "+0.000")


def draw(rows, out):
    """Draw the bias along the true gradient, its norm, and its parts, against r."""
    figure, (along, norm, parts) = make_panels(3, width=4.4)
    series = {}
    for row in rows:
        series.setdefault((row["loss"], row["gradient"]), []).append(row)
    losses = [*dict.fromkeys(row["loss"] for row in rows)]
    for k, ((loss, gradient), line) in enumerate(series.items()):
        look = losses.index(loss)
        whole = gradient == "bilevel"
        style = dict(
            color=COLOURS[look],
            marker=MARKERS[look],
            markersize=5,
            linestyle="-" if whole else ":",
            markerfacecolor=None if whole else "white",
            label=f"{loss}, {gradient}",
        )
        r = [row["r"] * 1.03 ** (k - 3) for row in line]  # shifted to avoid overlaps
        along.errorbar(
            r,
            [row["along"] for row in line],
            [row["along_half"] for row in line],
            capsize=2,
            **style,
        )
        if whole and max(row["sd"] for row in line) > ROUNDING:
            positive = [row for row in line if row["norm"] > 0]
            norm.plot([row["r"] for row in positive], [row["norm"] for row in positive], **style)
            norm.plot(
                [row["r"] for row in line],
                [row["sd"] for row in line],
                color=style["color"],
                linestyle="--",
                marker=style["marker"],
                markersize=3,
                linewidth=0.8,
                label=f"{loss}, sd of one gradient",
            )
            for name, dash, fill in (("means", "--", "white"), ("covariance", "-", None)):
                value = [
                    row["along"] - row["covariance"] if fill else row["covariance"] for row in line
                ]
                parts.plot(
                    r,
                    value,
                    **style | dict(linestyle=dash, markerfacecolor=fill, label=f"{loss}, {name}"),
                )
    label_axis(along, "bias along the true gradient", "r", "fraction of the true gradient")
    label_axis(norm, "norm of the bias, and noise", "r", "fraction of the true gradient")
    label_axis(
        parts, "parts of the bias along the true gradient", "r", "fraction of the true gradient"
    )
    norm.set_yscale("log")
    for axis in (along, norm, parts):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(sorted({row["r"] for row in rows}))
        axis.legend(fontsize=6, frameon=False)
    for axis in (along, parts):
        axis.axhline(0, color=INK, linewidth=0.8)
    save_figure(figure, out)


def main(argv):
    args, started = parse_args(argv), time.monotonic()
    rows = measure(*((1, 2), 100) if args.fast else (SIZES, DRAWS), args.seed)
    print(format_markdown(rows))
    facts = package_versions()
    text = "".join(json.dumps(row | facts) + "\n" for row in rows)
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out / "bias.jsonl", text)
    draw(rows, args.out / "bias.png")
    print(f"wrote {args.out / 'bias.jsonl'}; {time.monotonic() - started:.0f} s")


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bias"),
        help="output folder (default: runs/bias)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="take seconds: fewer draws, and r = 1 and 2 only"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="default: 0")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
