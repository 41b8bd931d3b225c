"""Optimisers and learning-rate schedules by name."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR


class LARS(torch.optim.Optimizer):
    """SGD with momentum, whose step is scaled per tensor by the weight norm over the gradient norm.

    You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, equation 6,
    with the scaled rate clipped at `lr`. One-dimensional tensors (biases, batch norm) take plain
    momentum steps without weight decay. The default momentum and eta are those of the recipe in
    pretrain_target.py.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["lr"] == 0:
                continue
            weights = [each for each in group["params"] if each.grad is not None]
            matrices = [each for each in weights if each.ndim > 1]
            updates = {each: each.grad for each in weights}
            updates |= zip(matrices, self._scaled(group, matrices), strict=True)
            for weight in weights:
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, [*updates.values()])
            torch._foreach_sub_(weights, torch._foreach_mul(buffers, group["lr"]))

    def _scaled(self, group, weights):
        """Return the gradients of `weights` with weight decay, scaled by their rates over `lr`."""
        gradients, decay = [each.grad for each in weights], group["weight_decay"]
        norms, gradient_norms = _norms(weights), _norms(gradients)
        rates = group["eta"] * norms / (gradient_norms + decay * norms + 1e-8)
        # A norm of 0 means a plain step.
        rates = torch.where((norms > 0) & (gradient_norms > 0), rates, group["lr"])
        scales = (rates / group["lr"]).clamp(max=1.0)
        updates = torch._foreach_mul(weights, decay)
        torch._foreach_add_(updates, gradients)
        torch._foreach_mul_(updates, [*scales.unbind()])
        return updates


class LAMB(torch.optim.Optimizer):
    """Adam with each tensor's step scaled to the norm `lr` times the tensor's norm.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR
    2020, Algorithm 2, with the identity as phi and without weight decay. If the norm of the tensor
    or of the step is 0, the step is Adam's.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = [each for each in group["params"] if each.grad is not None]
            for weight in weights:
                if not (state := self.state[weight]):
                    state["step"], state["m"], state["v"] = (
                        0,
                        torch.zeros_like(weight),
                        torch.zeros_like(weight),
                    )
                state["step"] += 1
            gradients = [each.grad for each in weights]
            corrected = []
            for name, beta, samples in zip(
                "mv",
                group["betas"],
                (gradients, torch._foreach_mul(gradients, gradients)),
                strict=True,
            ):
                means = [self.state[each][name] for each in weights]
                torch._foreach_lerp_(means, samples, 1 - beta)
                bias = [1 - beta ** self.state[each]["step"] for each in weights]
                corrected.append(torch._foreach_div(means, bias))
            updates, roots = corrected
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(updates, roots)
            norms, update_norms = _norms(weights), _norms(updates)
            ratios = torch.where((norms > 0) & (update_norms > 0), norms / update_norms, 1.0)
            torch._foreach_mul_(updates, [*(group["lr"] * ratios).unbind()])
            torch._foreach_sub_(weights, updates)


def _norms(tensors):
    """Return the Euclidean norms (n,) of n tensors."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack(torch._foreach_norm(tensors))


def make_optimizer(name, params, lr, weight_decay=0.0, momentum=0.9):
    """Return an optimiser.

    Args:
        name: sgd (with `momentum`), adam, adamw (both with betas 0.9 and 0.999), lars (momentum
            0.9) or lamb (Adam's betas, no weight decay).
        params: parameters or parameter groups.
        lr: learning rate.
        weight_decay: weight decay; ignored by lamb.
        momentum: momentum of sgd.
    """
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "lamb":
        return LAMB(params, lr=lr)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lars": LARS}
    return kinds[name](params, lr=lr, weight_decay=weight_decay)


def gradient_norm(params):
    """Return the Euclidean norm of all gradients together, a scalar tensor on their device."""
    return torch.nn.utils.get_total_norm(
        [weight.grad for weight in params if weight.grad is not None]
    )


def make_schedule(optimizer, name, steps, warmup=0):
    """Return a learning-rate scheduler.

    Args:
        optimizer: torch optimiser.
        name: constant; linear, which decays to 1/1000 of the initial rate; cosine, to 0;
            cosine_to_tenth, to 1/10; or halfway, which divides the rate by 10 after half the steps.
        steps: total number of calls of `scheduler.step()`, one after each optimiser step.
        warmup: number of first steps over which the rate rises linearly from near 0.
    """
    length = max(1, steps - warmup)
    curves = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1.0 - (1.0 - 1e-3) * done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "cosine_to_tenth": lambda done: 0.1 + 0.45 * (1.0 + math.cos(math.pi * done)),
        "halfway": lambda done: 1.0 if done < 0.5 else 0.1,
    }
    curve = curves[name]

    def factor(step):
        return (step + 1) / warmup if step < warmup else curve(min(1.0, (step - warmup) / length))

    return LambdaLR(optimizer, factor)
