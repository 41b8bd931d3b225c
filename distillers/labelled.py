"""What the methods with labels have in common (dm, dsa, mtt): images class by class, and networks
that treat each image by itself."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import models
from utils.errors import UserError

# Seed of the draws that initial and distilled images are compared with; no run has it.
MEASUREMENT_SEED = 1 << 30


class ClassBatches:
    """Random real images of one class at a time: at most `batch_size`, or all of a smaller class,
    none twice."""

    def __init__(self, source, batch_size, device):
        self.source, self.batch_size, self.device = source, batch_size, device
        counts = source.labels.bincount(minlength=len(source.classes)).tolist()
        self.members = source.labels.argsort(stable=True).split(
            counts
        )  # one (n_c,) for each class c

    def draw(self, label, generator):
        """Normalised images (b, 3, S, S) of class `label`; `generator` is the CPU's."""
        members = self.members[label]
        index = members[torch.randperm(len(members), generator=generator)[: self.batch_size]]
        return self.source.normalised(index, self.device)


def build_untrained(args, source, num_outputs, device):
    """An untrained network of `args.arch` and `args.width` on `device`, initialised by torch's
    global generator.

    Raises UserError for one with batch norm, which would tie each image to the others of its pass.
    """
    network = models.build(args.arch, source.image_size, num_outputs, args.width)
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        known = ", ".join(name for name in models.ARCHITECTURES if name.startswith("dc_"))
        raise UserError(
            f"--arch {args.arch} has batch norm; this method needs instance norm: one of {known}"
        )
    return network.to(device)
