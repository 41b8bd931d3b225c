"""Kernel ridge regression on the features of a network: the closed-form head of the inner problem
(paper, 3.2)."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LARGER_RIDGE = (
    10  # factor on the ridge where the kernel is not positive definite with the usual one
)
LIMITS = {  # for `Run.limits`
    "larger_ridge": (
        0.1,
        "the kernel is not positive definite in that share of the steps; raise --ridge",
    )
}
_larger = {}  # type of device -> how many solves took the larger ridge


def with_bias(features):
    """Append a one to each feature vector: (n, d) to (n, d + 1)."""
    return F.pad(features, (0, 1), value=1.0)


def ridge_predict(f_real, f_syn, y_syn, ridge, per_image=False, bias=True):
    """Prediction h_W*(f_real) of the ridge head fitted to (f_syn, y_syn): (b, d_y).

    `f_real` (b, d_h), `f_syn` (m, d_h), `y_syn` (m, d_y); differentiable in f_syn and y_syn. Paper,
    equation 4: k_rs (k_ss + lambda I)^-1 y_syn, with lambda = `ridge` * trace(k_ss), held constant
    in the gradient, and divided by m if `per_image`; `bias` appends a one to the features. Where m
    is above d_h, the same comes from the system of d_h equations, f_real (f_syn^T f_syn + lambda
    I)^-1 f_syn^T y_syn. Products are in the precision of the features; the system, whose condition
    number grows as 1 / ridge, is solved in float64 where the device has it, by `solve`.
    """
    if bias:
        f_real, f_syn = with_bias(f_real), with_bias(f_syn)
    m, width = f_syn.shape
    if width < m:
        return f_real @ _solve_damped(
            f_syn.T @ f_syn, f_syn.T @ y_syn, ridge / (m if per_image else 1)
        )
    return kernel_predict(f_real @ f_syn.T, f_syn @ f_syn.T, y_syn, ridge, per_image)


def kernel_predict(k_rs, k_ss, y_syn, ridge, per_image=False):
    """As `ridge_predict`, from the kernels themselves: `k_rs` (b, m), `k_ss` (m, m)."""
    return k_rs @ _solve_damped(k_ss, y_syn, ridge / (len(k_ss) if per_image else 1))


def _solve_damped(k, y, ridge):
    """(k + ridge * trace(k) I)^-1 y, of the precision of k."""
    exact = torch.float32 if k.device.type == "mps" else torch.float64
    wide = k.to(exact)
    return solve(wide, ridge * wide.diagonal().sum().detach(), y.to(exact)).to(k.dtype)


def centred_one_hot(labels, num_classes):
    """Classes (n,) as 1 - 1/C at the class and -1/C elsewhere: (n, C) float32, rows sum to 0."""
    return F.one_hot(labels, num_classes).float() - 1 / num_classes


def solve(k, damping, y):
    """(k + damping I)^-1 y (m, d) by Cholesky, for a symmetric k (m, m) and y (m, d),
    differentiable in both.

    Where rounding has made that matrix not positive definite, 10 damping stands for damping, which
    `larger_ridges` counts; where that does not help, the result is NaN. The device is never waited
    for.
    """
    return _Solve.apply(k, damping, y)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, damping, y):
        factor = _factor(k, damping)
        dual = torch.cholesky_solve(y, factor)
        ctx.save_for_backward(factor, dual)
        return dual

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        factor, dual = ctx.saved_tensors
        by_y = torch.cholesky_solve(gradient, factor)
        return -by_y @ dual.T, None, by_y  # of A^-1 y by A: -(A^-T g) (A^-1 y)^T


def _factor(k, damping):
    """Lower Cholesky factor of k + damping I, or of k + 10 damping I, or NaN: (m, m)."""
    eye, device = torch.eye(len(k), dtype=k.dtype, device=k.device), k.device.type
    usual, info = torch.linalg.cholesky_ex(k + damping * eye)
    if device == "cpu" and not info:
        return usual
    larger, failed = torch.linalg.cholesky_ex(
        k + LARGER_RIDGE * damping * eye
    )  # elsewhere always: asking would mean waiting
    _larger[device] = _larger.get(device, 0) + (info > 0)
    return torch.where(info == 0, usual, torch.where(failed == 0, larger, torch.nan))


def larger_ridges(device):
    """How many solves have taken the larger ridge on `device` since the last call: a number, or a
    () tensor there."""
    return _larger.pop(device.type, 0)
