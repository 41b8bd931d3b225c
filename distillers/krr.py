"""Kernel ridge regression on network features: the closed-form head of the inner problem (3.2)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Factor on the ridge if the kernel is not positive definite with the given one.
LARGER_RIDGE = 10
LIMITS = {  # for `Run.limits`
    "larger_ridge": (
        0.1,
        "the kernel is not positive definite in this fraction of steps; raise --ridge",
    )
}


def with_bias(features):
    """Append a column of ones to features (n, d): (n, d + 1)."""
    return F.pad(features, (0, 1), value=1.0)


def ridge_predict(f_real, f_syn, y_syn, ridge, per_image=False, bias=True, fallbacks=None):
    """Fit the ridge head to (f_syn, y_syn) and return its prediction h_W*(f_real).

    Paper, equation 4: k_rs (k_ss + lambda I)^-1 y_syn. The result is differentiable in f_syn and
    y_syn. If m exceeds d_h, the equivalent system of d_h equations is solved:
    f_real (f_syn^T f_syn + lambda I)^-1 f_syn^T y_syn.

    Products use the precision of the features. The system is solved in float64 if the device
    supports it, because its condition number grows as 1 / ridge.

    Args:
        f_real: features of real images (b, d_h).
        f_syn: features of distilled images (m, d_h).
        y_syn: targets of the distilled images (m, d_y).
        ridge: lambda as a multiple of trace(k_ss). lambda is constant in the gradient.
        per_image: divide lambda by m.
        bias: append a column of ones to the features.
        fallbacks: see `solve`.

    Returns:
        Predicted targets (b, d_y).
    """
    if bias:
        f_real, f_syn = with_bias(f_real), with_bias(f_syn)
    m, width = f_syn.shape
    if width < m:
        k, y = f_syn.T @ f_syn, f_syn.T @ y_syn
        return f_real @ _solve_damped(k, y, ridge / (m if per_image else 1), fallbacks)
    return kernel_predict(f_real @ f_syn.T, f_syn @ f_syn.T, y_syn, ridge, per_image, fallbacks)


def kernel_predict(k_rs, k_ss, y_syn, ridge, per_image=False, fallbacks=None):
    """Return the prediction of `ridge_predict` for kernels `k_rs` (b, m) and `k_ss` (m, m)."""
    return k_rs @ _solve_damped(k_ss, y_syn, ridge / (len(k_ss) if per_image else 1), fallbacks)


def _solve_damped(k, y, ridge, fallbacks):
    """Return (k + ridge * trace(k) I)^-1 y in the precision of k."""
    exact = torch.float32 if k.device.type == "mps" else torch.float64
    wide = k.to(exact)
    damping = ridge * wide.diagonal().sum().detach()
    return solve(wide, damping, y.to(exact), fallbacks).to(k.dtype)


def centred_one_hot(labels, num_classes):
    """Return classes (n,) as centred one-hot rows (n, C) float32: 1 - 1/C and -1/C."""
    return F.one_hot(labels, num_classes).float() - 1 / num_classes


def solve(k, damping, y, fallbacks=None):
    """Return (k + damping I)^-1 y (m, d) by a Cholesky factorisation.

    The result is differentiable in k and y. If rounding makes the matrix not positive definite, 10
    times the damping is used. If that also fails, the result is NaN.

    Args:
        k: symmetric matrix (m, m).
        damping: scalar.
        y: right-hand sides (m, d).
        fallbacks: a list, or None. A () bool tensor is appended to it: whether the larger damping
            was used. On a CPU nothing is appended if it was not. The call does not synchronise
            with the device.
    """
    factor, fallback = _factorise(k.detach(), damping)
    if fallbacks is not None and fallback is not None:
        fallbacks.append(fallback)
    return _Solve.apply(k, factor, y)


class _Solve(torch.autograd.Function):
    """The solution for a matrix k + damping I, given its Cholesky factor."""

    @staticmethod
    def forward(ctx, k, factor, y):
        dual = torch.cholesky_solve(y, factor)
        ctx.save_for_backward(factor, dual)
        return dual

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        factor, dual = ctx.saved_tensors
        by_y = torch.cholesky_solve(gradient, factor)
        return (
            -by_y @ dual.T,
            None,
            by_y,
        )  # gradient with respect to A of A^-1 y: -(A^-T g) (A^-1 y)^T


def _factorise(k, damping):
    """Return the lower Cholesky factor (m, m) of k + damping I, or of k + 10 damping I, or NaN.

    Also returns whether the second was used, as a () tensor, or None if it was not on a CPU.
    """
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    factor, info = torch.linalg.cholesky_ex(k + damping * eye)
    if k.device.type == "cpu" and not info:
        return factor, None
    # A GPU computes both factors, because reading `info` would synchronise with the device.
    larger, failed = torch.linalg.cholesky_ex(k + LARGER_RIDGE * damping * eye)
    larger = torch.where(failed == 0, larger, torch.nan)
    return torch.where(info == 0, factor, larger), info > 0
