"""LARS and LAMB against loops over the tensors, which follow the papers line by line."""

import pytest
import torch

from utils import optim


def lars(weights, states, lr, decay, momentum=0.9, eta=0.02):
    for weight, state in zip(weights, states, strict=True):
        update = weight.grad
        if weight.ndim > 1:
            norm, grad_norm = weight.norm(), update.norm()
            rate = eta * norm / (grad_norm + decay * norm + 1e-8)
            rate = torch.where((norm > 0) & (grad_norm > 0), rate, lr)
            update = (update + decay * weight) * (rate / lr).clamp(max=1.0)
        state["b"] = momentum * state.get("b", torch.zeros_like(weight)) + update
        weight -= lr * state["b"]


def lamb(weights, states, lr, decay, betas=(0.9, 0.999), eps=1e-6):
    for weight, state in zip(weights, states, strict=True):
        step = state["step"] = state.get("step", 0) + 1
        for name, beta, sample in (
            ("m", betas[0], weight.grad),
            ("v", betas[1], weight.grad.square()),
        ):
            state[name] = torch.lerp(state.get(name, torch.zeros_like(weight)), sample, 1 - beta)
        m, v = (state[name] / (1 - beta**step) for name, beta in zip("mv", betas, strict=True))
        update = m / (v.sqrt() + eps)
        norm, update_norm = weight.norm(), update.norm()
        ratio = torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
        weight -= lr * ratio * update


@pytest.mark.parametrize(("name", "loop"), [("lars", lars), ("lamb", lamb)])
def test_steps_equal_those_of_a_loop(name, loop):
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (4,), (5, 7), (2, 2), (3, 3)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    start[3].zero_()  # a norm of 0
    ours, theirs = ([each.clone().requires_grad_() for each in start] for _ in range(2))
    optimizer = optim.make_optimizer(name, ours, 0.3, weight_decay=1e-2)
    states = [{} for _ in start]
    unused = torch.zeros(2, requires_grad=True)  # no gradient
    optimizer.param_groups[0]["params"].append(unused)
    for step in range(5):
        lr = optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
        for a, b in zip(ours, theirs, strict=True):
            scale = 100.0 if step % 2 else 0.01  # clipped and not
            a.grad = scale * torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        ours[4].grad.zero_(), theirs[4].grad.zero_()
        optimizer.step()
        with torch.no_grad():
            loop(theirs, states, lr, 1e-2)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not unused.any()
