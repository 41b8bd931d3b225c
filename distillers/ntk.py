"""Exact neural tangent kernels of infinitely wide ReLU networks, differentiable in the images.

Every layer is z = sqrt(W / fan_in) w a + sqrt(B) b with standard normal w and b. As in KIP, W = 2
and B = 0.01. As the widths grow, two products converge for a pair of images: sigma, the product of
their pre-activations, and theta, the product of the gradients of these (Jacot et al. 2018; Arora et
al. 2019):

    sigma = W A[k] + B              theta = sigma + W A[theta]
    k = q kappa_1(sigma / q) / 2    theta = theta kappa_0(sigma / q) / 2
    q = sqrt(sigma_xx sigma_yy)

The first line is the linear part of a layer. Its k and theta on the right are those of the layer
below; at the input they are the mean product of the channels, and 0. The second line is the ReLU.
kappa_0(c) = (pi - arccos c) / pi and kappa_1(c) = sqrt(1 - c^2) / pi + c kappa_0(c) are the
arc-cosine kernels (Cho and Saul 2009). The kernel is the theta of a linear read-out.

fc: A is the identity.

conv: A averages over 3x3 windows with zero padding. For pixel p of x and p' of y,
sigma(p, p') = W / 9 sum_d k(p + d, p' + d) + B, where d runs over the nine shifts. A pair of pixels
therefore depends only on pairs with the same offset p' - p. A read-out of the flattened maps
averages over the pairs p = p', so that only offset 0 is needed: S^2 numbers per pair of images.
Pooling would mix the offsets and need S^4.
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

W, B = 2.0, 0.01  # variances of weights and biases; KIP: W_std sqrt(2), b_std 0.1
CPU_CHUNK, GPU_CHUNK = (
    2**19,
    2**23,
)  # numbers per array in a chunk: fits into a CPU cache, or keeps a GPU busy


class ArcCosine(torch.autograd.Function):
    """kappa_0 and kappa_1 of cosines.

    kappa_1' = kappa_0, and kappa_0' = 1 / (pi sqrt(1 - c^2)). If two directions are equal or
    opposite, kappa_0 is not differentiable in the images. Its gradient is then defined as 0.
    """

    @staticmethod
    def forward(ctx, c):
        c = (c * (1 + 1e-14)).clamp(
            -1, 1
        )  # equal directions get exactly 1; arccos turns an error of 1e-16 into 1e-8
        sine = ((1 - c) * (1 + c)).sqrt_()
        zero = 1 - c.acos() / torch.pi
        ctx.save_for_backward(zero, sine)
        return zero, torch.addcmul(sine / torch.pi, c, zero)

    @staticmethod
    def backward(ctx, grad_zero, grad_one):
        zero, sine = ctx.saved_tensors
        slope = torch.where(sine > 0, 1 / (torch.pi * sine), 0.0)
        return torch.addcmul(grad_one * zero, grad_zero, slope)


class WindowMean(torch.autograd.Function):
    """The mean over each 3x3 window of (S, S, ...) with zero padding.

    The map is symmetric, so its gradient is the map itself.
    """

    @staticmethod
    def forward(ctx, k):
        for axis in (0, 1):
            near = k / 3
            n = k.shape[axis] - 1
            near.narrow(axis, 1, n).add_(k.narrow(axis, 0, n), alpha=1 / 3)
            near.narrow(axis, 0, n).add_(k.narrow(axis, 1, n), alpha=1 / 3)
            k = near
        return k

    @staticmethod
    def backward(ctx, grad):
        return WindowMean.apply(grad)


def _tangent_kernel(x, y, depth, mean):
    """Return the kernel (n, m) of inputs x (S, S, n, c) and y (S, S, m, c) by the recursion."""
    k, theta = x @ y.mT / x.shape[-1], None  # (S, S, n, m)
    k_xx = x.square().mean(-1)[..., :, None]  # (S, S, n, 1)
    k_yy = y.square().mean(-1)[..., None, :]  # (S, S, 1, m)
    for _ in range(depth):
        sigma, s_xx, s_yy = (W * mean(each) + B for each in (k, k_xx, k_yy))
        theta = sigma if theta is None else sigma + W * mean(theta)
        q = s_xx.sqrt() * s_yy.sqrt()
        kappa_0, kappa_1 = ArcCosine.apply(sigma / q)
        k, theta = q * kappa_1 / 2, theta * kappa_0 / 2
        k_xx, k_yy = s_xx / 2, s_yy / 2
    return W * (k + theta).mean((0, 1)) + B


def fc(x, y, depth):
    """Return the kernel (n, m) with `depth` hidden layers of images (n, 3, S, S), (m, 3, S, S)."""
    return _tangent_kernel(x.flatten(1)[None, None], y.flatten(1)[None, None], depth, lambda k: k)


def conv(x, y, depth):
    """Return the kernel (n, m) with `depth` convolutions of images (n, 3, S, S), (m, 3, S, S)."""
    return _tangent_kernel(x.permute(2, 3, 0, 1), y.permute(2, 3, 0, 1), depth, WindowMean.apply)


KERNELS = {"fc": fc, "conv": conv}


def kernel(name, x, y, depth, chunk=None):
    """Return the kernel (n, m) between images x (n, 3, S, S) and y (m, 3, S, S), in y's dtype.

    The kernel is computed for a few images of x at a time, and recomputed for the gradient.

    Args:
        name: one of `KERNELS`.
        x, y: images.
        depth: number of layers.
        chunk: most numbers in an intermediate array, but at least those of one image of x and all
            images of y. The default depends on the device.
    """
    chunk = chunk or (CPU_CHUNK if y.device.type == "cpu" else GPU_CHUNK)
    per_image = len(y) * (y.shape[-1] ** 2 if name == "conv" else 1)
    # With use_reentrant=False, fragmentation makes the CPU's memory grow with each chunk.
    remade = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)

    def rows(part):
        function = partial(remade, KERNELS[name]) if y.requires_grad else KERNELS[name]
        return function(part.to(y.dtype), y, depth)

    return torch.cat([rows(part) for part in x.split(max(1, chunk // per_image))])
