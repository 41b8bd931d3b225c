"""Projector and loss of Barlow Twins (Zbontar et al., ICML 2021)."""

import torch
from torch import nn

from models.sync_batch_norm import standardise
from utils import distributed
from utils.errors import UserError


def check_batch_size(size, source):
    """Raise UserError if a batch of `size` images of an `ImageSet` is too small for batch norm."""
    if size < 2:
        raise UserError(f"{source.name}: Barlow Twins needs batches of at least 2 images")


def barlow_twins_loss(z1, z2, off_diagonal, scale=1.0):
    """Compute the Barlow Twins loss.

    Zbontar et al., "Barlow Twins", ICML 2021, equations 1 and 2:

        scale * (sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2)

    C (d, d) is the cross-correlation of the embeddings, standardised over the batch. With several
    processes, the batch is that of all ranks together.

    Args:
        z1, z2: (b, d) embeddings of two views.
        off_diagonal: weight lambda of the off-diagonal terms.
        scale: factor on the loss.

    Returns:
        Scalar tensor.
    """
    # bf16 is not precise enough.
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    (z1, n), (z2, n) = (standardise(z) for z in (z1, z2))
    c = distributed.all_reduce_sum(z1.T @ z2) / n  # (d, d)
    on = (c.diagonal() - 1).square().sum()
    return scale * (on + off_diagonal * (c.square().sum() - c.diagonal().square().sum()))


def projector(d_in, d):
    """Return three linear layers from d_in to d outputs, with batch norm and ReLU between them."""
    layers = [nn.Linear(d_in, d, bias=False), nn.BatchNorm1d(d), nn.ReLU()]
    layers += [
        nn.Linear(d, d, bias=False),
        nn.BatchNorm1d(d),
        nn.ReLU(),
        nn.Linear(d, d, bias=False),
    ]
    return nn.Sequential(*layers)
