"""The one file between every distillation method and every later stage."""

from dataclasses import dataclass

import torch

from utils import files
from utils.errors import UserError

TARGET_KINDS = {
    "feature": (torch.float32, 2),  # (m, d): a target network's features (KRR-ST)
    "soft": (torch.float32, 2),  # (m, c): learned labels (KIP, FRePo)
    "class": (torch.int64, 1),  # (m,): class indices (the rest)
}


@dataclass
class Distilled:
    """m distilled images with their targets.

    `images` (m, 3, S, S) float32, normalised: pixels are `images * std + mean`, with `mean` and `std` (3,);
    `targets` as `TARGET_KINDS` says; `meta` plain values: source, method, seed, preset, settings, versions.
    """

    images: torch.Tensor
    targets: torch.Tensor
    target_kind: str
    mean: torch.Tensor
    std: torch.Tensor
    meta: dict

    def pixels(self):
        """The images in [0, 1], clamped: (m, 3, S, S)."""
        return (self.images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    def content(self):
        """What `files.save(path, "distilled", ...)` writes."""
        return {key: value.cpu() if torch.is_tensor(value) else value for key, value in vars(self).items()}


def load_distilled(path):
    """Read a distilled.pt. Raises UserError when it is not one or its parts do not fit each other."""
    content = files.load(path, "distilled", required=Distilled.__dataclass_fields__)
    d = Distilled(**{name: content[name] for name in Distilled.__dataclass_fields__})
    dtype, dims = TARGET_KINDS.get(d.target_kind, (None, None))
    tensors = (d.images, d.targets, d.mean, d.std)
    if not all(torch.is_tensor(each) for each in tensors) or not isinstance(d.meta, dict):
        raise UserError(f"{path}: images, targets, mean and std must be tensors, meta a dictionary")
    shape = tuple(d.images.shape)
    faults = {
        f"target_kind {d.target_kind}": dtype is None,
        f"images of shape {shape}": len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or 0 in shape,
        f"images of {d.images.dtype}": d.images.dtype != torch.float32,
        "mean or std that are not 3 numbers": d.mean.shape != (3,) or d.std.shape != (3,),
        f"{len(d.targets)} targets for {len(d.images)} images": len(d.targets) != len(d.images),
        f"targets of {d.targets.dtype}, {d.targets.ndim}-d": (d.targets.dtype, d.targets.ndim) != (dtype, dims),
        "values that are not finite": not (d.images.isfinite().all() and d.targets.isfinite().all()),
    }
    for fault, there in faults.items():
        if there:
            raise UserError(f"{path}: {fault}")
    return d
