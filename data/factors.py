"""Low-rank distilled sets: images and targets as coefficients times a few bases.

    images  = upsample(c_x b_x)    c_x (m, U), b_x (U, 3 s s); bilinear from s x s to S x S pixels
    targets = c_y b_y              c_y (m, V), b_y (V, d)

A set with rotations has four views of each image, rotated by 0, 90, 180 and 270 degrees.
The targets of view k are (c_y + q_k(c_y)) b_y, with q_k(c) = relu(c w1_k + b1_k) w2_k + b2_k.
"""

import math

import torch
import torch.nn.functional as F

NAMES = ("c_x", "b_x", "c_y", "b_y")
# Of the three rotations, stacked: (3, V, h), (3, h), (3, h, V), (3, V).
SHIFT_NAMES = ("w1", "b1", "w2", "b2")
ROTATIONS = 3


def compose_images(c_x, b_x, size):
    """Return the images (m, 3, size, size) of `c_x` (m, U) and `b_x` (U, 3 s s)."""
    side = math.isqrt(b_x.shape[1] // 3)
    low = (c_x @ b_x).view(-1, 3, side, side)
    return F.interpolate(low, size=(size, size), mode="bilinear", align_corners=False)


def add_rotations(x):
    """Append the rotations of `x` (m, 3, S, S) by 90, 180 and 270 degrees: (4 m, 3, S, S)."""
    return torch.cat([x.rot90(k, (2, 3)) for k in range(1 + ROTATIONS)])


def predict_shifts(c_y, w1, b1, w2, b2):
    """Return q_k(c_y) of the three rotations: (3, m, V) for `c_y` (m, V)."""
    return (c_y @ w1 + b1[:, None]).relu() @ w2 + b2[:, None]


def materialise(factors, size):
    """Compose the images and targets of a set.

    Args:
        factors: dict, name -> tensor.
        size: height and width of the images in pixels.

    Returns:
        Images (m, 3, size, size) and targets (m, d). With rotations, 4 m of each, ordered by view.
    """
    c_x, b_x, c_y, b_y = (factors[name] for name in NAMES)
    x = compose_images(c_x, b_x, size)
    if "w1" not in factors:
        return x, c_y @ b_y
    c_views = c_y + predict_shifts(c_y, *(factors[name] for name in SHIFT_NAMES))  # (3, m, V)
    return add_rotations(x), torch.cat([c_y, *c_views]) @ b_y


def count_numbers(factors):
    """Return the total number of entries in `factors`."""
    return sum(each.numel() for each in factors.values())


def find_fault(factors):
    """Return a description of what is invalid in `factors`, or None."""
    if not isinstance(factors, dict) or not all(map(torch.is_tensor, factors.values())):
        return "factors that are not a dictionary of tensors"
    if {*factors} not in ({*NAMES}, {*NAMES, *SHIFT_NAMES}):
        return f"factors {', '.join(map(str, factors))}"[:100]
    if not all(each.dtype == torch.float32 and each.isfinite().all() for each in factors.values()):
        return "factors that are not float32 or not finite"
    shapes = {name: tuple(each.shape) for name, each in factors.items()}
    if any(len(shapes[name]) != 2 or 0 in shapes[name] for name in NAMES):
        return "factors that are not matrices"
    (m, u), (v, d) = shapes["c_x"], shapes["b_y"]
    side = math.isqrt(shapes["b_x"][1] // 3)
    expected = dict(c_x=(m, u), b_x=(u, 3 * side * side), c_y=(m, v), b_y=(v, d))
    if "w1" in factors:
        h = shapes["b1"][-1] if shapes["b1"] else 0
        expected |= dict(w1=(ROTATIONS, v, h), b1=(ROTATIONS, h), w2=(ROTATIONS, h, v))
        expected["b2"] = (ROTATIONS, v)
    if shapes != expected:
        return "factors whose shapes do not fit each other"
