"""The Barlow Twins loss, LARS and the schedules against their formulas (float64)."""

import math

import pytest
import torch
import torchvision

import models
from models.barlow_twins import barlow_twins_loss
from pretrain_target import load_backbone
from utils.errors import UserError
from utils.optim import LARS, make_schedule


def test_loss_equals_the_formula_term_by_term():
    g = torch.Generator().manual_seed(0)
    b, d, weight, scale = 12, 5, 0.0051, 0.1
    z1, z2 = (torch.randn(b, d, generator=g, dtype=torch.float64) * 3 + 1 for _ in range(2))
    # C_ij = sum_b z1_bi z2_bj / (sqrt(sum_b z1_bi^2) sqrt(sum_b z2_bj^2)) of centred embeddings
    expected = 0.0
    for i in range(d):
        for j in range(d):
            u, v = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
            c = (u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum())
            expected += (1 - c) ** 2 if i == j else weight * c**2
    ours = barlow_twins_loss(z1, z2, weight, scale)
    assert ours.item() == pytest.approx(
        scale * expected.item(), rel=1e-4
    )  # batch norm adds 1e-5 to the variance


def test_loss_of_equal_decorrelated_views_is_zero():
    z = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    z = torch.linalg.qr(z - z.mean(0))[0] * 10  # centred, orthogonal columns
    assert barlow_twins_loss(z, z, 0.0051).item() == pytest.approx(0, abs=1e-3)


def test_lars_follows_its_formula_over_two_steps():
    g = torch.Generator().manual_seed(0)
    weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((4, 3), (4,))
    )
    lr, momentum, decay, eta = 0.3, 0.9, 1e-2, 0.02
    lars = LARS([weight, bias], lr, momentum, decay, eta)
    w, b = weight.detach().clone(), bias.detach().clone()
    v_w, v_b = torch.zeros_like(w), torch.zeros_like(b)
    for _ in range(2):
        weight.grad, bias.grad = (
            torch.randn(p.shape, generator=g, dtype=torch.float64) for p in (weight, bias)
        )
        local = eta * w.norm() / (weight.grad.norm() + decay * w.norm())
        v_w = momentum * v_w + min(local / lr, 1) * (weight.grad + decay * w)
        v_b = momentum * v_b + bias.grad
        w, b = w - lr * v_w, b - lr * v_b
        lars.step()
    torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(bias.detach(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {0: 1, 99: 1}),
        ("linear", {0: 1, 50: 1 - 0.999 / 2, 100: 1e-3}),
        ("cosine", {0: 1, 50: 0.5, 100: 0}),
        ("halfway", {0: 1, 49: 1, 50: 0.1, 99: 0.1}),
    ],
)
def test_schedules_follow_their_formulas(name, points):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make_schedule(optimizer, name, 100)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(100):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    for step, factor in points.items():
        assert rates[step] == pytest.approx(2 * factor, abs=1e-12)


def test_warm_up_rises_to_the_full_rate():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make_schedule(optimizer, "cosine", 20, warmup=10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([*[(k + 1) / 10 for k in range(10)], 1.0])


def test_released_resnet50_is_loaded_without_its_head(tmp_path, monkeypatch):
    theirs = torchvision.models.resnet50()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs.eval()
        head, theirs.fc = theirs.fc, torch.nn.Identity()
        expected = theirs(x)
        theirs.fc = head
        monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: theirs)
        for weights in (tmp_path / "resnet50.pth", "hub"):
            network = models.build("resnet50_target", 64, 0).eval()
            load_backbone(network, weights)
            torch.testing.assert_close(network.embed(x), expected, rtol=1e-3, atol=1e-3)


def test_unreachable_hub_error_names_the_alternative(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "load", refuse)
    with pytest.raises(UserError, match=r"no route.*--weights FILE"):
        load_backbone(models.build("resnet50_target", 64, 0), "hub")
