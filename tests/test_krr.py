"""The ridge head and its gradient against the primal solution and central differences."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from distillers import krr
from distillers.krr import append_bias, ridge_predict


def draw_features(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize(("m", "d_h"), [(6, 20), (20, 6)])
def test_dual_prediction_equals_explicit_primal_solution(m, d_h, per_image, bias):
    g = torch.Generator().manual_seed(0)
    f_real, f_syn, y = draw_features(g, 9, d_h), draw_features(g, m, d_h), draw_features(g, m, 4)
    ours = ridge_predict(f_real, f_syn, y, 1e-3, per_image, bias)
    if bias:
        f_real, f_syn = append_bias(f_real), append_bias(f_syn)
    damping = 1e-3 * torch.trace(f_syn @ f_syn.T) / (m if per_image else 1)
    # argmin_W ||f_syn W - y||^2 + damping ||W||^2, solved for W (d_h, d_y) itself
    primal = (
        torch.linalg.inv(f_syn.T @ f_syn + damping * torch.eye(f_syn.shape[1], dtype=torch.float64))
        @ f_syn.T
        @ y
    )
    torch.testing.assert_close(ours, f_real @ primal, rtol=1e-9, atol=1e-9)


def test_bias_column_predicts_a_constant_that_features_alone_cannot():
    g = torch.Generator().manual_seed(1)
    f_real, f_syn, y = (
        draw_features(g, 5, 3),
        draw_features(g, 40, 3),
        torch.full((40, 2), 7.0, dtype=torch.float64),
    )
    torch.testing.assert_close(ridge_predict(f_real, f_syn, y, 1e-12), torch.full_like(y[:5], 7.0))
    assert (ridge_predict(f_real, f_syn, y, 1e-12, bias=False) - 7).abs().max() > 1


def test_meta_gradients_agree_with_central_differences():
    """Check d loss / d X_s and d loss / d Y_s through a ConvNet, with a constant ridge."""
    torch.manual_seed(0)
    network = models.build("convnet3", 32, 4, width=0.03).double()
    network(
        torch.randn(16, 3, 32, 32, dtype=torch.float64)
    )  # running statistics other than 0 and 1
    network.eval().requires_grad_(False)
    x_real, y_real = (
        torch.randn(12, 3, 32, 32, dtype=torch.float64),
        torch.randn(12, 4, dtype=torch.float64),
    )
    x, y = torch.randn(5, 3, 32, 32, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    x.requires_grad_(), y.requires_grad_()
    f_real = network.embed(x_real)
    ridge, start = 1e-2, append_bias(network.embed(x.detach()))
    trace = (start @ start.T).trace()

    def loss_at(x, y):
        f = append_bias(network.embed(x))
        k = f @ f.T
        dual = torch.linalg.inv(k + ridge * trace * torch.eye(len(f), dtype=torch.float64)) @ y
        return (y_real - append_bias(f_real) @ f.T @ dual).square().mean()

    loss = torch.nn.functional.mse_loss(ridge_predict(f_real, network.embed(x), y, ridge), y_real)
    loss.backward()
    torch.testing.assert_close(loss, loss_at(x, y))
    for tensor, other in ((x, y), (y, x)):
        for seed in range(8):
            direction = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
            )
            h = 1e-5
            with torch.no_grad():
                ends = [(tensor + s * h * direction, other) for s in (1, -1)]
                up, down = (loss_at(*(pair if tensor is x else pair[::-1])) for pair in ends)
            numeric = (up - down) / (2 * h)
            torch.testing.assert_close(
                (tensor.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-9
            )


def test_float32_prediction_is_close_to_float64_at_the_default_ridge():
    g = torch.Generator().manual_seed(2)
    f_real, f_syn, y = (
        draw_features(g, 50, 400).relu(),
        draw_features(g, 200, 400).relu(),
        draw_features(g, 200, 16),
    )
    exact = ridge_predict(f_real, f_syn, y, 1e-6)
    ours = ridge_predict(f_real.float(), f_syn.float(), y.float(), 1e-6)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() / exact.norm() < 1e-3


def indefinite(m=4):
    """A symmetric matrix with eigenvalues -0.5 and 1, and right-hand sides."""
    g = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(draw_features(g, m, m)).Q
    return q @ torch.diag(torch.tensor([-0.5, 1, 1, 1]).double()) @ q.T, draw_features(g, m, 2)


def solve_without_reading(monkeypatch, *args, **kwargs):
    """`krr.solve` as on a GPU."""
    factorise = krr._factorise
    monkeypatch.setattr(
        krr, "_factorise", lambda *args, read, **kwargs: factorise(*args, read=False, **kwargs)
    )
    return krr.solve(*args, **kwargs)


@pytest.mark.parametrize("safe", [False, True])
def test_solve_on_a_gpu_equals_that_on_a_cpu(safe, monkeypatch):
    g, fallbacks = torch.Generator().manual_seed(0), []
    f = draw_features(g, 6, 9)
    k, y = (f @ f.T).requires_grad_(), draw_features(g, 6, 3).requires_grad_()
    ours, theirs = krr.solve(k, 1e-3, y), torch.linalg.inv(k + 1e-3 * torch.eye(6).double()) @ y
    there = solve_without_reading(monkeypatch, k, 1e-3, y, fallbacks, safe)
    assert fallbacks == [False]
    assert torch.equal(there, ours)
    torch.testing.assert_close(ours, theirs)
    weights = draw_features(g, 6, 3)
    expected = torch.autograd.grad((theirs * weights).sum(), [k, y])
    for solution in (ours, there):
        found = torch.autograd.grad((solution * weights).sum(), [k, y], retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_failure_on_a_gpu_takes_ten_times_the_damping(monkeypatch):
    (k, y), fallbacks = indefinite(), []
    found = solve_without_reading(monkeypatch, k, 0.1, y, fallbacks)
    torch.testing.assert_close(found, torch.linalg.inv(k + 1.0 * torch.eye(4).double()) @ y)
    assert fallbacks == [True]
    assert solve_without_reading(monkeypatch, k, 0.01, y).isnan().any()


def test_failure_with_a_safe_ridge_on_a_gpu_takes_an_infinite_damping(monkeypatch):
    (k, y), fallbacks = indefinite(), []
    k.requires_grad_(), y.requires_grad_()
    found = solve_without_reading(monkeypatch, k, 0.1, y, fallbacks, safe=True)
    gradients = torch.autograd.grad(found.sum(), [k, y])
    assert fallbacks == [True]
    assert not any(each.any() for each in (found, *gradients))
    limit = torch.linalg.inv(k + 1e9 * torch.eye(4).double()) @ y
    torch.testing.assert_close(limit, found, rtol=0, atol=1e-8)
    broken = k.detach().clone()
    broken[0, 0] = torch.nan
    assert solve_without_reading(monkeypatch, broken, 0.1, y, safe=True).isnan().all()


class Factorisations(TorchDispatchMode):
    """Counts Cholesky factorisations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "cholesky_ex" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "ridge", "expected"),
    [("cpu", 1e-6, 1), ("cpu", 1e-7, 1), ("meta", 1e-6, 1), ("meta", 1e-7, 2)],
)
def test_number_of_factorisations(device, ridge, expected):
    f = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    y = torch.ones(6, 2, device=device)
    with Factorisations() as counted:
        ridge_predict(f, f, y, ridge).sum().backward()
    assert counted.count == expected


