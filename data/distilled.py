"""The distilled set, distilled.pt: written by all distillation methods, read by later stages."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data import exported, factors
from utils import files
from utils.errors import UserError

TARGET_KINDS = {
    "feature": (torch.float32, 2),  # (m, d): features of a target network
    "soft": (torch.float32, 2),  # (m, c): learned labels
    "class": (torch.int64, 1),  # (m,): class indices
    "none": (torch.float32, 2),  # (m, 0): images only, for knowledge distillation
}
META = {
    "source": str,
    "method": str,
    "preset": str,
    "seed": int,
    "learned_rate": float,
    "num_images": int,
}  # entries that later stages read, with their types
DISTILLED_HELP = "distilled.pt, exported folder, or hf:USER/NAME[@REVISION]"
LARGEST_SIZE = 4096  # largest height and width in pixels of images composed from factors
MOST_CLASSES = 100_000  # larger class indices count as invalid


@dataclass
class Distilled:
    """m distilled images with their targets.

    Attributes:
        images: (m, 3, S, S) float32, normalised: pixels are `images * std + mean`.
        targets: as in `TARGET_KINDS`.
        target_kind: key of `TARGET_KINDS`.
        mean, std: (3,) float32.
        meta: dict of plain values: source, method, seed, preset, settings, versions, `deviations`
            (`presets.deviations` of all stages so far), `initial` (indices of the source's images
            that the set was initialised with), `distance_from_initial`
            (`distillers.method.distance_from_initial`), `learned_rate` if a learning rate was
            learned, `fresh_noise` if kd.py must draw new noise at each step, and `num_images` for
            a set with factors.
        factors: dict of tensors that images and targets are composed from (data/factors.py), or
            None.
    """

    images: torch.Tensor
    targets: torch.Tensor
    target_kind: str
    mean: torch.Tensor
    std: torch.Tensor
    meta: dict
    factors: dict | None = None

    def pixels(self):
        """Return the pixels (m, 3, S, S), clamped to [0, 1]."""
        return (self.images * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

    @property
    def num_outputs(self):
        """Number of outputs of a network that is fitted to the targets.

        For class targets, the last class is the last one that has an image.
        """
        return int(self.targets.max()) + 1 if self.target_kind == "class" else self.targets.shape[1]

    @property
    def num_images(self):
        """Number of images; for a set with factors, the number of plain images of equal size."""
        return self.meta.get("num_images") or len(self.images)

    def find_fault(self):
        """Return a description of what is invalid in this set, or None."""
        dtype, dims = TARGET_KINDS.get(str(self.target_kind), (None, None))
        tensors = (self.images, self.targets, self.mean, self.std)
        if not all(torch.is_tensor(each) and each.layout == torch.strided for each in tensors):
            return "images, targets, mean and std must be tensors"
        if not isinstance(self.meta, dict):
            return "meta must be a dictionary"
        for name, kind in META.items():
            if not isinstance(self.meta.get(name), (kind, type(None))):
                return f"{name} of the wrong type in meta"
        rate = self.meta.get("learned_rate")
        if rate is not None and not 0 < rate < math.inf:
            return f"learned_rate {rate} in meta, which must be positive"
        images, targets, shape = self.images, self.targets, tuple(self.images.shape)
        if not images.ndim or not targets.ndim:
            return "images or targets that are a scalar"
        faults = {
            f"target_kind {str(self.target_kind)[:40]}": dtype is None,
            f"images of shape {shape}": len(shape) != 4
            or shape[1] != 3
            or shape[2] != shape[3]
            or 0 in shape,
            f"images of {images.dtype}": images.dtype != torch.float32,
            "mean or std that are not 3 numbers": self.mean.shape != (3,) or self.std.shape != (3,),
            f"{len(targets)} targets for {len(images)} images": len(targets) != len(images),
            f"targets of {targets.dtype}, {targets.ndim}-d": (targets.dtype, targets.ndim)
            != (dtype, dims),
            "targets without a value": (targets.numel() == 0) != (self.target_kind == "none"),
            "values that are not finite": not all(each.isfinite().all() for each in tensors),
        }
        if fault := next((fault for fault, present in faults.items() if present), None):
            return fault
        if self.target_kind == "class" and not (
            targets.min() >= 0 and targets.max() < MOST_CLASSES
        ):
            found = f"class indices from {targets.min()} to {targets.max()}"
            return f"{found}, not within 0 to {MOST_CLASSES - 1}"

    def content(self):
        """Return the dict for `files.save(path, "distilled", ...)`.

        Factors, if any, replace images and targets.
        """
        values = {
            key: value.cpu() if torch.is_tensor(value) else value
            for key, value in vars(self).items()
        }
        if self.factors is None:
            del values["factors"]
            return values
        return values | dict(images=None, targets=None, image_size=self.images.shape[-1])


def distilled_file(name):
    """Return the path of a distilled set's file.

    Args:
        name: path of a distilled.pt, path of an exported folder, or hf:USER/NAME[@REVISION], which
            is downloaded from the Hugging Face Hub.

    Raises:
        UserError: if the folder contains no set or the download fails.
    """
    if str(name).startswith(exported.HUB):
        return exported.download(str(name))
    path = Path(name)
    return exported.find(path) if path.is_dir() else path


def load_distilled(name):
    """Read a `Distilled` from a `distilled_file`. Raises UserError if it is invalid."""
    path = distilled_file(name)
    names = Distilled.__dataclass_fields__
    if path.suffix == ".safetensors":
        content = exported.read(path)
    else:
        required = [name for name in names if name != "factors"]
        content = files.load(path, "distilled", required=required)
    if content.get("factors") is not None:
        content |= _materialise(content, path)
    d = Distilled(**{name: content.get(name) for name in names})
    if fault := d.find_fault():
        raise UserError(f"{path}: {fault}")
    return d


def results_folder(path, distilled, run_root):
    """Return the folder for results of the set in the file `path`.

    For a distilled.pt, this is its folder; for an exported set, <run root>/<source>/<name>/seed<k>.
    """
    if path.suffix != ".safetensors":
        return path.parent
    source, name = (
        re.sub(r"[^\w.+-]", "_", str(distilled.meta.get(key))).lstrip(".") or "set"
        for key in ("source", "name")
    )
    return run_root / source / name / f"seed{distilled.meta.get('seed') or 0}"


def _materialise(content, path):
    """Return images and targets of a file with factors. Raises UserError if they are invalid."""
    fault, size = factors.find_fault(content["factors"]), content.get("image_size")
    if fault is None and not (isinstance(size, int) and 1 <= size <= LARGEST_SIZE):
        fault = f"image_size {size}"
    if fault:
        raise UserError(f"{path}: {fault}")
    images, targets = factors.materialise(content["factors"], size)
    return dict(images=images, targets=targets)
