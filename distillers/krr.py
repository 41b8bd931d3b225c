"""Kernel ridge regression on the features of a network: the closed-form head of the inner problem (paper, 3.2)."""

import torch
import torch.nn.functional as F


def with_bias(features):
    """Append a one to each feature vector: (n, d) to (n, d + 1)."""
    return F.pad(features, (0, 1), value=1.0)


def ridge_predict(f_real, f_syn, y_syn, ridge, per_image=False, bias=True):
    """Prediction h_W*(f_real) of the ridge head fitted to (f_syn, y_syn): (b, d_y).

    `f_real` (b, d_h), `f_syn` (m, d_h), `y_syn` (m, d_y); differentiable in f_syn and y_syn. Paper, equation 4:
    k_rs (k_ss + lambda I)^-1 y_syn, with lambda = `ridge` * trace(k_ss), held constant in the gradient, and divided
    by m if `per_image`; `bias` appends a one to the features. The kernels are in the precision of the features; the
    system, whose condition number grows as 1 / ridge, is solved in float64 where the device has it.
    """
    if bias:
        f_real, f_syn = with_bias(f_real), with_bias(f_syn)
    k_ss, k_rs = f_syn @ f_syn.T, f_real @ f_syn.T  # (m, m), (b, m)
    return kernel_predict(k_rs, k_ss, y_syn, ridge, per_image)


def kernel_predict(k_rs, k_ss, y_syn, ridge, per_image=False):
    """As `ridge_predict`, from the kernels themselves: `k_rs` (b, m), `k_ss` (m, m)."""
    m = len(k_ss)
    exact = torch.float32 if k_ss.device.type == "mps" else torch.float64
    k_ss, y = k_ss.to(exact), y_syn.to(exact)
    damping = ridge * k_ss.diagonal().sum().detach() / (m if per_image else 1)
    eye = torch.eye(m, dtype=exact, device=k_ss.device)
    dual = torch.linalg.solve(k_ss + damping * eye, y)  # (m, d_y)
    return k_rs @ dual.to(k_rs.dtype)


def centred_one_hot(labels, num_classes):
    """Classes (n,) as 1 - 1/C at the class and -1/C elsewhere: (n, C) float32, whose rows sum to 0."""
    return F.one_hot(labels, num_classes).float() - 1 / num_classes