def test_refined_float32_factor_is_near_float64():
    """The loss of precision of a float32 factor at the default ridge, and its correction."""
    g = torch.Generator().manual_seed(4)
    f, y = (
        append_bias(draw_features(g, 300, 500).relu()),
        draw_features(g, 300, 16).requires_grad_(),
    )
    k = (f @ f.T).requires_grad_()
    damping = 1e-6 * k.trace().detach()
    exact = krr.solve(k, damping, y)
    refined = krr.solve(k, damping, y, refine=True)
    factor = torch.linalg.cholesky((k + damping * torch.eye(300)).float())
    rough = torch.cholesky_solve(y.float(), factor)

    def error(found, expected):
        return ((found - expected).norm() / expected.norm()).item()

    assert error(refined, exact) < error(rough, exact) / 20 and error(refined, exact) < 1e-5
    weights = draw_features(g, 300, 16)
    found, expected = (
        torch.autograd.grad((each * weights).sum(), [k, y]) for each in (refined, exact)
    )
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-5


def test_inner_products_with_tf32_are_scoped(monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    product = krr._inner
    monkeypatch.setattr(krr, "_inner", lambda a, b: seen.append(matmul.allow_tf32) or product(a, b))
    assert not matmul.allow_tf32
    g = torch.Generator().manual_seed(5)
    a, b = draw_features(g, 4, 7).requires_grad_(), draw_features(g, 5, 7).requires_grad_()
    ours, plain = krr._Tf32Inner.apply(a, b), a @ b.T
    assert seen == [True] and not matmul.allow_tf32
    weights = draw_features(g, 4, 5)
    torch.testing.assert_close(
        *(torch.autograd.grad((each * weights).sum(), [a, b]) for each in (ours, plain))
    )
    f = b.detach().requires_grad_()  # the same features twice
    both = torch.autograd.grad(krr._Tf32Inner.apply(f, f).square().sum(), f)
    torch.testing.assert_close(both, torch.autograd.grad((f @ f.T).square().sum(), f))
    assert not matmul.allow_tf32
