"""DM, DSA and MTT: formulas against loops in float64, and the commands at toy size."""

import json

import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import models
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import balanced_subset
from distillers import __main__ as distillers
from distillers import dm, dsa, labelled, matching
from tests.conftest import make_stopping_steps
from utils import run
from utils.errors import UserError
from utils.sampling import Randomness

TOY = dict(
    dm=["--outer-steps", "4", "--real-batch", "8"],
    dsa=["--networks", "2", "--outer-loops", "2", "--inner-epochs", "2", "--real-batch", "4"],
    mtt=[
        "--outer-steps",
        "4",
        "--inner-steps",
        "2",
        "--inner-batch",
        "7",
        "--max-start",
        "2",
        "--experts",
        "2",
        "--expert-batch",
        "64",
        "--outer-lr",
        "100",
        "--match-epochs",
        "2",
    ],
)


def draw_normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_network(num_outputs=3):
    torch.manual_seed(0)
    return models.build("dc_convnet3", 32, num_outputs, width=0.03).double()


@pytest.fixture
def source(small_root):
    return load_images("few", "train", 32, small_root)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure objectives with few draws."""
    for module, name in (
        (dm, "MEASUREMENT_NETWORKS"),
        (dsa, "MEASUREMENT_NETWORKS"),
        (matching, "MEASUREMENT_STARTS"),
    ):
        monkeypatch.setattr(module, name, 2)


# Formulas


def test_mean_distance_equals_loops_over_classes_and_images():
    f_real, f_syn = draw_normal(0, 7, 5), draw_normal(1, 6, 5)
    y_real, y_syn = torch.tensor([0, 2, 1, 2, 2, 0, 1]), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = 0.0
    for c in range(3):
        for j in range(5):
            real = [f_real[i, j].item() for i in range(7) if y_real[i] == c]
            syn = [f_syn[i, j].item() for i in range(6) if y_syn[i] == c]
            expected += (sum(real) / len(real) - sum(syn) / len(syn)) ** 2
    assert dm.mean_distance(f_real, y_real, f_syn, y_syn, 3).item() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("images_in_a_pass", [1, 24, 10_000])
def test_dm_does_not_depend_on_the_classes_per_pass(source, monkeypatch, images_in_a_pass):
    """Compare loss and gradient for the same augmentations and real images of each class."""
    device = torch.device("cpu")
    real = labelled.ClassBatches(source, 8, device)
    torch.manual_seed(0)
    network = models.build("dc_convnet3", 32, 0, width=0.05).requires_grad_(False)
    x = source.normalised(balanced_subset(source, 20, 0), device).requires_grad_()
    randomness, naive = Randomness(5, device), 0.0
    for c in range(10):
        a, b = dm.diff_augment_alike(
            randomness.device, real.draw(c, randomness.cpu), x[2 * c : 2 * c + 2]
        )
        naive = naive + (network.embed(a).mean(0) - network.embed(b).mean(0)).square().sum()
    (expected,) = torch.autograd.grad(naive, x)
    monkeypatch.setattr(dm, "PASS", images_in_a_pass)
    parts = list(dm.losses(network, x, real, Randomness(5, device), "fp32"))
    assert len(parts) == {1: 10, 24: 4, 10_000: 1}[images_in_a_pass]
    for part in parts:
        part.backward()
    torch.testing.assert_close(sum(parts), naive, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-5)


def test_gradient_distance_equals_loops_over_rows():
    real, syn = ([draw_normal(s, 4, 3, 2, 2), draw_normal(s + 1, 2, 7)] for s in (0, 10))
    expected = 0.0
    for a, b in zip(real, syn, strict=True):
        for row in range(len(a)):
            p, q = a[row].flatten().tolist(), b[row].flatten().tolist()
            dot = sum(i * j for i, j in zip(p, q, strict=True))
            expected += 1 - dot / (sum(i * i for i in p) ** 0.5 * sum(j * j for j in q) ** 0.5)
    assert dsa.gradient_distance(real, syn).item() == pytest.approx(expected, rel=1e-5)
    assert dsa.gradient_distance(real, [5 * each for each in real]).item() == pytest.approx(
        0, abs=1e-5
    )
    assert dsa.gradient_distance(real, [-each for each in real]).item() == pytest.approx(
        2 * 6, rel=1e-5
    )


def test_gradient_distance_of_a_zero_row_is_one_with_a_finite_gradient():
    syn = torch.zeros(1, 3, requires_grad=True)
    distance = dsa.gradient_distance([torch.ones(1, 3)], [syn])
    distance.backward()
    assert distance.item() == 1 and syn.grad.isfinite().all()


def test_weight_gradients_are_those_of_convolutions_and_head_only():
    network, x = make_network().float(), draw_normal(0, 4, 3, 32, 32).float()
    F.cross_entropy(network(x), torch.full((4,), 2)).backward()
    expected = [
        m.weight.grad for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    ]
    ours = dsa.weight_gradients(network, x, 2, "fp32")
    assert len(ours) == 4
    for gradient, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, theirs)


def test_dsa_image_gradient_agrees_with_central_differences():
    network, x_real, x = (
        make_network().double(),
        draw_normal(0, 5, 3, 32, 32),
        draw_normal(1, 2, 3, 32, 32).requires_grad_(),
    )

    def gradients(x, create_graph=False):
        weights = [p for p in network.parameters() if p.ndim > 1]
        loss = F.cross_entropy(network(x), torch.ones(len(x), dtype=torch.int64))
        return torch.autograd.grad(loss, weights, create_graph=create_graph)

    g_real = gradients(x_real)
    dsa.gradient_distance(g_real, gradients(x, create_graph=True)).backward(inputs=[x])
    for seed in range(4):
        direction, h = draw_normal(seed + 5, *x.shape), 1e-6
        up, down = (
            dsa.gradient_distance(g_real, gradients(x.detach() + s * h * direction))
            for s in (1, -1)
        )
        torch.testing.assert_close(
            (x.grad * direction).sum(), (up - down) / (2 * h), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize(
    ("per_class", "expected"),
    [
        (1, (1, 1)),
        (2, (2, 50)),
        (10, (10, 50)),
        (11, (11, 25)),
        (20, (20, 25)),
        (30, (30, 20)),
        (40, (40, 15)),
        (50, (50, 10)),
        (100, (50, 10)),
    ],
)
def test_dsa_loops_depend_on_the_images_per_class(per_class, expected):
    assert dsa.loop_counts(per_class) == expected


def test_class_batches_have_distinct_images_of_one_class(source):
    real = labelled.ClassBatches(source, 18, torch.device("cpu"))
    for label in range(10):
        members = source.normalised((source.labels == label).nonzero()[:, 0], "cpu")
        drawn = real.draw(label, torch.Generator().manual_seed(0))
        same = (drawn[:, None] == members).flatten(2).all(2)  # (b, n_c)
        assert len(drawn) == (14 if label == 3 else 18)
        assert same.sum(1).tolist() == [1] * len(drawn) and same.sum(0).max() == 1


# Commands


def distil(method, top, small_root, *flags, seed=0):
    """Run a command in this process; return the set, its log, and its folder."""
    words = [
        "--source",
        "few",
        "--preset",
        "digits",
        "--num-images",
        "20",
        "--width",
        "0.05",
        "--log-every",
        "1",
    ]
    roots = ["--data-root", str(small_root), "--run-root", str(top), "--seed", str(seed)]
    distillers.main([method, *words, *roots, *TOY[method], *flags])
    folder = top / "few" / method / f"seed{seed}"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return load_distilled(folder / "distilled.pt"), log


@pytest.mark.parametrize("method", TOY)
def test_seed_determines_the_set(method, small_root, tmp_path):
    first, log = distil(method, tmp_path / "a", small_root)
    again, _ = distil(method, tmp_path / "b", small_root)
    other, _ = distil(method, tmp_path / "a", small_root, seed=1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.target_kind == "class" and first.targets.tolist() == sorted([*range(10)] * 2)
    assert first.meta["method"] == method and len(log) == 4
    assert (tmp_path / "a/few" / method / "seed0/images.png").is_file()


@pytest.mark.parametrize("method", TOY)
def test_methods_start_from_the_set_of_random(method, small_root, source, tmp_path):
    start, _ = distil(method, tmp_path, small_root, "--outer-lr", "0")
    chosen = balanced_subset(source, 20, 0)
    torch.testing.assert_close(start.images, source.normalised(chosen, "cpu"), rtol=0, atol=0)
    assert torch.equal(start.targets, source.labels[chosen])


@pytest.mark.parametrize("method", TOY)
def test_stopped_run_resumes_to_the_same_set(method, small_root, tmp_path, monkeypatch):
    stops = [("distil", 0), ("distil", 2)]
    if method == "mtt":
        stops = [("expert 0", 4), ("expert 1", 2), *stops]  # in the middle of an epoch
    whole, log = distil(method, tmp_path / "whole", small_root)
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "steps", make_stopping_steps(left := [*stops]))
        for _ in stops:
            with pytest.raises(run.Stopped):
                distil(method, tmp_path / "parts", small_root)
    assert not left
    parts, log_of_parts = distil(method, tmp_path / "parts", small_root)
    assert torch.equal(parts.images, whole.images)
    assert [line["loss"] for line in log_of_parts] == [line["loss"] for line in log]
    assert parts.meta["objective_distilled"] == whole.meta["objective_distilled"]
    assert not list((tmp_path / "parts").rglob("checkpoint.pt"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "share", "flags"),
    [
        (
            "dm",
            0.85,
            ["--width", "0.1", "--outer-lr", "0.5", "--outer-steps", "25", "--real-batch", "20"],
        ),
        ("dsa", 0.95, ["--networks", "20", "--outer-loops", "1", "--real-batch", "20"]),
        (
            "mtt",
            0.9,
            ["--outer-lr", "1000", "--outer-steps", "15", "--experts", "1", "--max-start", "1"],
        ),
    ],
)
def test_distillation_of_digits_lowers_the_objective(
    method, share, flags, small_root, tmp_path, monkeypatch
):
    """Check a few steps. DSA uses the same network each time, because few steps are noisy."""

    def same_network(*args):
        torch.manual_seed(0)
        return labelled.build_untrained(*args)

    monkeypatch.setattr(dsa, "build_untrained", same_network)
    learned, _ = distil(method, tmp_path, small_root, *flags)
    assert learned.meta["objective_distilled"] < share * learned.meta["objective_initial"]
    assert learned.images.isfinite().all()


# Bad input


@pytest.mark.parametrize("method", TOY)
def test_batch_norm_is_an_error(method, small_root, tmp_path):
    with pytest.raises(UserError, match=r"convnet3 has batch norm.*dc_convnet3, dc_convnet4"):
        distil(method, tmp_path, small_root, "--arch", "convnet3")


@pytest.mark.parametrize("method", TOY)
def test_number_of_images_must_be_a_multiple_of_the_classes(method, small_root, tmp_path):
    with pytest.raises(UserError, match="not a multiple"):
        distil(method, tmp_path, small_root, "--num-images", "15")


@pytest.mark.parametrize("method", TOY)
def test_infinite_loss_is_an_error_with_advice(method, small_root, tmp_path):
    with pytest.raises(
        UserError, match=r"distil, step \d+ of \d+: .* is not finite.*lower the learning rate"
    ):
        distil(method, tmp_path, small_root, "--outer-lr", "1e38")
    assert not (tmp_path / "few" / method / "seed0" / "distilled.pt").exists()


def test_source_without_labels_is_an_error(tmp_path):
    for i in range(3):
        save_image(torch.rand(3, 32, 32), tmp_path / f"{i}.png")
    for method in TOY:
        with pytest.raises(UserError, match="no labels"):
            distillers.main(
                [
                    method,
                    "--source",
                    str(tmp_path),
                    "--data-root",
                    str(tmp_path / "data"),
                    "--run-root",
                    str(tmp_path / "runs"),
                ]
            )
