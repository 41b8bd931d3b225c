"""Optimisers and learning-rate schedules, one builder for each."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor by the ratio of the norms of weight and gradient.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, equation 6, with the scaled
    rate clipped at `lr`. Tensors of one dimension (biases, batch norm) take plain momentum steps without weight
    decay. Defaults are those of the recipe in `pretrain_target.py`.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["lr"] == 0:
                continue
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if weight.ndim > 1:
                    norm, grad_norm = weight.norm(), update.norm()
                    rate = group["eta"] * norm / (grad_norm + group["weight_decay"] * norm + 1e-8)
                    rate = torch.where((norm > 0) & (grad_norm > 0), rate, group["lr"])  # 0/0: a plain step
                    update = (update + group["weight_decay"] * weight) * (rate / group["lr"]).clamp(max=1.0)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                weight.sub_(group["lr"] * state["momentum_buffer"])


def optimizer(name, params, lr, weight_decay):
    """`name`: sgd (momentum 0.9), adamw (betas 0.9 and 0.999) or lars (momentum 0.9)."""
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
    return {"lars": LARS}[name](params, lr=lr, weight_decay=weight_decay)


def gradient_norm(params):
    """Euclidean norm of all gradients together, as a () tensor on their device."""
    return torch.nn.utils.get_total_norm([weight.grad for weight in params if weight.grad is not None])


def schedule(optimizer, name, steps, warmup=0):
    """A scheduler to be stepped after each of `steps` optimiser steps; the first `warmup` rise linearly from near 0.

    `name`: constant; linear, to 1/1000 of the initial rate; cosine, to 0; halfway, divided by 10 after half the steps.
    """
    length = max(1, steps - warmup)
    curves = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1.0 - (1.0 - 1e-3) * done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "halfway": lambda done: 1.0 if done < 0.5 else 0.1,
    }
    curve = curves[name]

    def factor(step):
        return (step + 1) / warmup if step < warmup else curve(min(1.0, (step - warmup) / length))

    return LambdaLR(optimizer, factor)
