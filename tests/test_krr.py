"""The ridge head and its gradient against the primal solution and central differences."""

import pytest
import torch

import models
from distillers.krr import ridge_predict, with_bias


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
        f_real, f_syn = with_bias(f_real), with_bias(f_syn)
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
    ridge, start = 1e-2, with_bias(network.embed(x.detach()))
    trace = (start @ start.T).trace()

    def loss_at(x, y):
        f = with_bias(network.embed(x))
        k = f @ f.T
        dual = torch.linalg.inv(k + ridge * trace * torch.eye(len(f), dtype=torch.float64)) @ y
        return (y_real - with_bias(f_real) @ f.T @ dual).square().mean()

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
