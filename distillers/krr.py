"""Kernel ridge regression on network features: the closed-form head of the inner problem (3.2)."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Factor on the ridge if the kernel is not positive definite with the given one.
LARGER_RIDGE = 10
# From this ridge on, a float32 kernel plus the ridge is expected to be positive definite: the
# eigenvalues of its rounding errors are about 1e-8 of the trace.
SAFE_RIDGE = 1e-6
# A GPU is slow in float64 if its products take this many times as long as in float32: data-centre
# GPUs take 2 times, consumer GPUs 32 or 64 times.
SLOW_FLOAT64 = 8
LIMITS = {  # for `Run.limits`
    "larger_ridge": (
        0.1,
        "the kernel is not positive definite in this fraction of steps; raise --ridge",
    )
}


def append_bias(features):
    """Append a column of ones to features (n, d): (n, d + 1)."""
    return F.pad(features, (0, 1), value=1.0)


def ridge_predict(
    f_real, f_syn, y_syn, ridge, per_image=False, bias=True, fallbacks=None, precision="fp32"
):
    """Fit the ridge head to (f_syn, y_syn) and return its prediction h_W*(f_real).

    Paper, equation 4: k_rs (k_ss + lambda I)^-1 y_syn. The result is differentiable in f_syn and
    y_syn. If m exceeds d_h, the equivalent system of d_h equations is solved:
    f_real (f_syn^T f_syn + lambda I)^-1 f_syn^T y_syn.

    Products use the precision of the features. On CUDA, products of features that a network
    computed in bf16 use TF32, which represents them exactly. The system is solved in float64 if the
    device supports it, because its condition number grows as 1 / ridge.

    Args:
        f_real: features of real images (b, d_h).
        f_syn: features of distilled images (m, d_h).
        y_syn: targets of the distilled images (m, d_y).
        ridge: lambda as a multiple of trace(k_ss). lambda is constant in the gradient.
        per_image: divide lambda by m.
        bias: append a column of ones to the features.
        fallbacks: see `solve`.
        precision: precision of the network, as --precision.

    Returns:
        Predicted targets (b, d_y).
    """
    if bias:
        f_real, f_syn = append_bias(f_real), append_bias(f_syn)
    m, width = f_syn.shape
    inner = _Tf32Inner.apply if precision == "bf16" and f_syn.is_cuda else _inner
    if width < m:
        k, y = inner(f_syn.T, f_syn.T), f_syn.T @ y_syn
        return f_real @ _solve_damped(k, y, ridge / (m if per_image else 1), fallbacks)
    k_rs, k_ss = inner(f_real, f_syn), inner(f_syn, f_syn)
    return kernel_predict(k_rs, k_ss, y_syn, ridge, per_image, fallbacks)


def _inner(a, b):
    """Return the inner products (n, m) of the rows of a (n, d) and b (m, d)."""
    return a @ b.T


class _Tf32Inner(torch.autograd.Function):
    """`_inner` and its gradient with TF32 inputs. The gradient is rounded to bf16 later anyway."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with allow_tf32():
            return _inner(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        a, b = ctx.saved_tensors
        with allow_tf32():
            by_a = gradient @ b if ctx.needs_input_grad[0] else None
            by_b = gradient.T @ a if ctx.needs_input_grad[1] else None
        return by_a, by_b


@contextlib.contextmanager
def allow_tf32():
    """Context in which matrix products of float32 on CUDA use TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def kernel_predict(k_rs, k_ss, y_syn, ridge, per_image=False, fallbacks=None):
    """Return the prediction of `ridge_predict` for kernels `k_rs` (b, m) and `k_ss` (m, m)."""
    return k_rs @ _solve_damped(k_ss, y_syn, ridge / (len(k_ss) if per_image else 1), fallbacks)


def _solve_damped(k, y, ridge, fallbacks):
    """Return (k + ridge * trace(k) I)^-1 y in the precision of k."""
    exact = torch.float32 if k.device.type == "mps" else torch.float64
    wide = k.to(exact)
    damping = ridge * wide.diagonal().sum().detach()
    safe = ridge >= SAFE_RIDGE
    refine = k.dtype == torch.float32 and k.is_cuda and has_slow_float64(k.device)
    return solve(wide, damping, y.to(exact), fallbacks, safe, refine).to(k.dtype)


@functools.cache
def has_slow_float64(device):
    """Return whether matrix products of a GPU are over `SLOW_FLOAT64` times slower in float64."""

    def seconds(dtype, size=2048):
        a = torch.ones(size, size, dtype=dtype, device=device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for event in (start, end):  # the first products let the clocks rise
            for _ in range(5):
                a @ a
            event.record()
        end.synchronize()
        return start.elapsed_time(end)

    return seconds(torch.float64) > SLOW_FLOAT64 * seconds(torch.float32)


def centred_one_hot(labels, num_classes):
    """Return classes (n,) as centred one-hot rows (n, C) float32: 1 - 1/C and -1/C."""
    return F.one_hot(labels, num_classes).float() - 1 / num_classes


def solve(k, damping, y, fallbacks=None, safe=False, refine=False):
    """Return (k + damping I)^-1 y (m, d) by a Cholesky factorisation.

    The result is differentiable in k and y. If rounding makes the matrix not positive definite, a
    larger damping is used, and if that also fails, the result is NaN. The larger damping is 10
    times the given one. On a GPU, where reading whether the factorisation failed would synchronise,
    both are factorised. With `safe`, a GPU factorises one matrix only, and the larger damping is
    infinite: the result is 0 and has no gradient.

    Args:
        k: symmetric matrix (m, m).
        damping: scalar.
        y: right-hand sides (m, d).
        fallbacks: a list, or None. A () bool tensor is appended to it: whether the larger damping
            was used. On a CPU nothing is appended if it was not. The call does not synchronise
            with the device.
        safe: whether a failure is not expected (`SAFE_RIDGE`).
        refine: factorise in float32, and correct each solution by one step of iterative refinement
            with residuals in the precision of k.
    """
    factor, matrix, scale, failed = _factorise(
        k.detach(), damping, safe, refine, read=k.device.type == "cpu"
    )
    if fallbacks is not None and failed is not None:
        fallbacks.append(failed)
    return _Solve.apply(k, factor, y, matrix if refine else None, scale)


def solve_factorised(factor, y, matrix=None):
    """Return A^-1 y (m, d) for the Cholesky factor (m, m) of A.

    With `matrix`, which is A in higher precision than the factor, adds one step of iterative
    refinement (Higham, "Accuracy and Stability of Numerical Algorithms", chapter 12).
    """
    x = torch.cholesky_solve(y.to(factor.dtype), factor).to(y.dtype)
    if matrix is None:
        return x
    residual = (y - matrix @ x).to(factor.dtype)
    return x + torch.cholesky_solve(residual, factor).to(y.dtype)


class _Solve(torch.autograd.Function):
    """`solve_factorised` for A = k + damping I, times `scale`, () or None for 1."""

    @staticmethod
    def forward(ctx, k, factor, y, matrix, scale):
        dual = solve_factorised(factor, y, matrix)
        dual = dual if scale is None else scale * dual
        ctx.save_for_backward(factor, dual, matrix, scale)
        return dual

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        factor, dual, matrix, scale = ctx.saved_tensors
        by_y = solve_factorised(factor, gradient, matrix)
        by_y = by_y if scale is None else scale * by_y
        # Gradient with respect to A of A^-1 y: -(A^-T g) (A^-1 y)^T.
        return -by_y @ dual.T, None, by_y, None, None


def _factorise(k, damping, safe, refine, read):
    """Factorise A = k + damping I, or with a larger damping if that fails.

    Args:
        k, damping, safe, refine: as for `solve`.
        read: whether to read if the factorisation failed, which waits for a GPU.

    Returns:
        The lower Cholesky factor (m, m) of A, which is NaN if both fail; A; the factor () on the
        solution, or None; and whether the larger damping was used as a () tensor, or None if it is
        known not to be.
    """
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    matrix = k + damping * eye
    factor, info = torch.linalg.cholesky_ex(matrix.float() if refine else matrix)
    if read and not info:
        return factor, matrix, None, None
    failed = info > 0
    if safe and not read:
        # The limit of an infinite damping is 0. A matrix that is not finite gives NaN.
        scale = torch.where(failed, 0 * matrix.diagonal().sum(), 1.0)
        return torch.where(failed, eye.to(factor.dtype), factor), matrix, scale, failed
    more = k + LARGER_RIDGE * damping * eye
    larger, info = torch.linalg.cholesky_ex(more.float() if refine else more)
    larger = torch.where(info == 0, larger, torch.nan)
    return (
        torch.where(failed, larger, factor),
        torch.where(failed, more, matrix),
        None,
        failed,
    )
