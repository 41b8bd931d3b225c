"""Neural tangent kernels of infinitely wide ReLU networks, exact and differentiable in the images.

Every layer is z = sqrt(W / fan_in) w a + sqrt(B) b with w and b standard normal, as KIP has it: W =
2, B = 0.01. As the widths grow, the products of two images' pre-activations and of their gradients
tend to (Jacot et al. 2018; Arora et al. 2019)

    sigma = W A[k] + B              theta = sigma + W A[theta]
    k = q kappa_1(sigma / q) / 2    theta = theta kappa_0(sigma / q) / 2
    q = sqrt(sigma_xx sigma_yy)

where k and theta on the right are those below the layer (at the input: the mean product of the
channels, and 0), the second line is the ReLU's, and kappa_0(c) = (pi - arccos c) / pi and
kappa_1(c) = sqrt(1 - c^2) / pi + c kappa_0(c) are the arc-cosine kernels (Cho and Saul 2009). The
kernel is the theta of a linear read-out.

fc: A is the identity. conv: 3x3 windows, padded with zeros. Pixel p of x and p' of y then have
sigma(p, p') = W / 9 sum_d k(p + d, p' + d) + B, over the nine shifts d: pairs at one offset p' - p
are made of pairs at the same offset alone. A read-out of the flattened maps averages over the pairs
p = p', so that offset 0 is all there is to compute: A is the mean over a window, S^2 numbers a pair
of images. (Pooling mixes the offsets: S^4.)
"""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

W, B = 2.0, 0.01  # the variances of weights and biases: KIP's W_std sqrt(2) and b_std 0.1
CPU_CHUNK, GPU_CHUNK = (
    2**19,
    2**23,
)  # numbers in an array of a chunk: what the cache holds, what keeps a GPU busy


class ArcCosine(torch.autograd.Function):
    """kappa_0 and kappa_1 of cosines.

    kappa_1' = kappa_0, and kappa_0' = 1 / (pi sqrt(1 - c^2)). Where the directions are equal or
    opposite, kappa_0 has the tip of a cone in the images: the gradient there is taken as 0.
    """

    @staticmethod
    def forward(ctx, c):
        c = (c * (1 + 1e-14)).clamp(
            -1, 1
        )  # a pair of equals is one: arccos would make 1e-8 of an error of 1e-16
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
    """The mean over each 3x3 window of (S, S, ...), padded with zeros. A symmetric map: its own
    gradient."""

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
    """The recursion, for inputs (positions, positions, n, c) and (positions, positions, m, c): (n,
    m)."""
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
    """Kernel (n, m) of `depth` hidden layers, between images (n, 3, S, S) and (m, 3, S, S)."""
    return _tangent_kernel(x.flatten(1)[None, None], y.flatten(1)[None, None], depth, lambda k: k)


def conv(x, y, depth):
    """Kernel (n, m) of `depth` convolutions, between images (n, 3, S, S) and (m, 3, S, S)."""
    return _tangent_kernel(x.permute(2, 3, 0, 1), y.permute(2, 3, 0, 1), depth, WindowMean.apply)


KERNELS = {"fc": fc, "conv": conv}


def kernel(name, x, y, depth, chunk=None):
    """The kernel `name` (one of `KERNELS`) between images x (n, 3, S, S) and y (m, 3, S, S): (n, m)
    of y's type.

    It is made of a few images of x at a time, and made again for the gradient: no array but the
    result has more than `chunk` numbers, or those of one image of x and all of y.
    """
    chunk = chunk or (CPU_CHUNK if y.device.type == "cpu" else GPU_CHUNK)
    per_image = len(y) * (y.shape[-1] ** 2 if name == "conv" else 1)
    # checkpoint's other way, without reentry, leaves the CPU's memory in such pieces that it grows
    # by each chunk.
    remade = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)

    def rows(part):
        function = partial(remade, KERNELS[name]) if y.requires_grad else KERNELS[name]
        return function(part.to(y.dtype), y, depth)

    return torch.cat([rows(part) for part in x.split(max(1, chunk // per_image))])
