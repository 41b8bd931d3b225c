"""Kernel ridge regression on the features of a network: the closed-form head of the inner problem
(paper, 3.2)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Factor on the ridge where the kernel is not positive definite with the usual one.
LARGER_RIDGE = 10
LIMITS = {  # for `Run.limits`
    "larger_ridge": (
        0.1,
        "the kernel is not positive definite in that share of the steps; raise --ridge",
    )
}


def with_bias(features):
    """Append a one to each feature vector: (n, d) to (n, d + 1)."""
    return F.pad(features, (0, 1), value=1.0)


def ridge_predict(f_real, f_syn, y_syn, ridge, per_image=False, bias=True, fallbacks=None):
    """Prediction h_W*(f_real) (b, d_y) of the ridge head fitted to (f_syn, y_syn).

    Paper, equation 4: k_rs (k_ss + lambda I)^-1 y_syn, differentiable in f_syn and y_syn. `f_real`
    (b, d_h) and `f_syn` (m, d_h) are features, `y_syn` (m, d_y) their targets. lambda is `ridge`
    times trace(k_ss), divided by m if `per_image`, and is held constant in the gradient. `bias`
    appends a one to the features. `fallbacks`: see `solve`.

    Where m exceeds d_h, the equivalent system of d_h equations is solved:
    f_real (f_syn^T f_syn + lambda I)^-1 f_syn^T y_syn. Products are in the precision of the
    features, the system in float64 where the device supports it, since its condition number grows
    as 1 / ridge.
    """
    if bias:
        f_real, f_syn = with_bias(f_real), with_bias(f_syn)
    m, width = f_syn.shape
    if width < m:
        k, y = f_syn.T @ f_syn, f_syn.T @ y_syn
        return f_real @ _solve_damped(k, y, ridge / (m if per_image else 1), fallbacks)
    return kernel_predict(f_real @ f_syn.T, f_syn @ f_syn.T, y_syn, ridge, per_image, fallbacks)


def kernel_predict(k_rs, k_ss, y_syn, ridge, per_image=False, fallbacks=None):
    """As `ridge_predict`, from the kernels themselves: `k_rs` (b, m), `k_ss` (m, m)."""
    return k_rs @ _solve_damped(k_ss, y_syn, ridge / (len(k_ss) if per_image else 1), fallbacks)


def _solve_damped(k, y, ridge, fallbacks):
    """(k + ridge * trace(k) I)^-1 y, of the precision of k."""
    exact = torch.float32 if k.device.type == "mps" else torch.float64
    wide = k.to(exact)
    damping = ridge * wide.diagonal().sum().detach()
    return solve(wide, damping, y.to(exact), fallbacks).to(k.dtype)


def centred_one_hot(labels, num_classes):
    """Classes (n,) as 1 - 1/C at the class and -1/C elsewhere: (n, C) float32, rows sum to 0."""
    return F.one_hot(labels, num_classes).float() - 1 / num_classes


def solve(k, damping, y, fallbacks=None):
    """(k + damping I)^-1 y (m, d) by Cholesky, for a symmetric k (m, m) and y (m, d).

    Differentiable in k and y. Where rounding makes that matrix not positive definite, 10 times the
    damping is used; where that fails too, the result is NaN. If a list `fallbacks` is given, a ()
    tensor is appended that says whether the larger damping was used (nothing on a CPU if it was
    not); the device is not waited for.
    """
    factor, fallback = _factorise(k.detach(), damping)
    if fallbacks is not None and fallback is not None:
        fallbacks.append(fallback)
    return _Solve.apply(k, factor, y)


class _Solve(torch.autograd.Function):
    """The solution for a matrix k + damping I whose Cholesky factor is given."""

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
        return -by_y @ dual.T, None, by_y  # of A^-1 y by A: -(A^-T g) (A^-1 y)^T


def _factorise(k, damping):
    """Lower Cholesky factor (m, m) of k + damping I, of k + 10 damping I, or NaN.

    Also returns whether the second was taken, as a () tensor; None on a CPU where it was not.
    """
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    factor, info = torch.linalg.cholesky_ex(k + damping * eye)
    if k.device.type == "cpu" and not info:
        return factor, None
    # On a GPU always, since asking for `info` would wait for the device.
    larger, failed = torch.linalg.cholesky_ex(k + LARGER_RIDGE * damping * eye)
    larger = torch.where(failed == 0, larger, torch.nan)
    return torch.where(info == 0, factor, larger), info > 0
