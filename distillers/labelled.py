"""Code shared by several methods: batches of one class, untrained networks, measurements."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

import models
from utils.errors import UserError

# Seed of the draws for comparing initial and distilled images; no run uses it.
MEASUREMENT_SEED = 1 << 30


class ClassBatches:
    """Batches of distinct random real images of one class.

    A batch holds `batch_size` images, or all images of a smaller class.
    """

    def __init__(self, source, batch_size, device):
        self.source, self.batch_size, self.device = source, batch_size, device
        counts = source.labels.bincount(minlength=len(source.classes)).tolist()
        self.members = source.labels.argsort(stable=True).split(
            counts
        )  # one (n_c,) for each class c

    def draw(self, label, generator):
        """Return normalised images (b, 3, S, S) of class `label`; `generator` is on the CPU."""
        members = self.members[label]
        index = members[torch.randperm(len(members), generator=generator)[: self.batch_size]]
        return self.source.normalised(index, self.device)


def build_untrained(args, source, num_outputs, device):
    """Return an untrained network of `args.arch` and `args.width` on `device`.

    Torch's global generator initialises it. Raises UserError if the network has batch norm, because
    the output for an image would then depend on the other images of the batch.
    """
    network = models.build(args.arch, source.image_size, num_outputs, args.width)
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        known = ", ".join(name for name in models.ARCHITECTURES if name.startswith("dc_"))
        raise UserError(
            f"--arch {args.arch} has batch norm; this method needs instance norm: "
            f"choose one of {known}"
        )
    return network.to(device, non_blocking=True)
