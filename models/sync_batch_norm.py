"""Batch norm over the images of all ranks, so that several processes compute what one would on the
whole batch.

PyTorch's own SyncBatchNorm needs a GPU.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils import distributed


def _sums(*parts):
    """Sums of `parts` (each (c,)) over all ranks, in one collective."""
    return distributed.all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])


class _Standardise(torch.autograd.Function):
    """x (n, c, ...) less its mean, over its deviation; both over all ranks. Also returns mean,
    variance (c,), and how many values a channel has over all ranks ()."""

    @staticmethod
    def forward(ctx, x, eps):
        ctx.dims, ctx.shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        total, n = _sums(x.sum(ctx.dims), x.new_tensor([x.numel() / x.shape[1]]))
        mean = total / n
        x = x - mean.view(ctx.shape)
        (squares,) = _sums(x.square().sum(ctx.dims))
        variance = squares / n
        inverse = (variance + eps).rsqrt()
        x = x.mul_(inverse.view(ctx.shape))
        ctx.save_for_backward(x, inverse, n)
        ctx.mark_non_differentiable(mean, variance, n)
        return x, mean, variance, n

    @staticmethod
    def backward(ctx, gradient, *_):
        x, inverse, n = ctx.saved_tensors
        total, along = _sums(gradient.sum(ctx.dims), (gradient * x).sum(ctx.dims))
        total, along, inverse = (each.view(ctx.shape) for each in (total / n, along / n, inverse))
        return inverse * (gradient - total - x * along), None


def standardise(x, eps=1e-5):
    """x (b, d) with zero mean and unit variance in each column over all ranks, and how many rows
    they have together."""
    if distributed.world_size() == 1:
        return F.batch_norm(x, None, None, training=True, eps=eps), len(x)
    x, _, _, n = _Standardise.apply(x, eps)
    return x, n


def _forward(layer, x):
    if not layer.training:
        return type(layer).forward(layer, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sums in bf16 are too coarse
    y, mean, variance, n = _Standardise.apply(wide, layer.eps)
    if layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(variance * n / (n - 1), layer.momentum)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (y * layer.weight.view(shape) + layer.bias.view(shape)).to(x.dtype)


@contextlib.contextmanager
def synchronised(*networks):
    """Within: in train mode, the batch norm of `networks` takes its statistics over all ranks."""
    found = [
        each for network in networks for each in network.modules() if isinstance(each, _BatchNorm)
    ]
    found = found if distributed.world_size() > 1 else []
    for layer in found:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in found:
            del layer.forward
