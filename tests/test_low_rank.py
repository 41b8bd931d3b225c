"""Low-rank sets: formulas in float64, budget, file format, and the command."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import distill
import models
import pretrain
from data import factors
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import random_subset
from distillers import low_rank
from distillers.krr import ridge_predict
from models.target import load_target
from tests.conftest import DISTILL, make_stopping_steps
from utils import files, run
from utils.errors import UserError
from utils.presets import preset

CPU = torch.device("cpu")
BUDGET = ["--num-images", "6", "--bases", "12", "--target-bases", "10", "--base-size", "8"]
TURNED = ["--views", "rotations"]


def draw_normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Formulas


def enlarge(low, size):
    """Enlarge (s, s) to (size, size) pixel by pixel.

    Pixel i is at (i + 1/2) s / size - 1/2 between the small pixels.
    """
    side, out = len(low), torch.zeros(size, size, dtype=low.dtype)

    def neighbours(i):
        place = max((i + 0.5) * side / size - 0.5, 0.0)
        first = int(place)
        return [(first, 1 - place + first), (min(first + 1, side - 1), place - first)]

    for i in range(size):
        for j in range(size):
            out[i, j] = sum(p * q * low[a, b] for a, p in neighbours(i) for b, q in neighbours(j))
    return out


def make_factors(m=3, u=4, v=5, d=6, side=2, h=2, shifts=True):
    given = dict(
        c_x=draw_normal(0, m, u),
        b_x=draw_normal(1, u, 3 * side * side),
        c_y=draw_normal(2, m, v),
        b_y=draw_normal(3, v, d),
    )
    if shifts:
        given |= dict(
            w1=draw_normal(4, 3, v, h),
            b1=draw_normal(5, 3, h),
            w2=draw_normal(6, 3, h, v),
            b2=draw_normal(7, 3, v),
        )
    return given


def test_images_are_enlarged_sums_of_bases():
    f = make_factors(shifts=False)
    x, y = factors.materialise(f, 6)
    assert x.shape == (3, 3, 6, 6) and y.shape == (3, 6)
    for i in range(3):
        low = sum(f["c_x"][i, u] * f["b_x"][u] for u in range(4)).reshape(3, 2, 2)
        for colour in range(3):
            torch.testing.assert_close(x[i, colour], enlarge(low[colour], 6))
        torch.testing.assert_close(y[i], sum(f["c_y"][i, v] * f["b_y"][v] for v in range(5)))


def test_rotated_views_follow_with_predicted_targets():
    f = make_factors()
    x, y = factors.materialise(f, 6)
    assert x.shape == (12, 3, 6, 6) and y.shape == (12, 6)
    for k in range(1, 4):
        for i in range(3):
            turned = x[i]
            for _ in range(k):  # counterclockwise: the last column becomes the first row
                turned = torch.stack([turned[:, :, -1 - row] for row in range(6)], dim=1)
            torch.testing.assert_close(x[3 * k + i], turned)
            c = f["c_y"][i]
            hidden = [
                max(0, sum(c[v] * f["w1"][k - 1, v, j] for v in range(5)) + f["b1"][k - 1, j])
                for j in range(2)
            ]
            shift = sum(hidden[j] * f["w2"][k - 1, j] for j in range(2)) + f["b2"][k - 1]
            torch.testing.assert_close(y[3 * k + i], (c + shift) @ f["b_y"])


def make_set(learned, shifts=None, size=32):
    """Make a `LowRank` with the given tensors."""
    syn = low_rank.LowRank.__new__(low_rank.LowRank)
    syn.learned, syn.shifts, syn.size, syn.finished = learned, shifts or {}, size, False
    return syn


def test_gradients_of_the_outer_loss_agree_with_central_differences():
    torch.manual_seed(0)
    network = models.build("convnet3", 32, 0, width=0.02).double().eval()
    f_real, y_real = draw_normal(8, 9, network.feature_dim), draw_normal(9, 9, 6)
    start = {
        name: each for name, each in make_factors(m=3, side=8).items() if name in factors.NAMES
    }
    start["c_views"] = draw_normal(10, 3, 3, 5)

    def loss(learned):
        x, y = make_set(learned, shifts=dict(w1=None)).compose()
        return F.mse_loss(ridge_predict(f_real, network.embed(x), y, 1e-2), y_real)

    learned = {name: each.clone().requires_grad_() for name, each in start.items()}
    x, y = make_set(learned, shifts=dict(w1=None)).compose()
    assert len(x) == len(y) == 12
    # The gradient holds the ridge constant, so the differences do too.
    trace = (torch.cat([network.embed(x), torch.ones(12, 1)], 1) ** 2).sum().item()

    def fixed_ridge(learned):
        x, y = make_set(learned, shifts=dict(w1=None)).compose()
        a, b = (torch.cat([f, torch.ones(len(f), 1)], 1) for f in (network.embed(x), f_real))
        dual = torch.linalg.solve(a @ a.T + 1e-2 * trace * torch.eye(12, dtype=torch.float64), y)
        return ((b @ a.T @ dual - y_real) ** 2).mean()

    loss(learned).backward()
    torch.testing.assert_close(loss(start), fixed_ridge(start), rtol=1e-5, atol=1e-8)
    for name, value in start.items():
        direction, h = draw_normal(11, *value.shape), 1e-5
        up, down = (fixed_ridge(start | {name: value + s * h * direction}) for s in (1, -1))
        ours = (learned[name].grad * direction).sum()
        torch.testing.assert_close(ours, (up - down) / (2 * h), rtol=1e-4, atol=1e-9)


def test_principal_components_are_orthonormal_with_the_smallest_error():
    rows = draw_normal(0, 20, 7).float()
    b = low_rank.fit_components(rows, 3)
    torch.testing.assert_close(b @ b.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    lost = (rows - rows @ b.T @ b).square().sum()
    torch.testing.assert_close(
        lost, torch.linalg.svdvals(rows)[3:].square().sum(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(b, low_rank.fit_components(rows, 5)[:3])  # sorted by variance


def test_balancing_keeps_the_product_and_equalises_the_norms():
    c, b = 50 * draw_normal(0, 4, 3), 0.1 * draw_normal(1, 3, 5)
    ratio = low_rank.balancing_ratio(c, b)
    torch.testing.assert_close((c / ratio) @ (b * ratio), c @ b)
    torch.testing.assert_close((c / ratio).square().mean(), (b * ratio).square().mean())


def test_shift_networks_explain_less_variance_of_noise(tmp_path):
    """Check the share of the variance that the networks explain, without and with noise."""
    c_y = draw_normal(0, 60, 5).float()
    truth = {name: each.float() for name, each in low_rank.build_shifts(5, 4, 9, CPU).items()}
    for noise, least, most in ((0.0, 0.9, 1.0), (3.0, 0.0, 0.7)):
        c_views = (
            c_y
            + factors.predict_shifts(c_y, **truth).detach()
            + noise * draw_normal(1, 3, 60, 5).float()
        )
        syn = make_set(dict(c_y=c_y, c_views=c_views), low_rank.build_shifts(5, 4, 0, CPU))
        syn.adam = torch.optim.Adam([*syn.shifts.values()], 0.01)
        this = run.Run(tmp_path / str(noise), "x.pt", {})
        this.resume(CPU, {})
        r2 = syn._fit_shifts(this)
        error = (factors.predict_shifts(c_y, **syn.shifts) - (c_views - c_y)).square().mean()
        assert least < r2 < most
        variance = ((c_views - c_y) - (c_views - c_y).mean(1, keepdim=True)).square().mean()
        assert r2 == pytest.approx(1 - (error / variance).item(), rel=1e-4)


# Budget


def make_settings(**given):
    return SimpleNamespace(
        **(preset("digits", "distill") | dict(bases=20, target_bases=8, num_images=10) | given)
    )


@pytest.mark.parametrize("views", low_rank.VIEWS)
@pytest.mark.parametrize(
    ("n_plain", "u", "v", "side"), [(10, 20, 8, 16), (3, 5, 5, 8), (100, 200, 100, 16)]
)
def test_set_uses_its_budget_and_no_more(views, n_plain, u, v, side):
    args = make_settings(num_images=n_plain, bases=u, target_bases=v, base_size=side, views=views)
    m = low_rank.count_images(args, 10**6, 32, 128, v)
    numbers = m * u + u * 3 * side**2 + m * v + v * 128
    if views == "rotations":
        numbers += 3 * (v * 4 + 4 + 4 * v + v)
    budget = n_plain * (3 * 32 * 32 + 128)
    assert numbers <= budget < numbers + u + v


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(views="mirrored"), "--views mirrored: must be none or rotations"),
        (dict(random_targets=True), "--random-targets cannot be combined with --bases"),
        (dict(random_images=True), "--random-images cannot be combined with --bases"),
        (dict(base_size=64), "--base-size 64: larger than the images (32 px)"),
        (dict(base_size=2), "--bases 20: must be at most 12"),
        (dict(bases=801), "--bases 801: must be at most 768"),
        (dict(target_bases=129), "--target-bases 129: must be at most 128"),
        (
            dict(num_images=4),
            "a budget of 12,800 numbers, but the bases alone take 16,384; raise it",
        ),
        (dict(num_images=500), "but only 1,000 images of the source may be used"),
    ],
)
def test_inconsistent_settings_are_errors(given, message):
    args = make_settings(**given)
    with pytest.raises(UserError) as error:
        low_rank.count_images(args, 1000, 32, 128, args.target_bases)
    assert message in str(error.value)


# Command


@pytest.fixture
def distil(roots, runs, tmp_path):
    """Return a function that runs distill.py and returns the set, its log, and its file."""

    def call(*flags, top="runs", seed=0):
        target = [
            "--target-network",
            str(runs / "target" / "seed0" / "target.pt"),
            "--seed",
            str(seed),
        ]
        places = [*roots[:2], "--run-root", str(tmp_path / top), "--log-every", "1"]
        distill.main(["--source", "digits", *DISTILL, *places, *target, *BUDGET, *flags])
        path = tmp_path / top / "digits" / "krr_st_low_rank" / f"seed{seed}" / "distilled.pt"
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        return SimpleNamespace(d=load_distilled(path), log=log, path=path)

    return call


@pytest.mark.long
@pytest.mark.parametrize("views", low_rank.VIEWS)
def test_file_has_the_stated_size_and_images(distil, views):
    set_ = distil("--views", views)
    d, content = set_.d, files.load(set_.path, "distilled")
    f, width = content["factors"], d.targets.shape[1]
    numbers = sum(each.numel() for each in f.values())
    budget = 6 * (3 * 32 * 32 + width)
    assert numbers == d.meta["numbers"] <= budget < numbers + 12 + 10
    assert content["images"] is None and content["targets"] is None
    assert 4 * numbers < set_.path.stat().st_size < 4 * numbers + 16_000 < 4 * budget + 16_000
    m = len(f["c_x"])
    count = 4 * m if views == "rotations" else m
    assert d.images.shape == (count, 3, 32, 32) and d.targets.shape == (count, width)
    low = (f["c_x"] @ f["b_x"]).view(m, 3, 8, 8)
    torch.testing.assert_close(d.images[5, 1], enlarge(low[5, 1], 32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d.targets[:m], f["c_y"] @ f["b_y"])
    if views == "rotations":
        torch.testing.assert_close(d.images[2 * m :][:m], d.images[:m].flip(2, 3))
        hidden = (f["c_y"] @ f["w1"][2] + f["b1"][2]).relu()
        c = f["c_y"] + hidden @ f["w2"][2] + f["b2"][2]
        torch.testing.assert_close(d.targets[3 * m :], c @ f["b_y"], rtol=1e-4, atol=1e-5)
    assert d.meta["method"] == "krr_st_low_rank" and d.num_images == 6
    assert (set_.path.parent / "images.png").is_file()


@pytest.mark.long
def test_initial_set_is_the_projection_of_random_images_and_targets(distil, roots, runs):
    set_ = distil(*TURNED, "--outer-lr", "1e-12")
    source = load_images("digits", "train", 32, roots[1])
    target = load_target(runs / "target" / "seed0" / "target.pt", source, CPU, "fp32")
    f = files.load(set_.path, "distilled")["factors"]
    index = random_subset(source, len(f["c_x"]), 0)
    assert set_.d.meta["initial"] == index.tolist()
    x = source.normalised(index, "cpu")
    small = x.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).flatten(1)  # squares of 4 x 4 pixels
    basis = torch.linalg.qr(f["b_x"].T).Q
    torch.testing.assert_close(f["c_x"] @ f["b_x"], small @ basis @ basis.T, rtol=1e-3, atol=1e-3)
    basis = torch.linalg.qr(f["b_y"].T).Q
    torch.testing.assert_close(
        f["c_y"] @ f["b_y"], target.features(x) @ basis @ basis.T, rtol=1e-3, atol=1e-3
    )
    assert set_.d.meta["distance_from_initial"] < 0.9


@pytest.mark.long
def test_source_images_limits_the_images_of_the_factors(distil, roots, monkeypatch):
    seen, fit = [], low_rank.fit_components
    monkeypatch.setattr(low_rank, "fit_components", lambda x, k: seen.append(len(x)) or fit(x, k))
    set_ = distil("--bases", "60", "--source-images", "200")
    source = load_images("digits", "train", 32, roots[1])
    assert seen == [200, 200]
    assert {*set_.d.meta["initial"]} <= {*random_subset(source, 200, 0).tolist()}
    with pytest.raises(UserError, match="but only 60 images of the source may be used"):
        distil("--bases", "60", "--source-images", "60", seed=1)


@pytest.mark.parametrize("flag", ["views", "base-size", "target-bases", "shift-width"])
def test_settings_of_low_rank_sets_require_bases(roots, flag):
    value = "rotations" if flag == "views" else "7"
    with pytest.raises(UserError, match=f"--{flag} requires --bases"):
        distill.main(["--source", "digits", *DISTILL, *roots, f"--{flag}", value])


@pytest.mark.long
@pytest.mark.parametrize("views", low_rank.VIEWS)
def test_stopped_run_resumes_to_the_same_file(distil, monkeypatch, views):
    stops = [("initialise pool", 1), ("distil", 1), ("distil", 3), ("fit shifts", 50)]
    stops = stops if views == "rotations" else stops[:3]
    monkeypatch.setattr(low_rank, "SHIFT_STEPS", 60)
    whole = distil("--views", views, top="whole")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "steps", make_stopping_steps(left := [*stops]))
        for _ in stops:
            with pytest.raises(run.Stopped):
                distil("--views", views, top="parts")
    assert not left
    parts = distil("--views", views, top="parts")
    assert parts.path.read_bytes() == whole.path.read_bytes()
    assert torch.equal(parts.d.images, whole.d.images) and torch.equal(
        parts.d.targets, whole.d.targets
    )


@pytest.mark.long
def test_learning_lowers_the_outer_loss(distil):
    flags = [
        "--outer-steps",
        "40",
        "--outer-lr",
        "0.02",
        "--outer-batch",
        "256",
        "--pool-steps",
        "10",
    ]
    d = distil(*TURNED, *flags).d
    assert d.meta["outer_loss_distilled"] < 0.9 * d.meta["outer_loss_initial"]
    assert 0 < d.meta["shift_r2"] <= 1


@pytest.mark.long
def test_seed_determines_the_set(distil):
    first, again, other = (distil(seed=s, top=top).d for s, top in ((0, "a"), (0, "b"), (1, "a")))
    assert torch.equal(first.images, again.images)
    assert first.images.shape == other.images.shape and not torch.equal(first.images, other.images)


@pytest.mark.long
def test_later_stages_accept_low_rank_sets(distil):
    set_ = distil(*TURNED)
    pretrain.main(["--distilled", str(set_.path), "--epochs", "2", "--width", "0.1"])
    meta = files.load(next(set_.path.parent.rglob("model.pt")), "model")["meta"]
    assert meta["num_images"] == 6 and meta["method"] == "krr_st_low_rank"


def test_plain_set_has_its_usual_name_and_format(distilled):
    content = files.load(distilled, "distilled")
    assert "factors" not in content and distilled.parent.parent.name == "krr_st"


@pytest.mark.long
def test_raw_init_learns_pixels(distil):
    d = distil("--raw-init").d
    assert d.mean.tolist() == [0, 0, 0] and (d.images - d.pixels()).abs().mean() < 0.05


def test_command_exits_with_an_error_for_inconsistent_settings(distil):
    with pytest.raises(UserError, match="--views sideways: must be none or rotations"):
        distil("--views", "sideways")


# Invalid files


def change(f, name, value):
    return f | {name: value}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: [*f.values()], "not a dictionary of tensors"),
        (lambda f: f | dict(c_x=3), "not a dictionary of tensors"),
        (lambda f: {k: v for k, v in f.items() if k != "b_y"}, "factors c_x, b_x, c_y"),
        (lambda f: f | dict(more=torch.ones(1)), "more"),
        (lambda f: f | dict(c_x=f["c_x"].double()), "not float32"),
        (lambda f: f | dict(b_x=f["b_x"] * math.inf), "not finite"),
        (lambda f: f | dict(c_x=f["c_x"][0]), "not matrices"),
        (lambda f: f | dict(c_x=f["c_x"][:0]), "not matrices"),
        (lambda f: f | dict(c_x=f["c_x"][1:]), "do not fit"),
        (lambda f: f | dict(b_x=f["b_x"][:, 1:]), "do not fit"),
        (lambda f: f | dict(w1=f["w1"][1:]), "do not fit"),
        (lambda f: f | dict(b1=torch.tensor(1.0)), "do not fit"),
    ],
)
def test_invalid_factors_are_errors(distilled, tmp_path, spoil, message):
    content = files.load(distilled, "distilled")
    good = {name: each.float() for name, each in make_factors(side=8).items()}
    path = tmp_path / "distilled.pt"
    content = {k: v for k, v in content.items() if k not in ("kind", "format")}
    content |= dict(images=None, targets=None, image_size=32)
    files.save(path, "distilled", content | dict(factors=good))
    assert len(load_distilled(path).images) == 12
    for size in (0, 10**6, "large"):
        files.save(path, "distilled", content | dict(factors=good, image_size=size))
        with pytest.raises(UserError, match="image_size"):
            load_distilled(path)
    files.save(path, "distilled", content | dict(factors=spoil(good)))
    with pytest.raises(UserError, match=message):
        load_distilled(path)
