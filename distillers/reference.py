"""The outer step of KRR-ST, written as plainly as possible: `distill.py --reference`.

The target network is evaluated on every batch. Images come one by one from a `DataLoader`. Tensors
are contiguous as (b, 3, S, S). The ridge system is solved by LU in float32. The fast implementation
must give the same losses (tests/test_speed.py). `python -m benchmarks.speed` measures its speedup.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from data.images import normalise, to_float
from models.target import NetworkTarget
from utils.allocator import keep_freed_memory
from utils.errors import UserError
from utils.sampling import Batches

FORMAT = torch.contiguous_format


class Step(NamedTuple):
    """The parts of an outer step that `--reference` replaces.

    Args:
        batches: class of the real batches.
        loss: the outer loss.
        memory_format: memory format of images and networks.
    """

    batches: type
    loss: Callable
    memory_format: torch.memory_format


class _Images(Dataset):
    """The normalised images of an `ImageSet`, (3, S, S) float32 each."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return normalise(
            to_float(self.source.pixels[index : index + 1]), self.source.mean, self.source.std
        )[0]


class RealBatches:
    """Real batches in the order of distill.py's, for the same generator, of all images."""

    def __init__(self, source, target, args, randomness, device, used=None):
        if not isinstance(target, NetworkTarget):
            raise UserError(
                "--reference needs a target network, not the stored features of an encoder"
            )
        keep_freed_memory(False)  # the default of PyTorch
        self.target, self.device = (
            copy.deepcopy(target.network).to(memory_format=FORMAT).eval(),
            device,
        )
        self.order = Batches(len(source), args.outer_batch, randomness.cpu)
        self.images = iter(
            DataLoader(_Images(source), batch_sampler=self._indices(), generator=torch.Generator())
        )

    def _indices(self):
        while True:
            yield self.order.next().tolist()

    def next(self):
        """Return normalised images x_real (b, 3, S, S) and targets y_real (b, d_y)."""
        x_real = next(self.images).to(self.device)
        with torch.no_grad():
            return x_real, self.target.embed(x_real)


def outer_loss(member, x_real, y_real, x_syn, y_syn, args, fallbacks=None):
    """Return equation 4, as a mean over all entries."""
    member.network.eval()
    with torch.no_grad():
        f_real = member.network.embed(x_real)  # (b, d_h)
    f_syn = member.network.embed(x_syn)  # (m, d_h)
    if args.bias_column:
        f_real, f_syn = (
            torch.cat([f, torch.ones(len(f), 1, device=f.device)], 1) for f in (f_real, f_syn)
        )
    k_rs, k_ss = f_real @ f_syn.T, f_syn @ f_syn.T  # (b, m), (m, m)
    damping = args.ridge * k_ss.trace().detach() / (len(k_ss) if args.ridge_per_image else 1)
    dual = torch.linalg.solve(
        k_ss + damping * torch.eye(len(k_ss), device=k_ss.device), y_syn
    )  # (m, d_y)
    return F.mse_loss(k_rs @ dual, y_real)


STEP = Step(RealBatches, outer_loss, FORMAT)
