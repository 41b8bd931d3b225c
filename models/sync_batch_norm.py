"""Batch norm with the statistics of all ranks, for the same results as with one process.

PyTorch's SyncBatchNorm supports GPUs only.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils import distributed


def _sums(*parts):
    """Return the sums over all ranks of `parts`, (c,) each, in one collective operation."""
    return distributed.all_reduce_sum(torch.cat(parts)).split([len(part) for part in parts])


class _Standardise(torch.autograd.Function):
    """Standardise each channel of x (n, c, ...) over all ranks.

    Returns the result, the mean (c,), the variance (c,), and the number of values per channel over
    all ranks, a scalar tensor.
    """

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
    """Standardise each column of x (b, d) over all ranks.

    Returns:
        The result (b, d) and the number of rows of all ranks.
    """
    if distributed.world_size() == 1:
        return F.batch_norm(x, None, None, training=True, eps=eps), len(x)
    x, _, _, n = _Standardise.apply(x, eps)
    return x, n


def _forward(layer, x):
    if not layer.training:
        return type(layer).forward(layer, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 sums are not precise enough
    y, mean, variance, n = _Standardise.apply(wide, layer.eps)
    if layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked += 1
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(variance * n / (n - 1), layer.momentum)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (y * layer.weight.view(shape) + layer.bias.view(shape)).to(x.dtype)


@contextlib.contextmanager
def synchronise_batch_norm(*networks):
    """Context in which batch norm of `networks` in train mode uses the statistics of all ranks."""
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
