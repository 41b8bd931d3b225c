"""The target network g_phi: reading its file, and its features of the whole source, computed once."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import models
from utils import cli, files, progress
from utils.errors import UserError
from utils.evaluate import BATCH, evaluating


@dataclass
class Target:
    """A frozen network with features (b, d_y), where its file lies, and in what its training differs from the paper's
    (`presets.differences`)."""

    network: torch.nn.Module
    path: Path
    digest: str
    device: torch.device
    precision: str
    scale: dict

    def features(self, x):
        """g_phi of normalised images (b, 3, S, S): (b, d_y) float32, in eval mode."""
        with evaluating(self.network), cli.autocast(self.device, self.precision):
            return self.network.embed(x).float()

    def features_of(self, images):
        """g_phi(X_t): (n, d_y) float32 of the whole set, kept beside the target's file and mapped from there."""
        path = self.path.parent / f"features-{self.digest}-{self.precision}.npy"
        if not path.is_file():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            shape = (len(images), self.network.feature_dim)
            table = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            for index in progress.bar(torch.arange(len(images)).split(BATCH), desc="target features"):
                table[index.numpy()] = self.features(images.normalised(index, self.device)).cpu().numpy()
            table.flush()
            os.replace(partial, path)
        return torch.from_numpy(np.load(path, mmap_mode="c"))


def load_target(path, source, device, precision):
    """The `Target` in a target.pt, for the `ImageSet` that it was trained on.

    Raises UserError when there is none, or when it was trained on another source, on other images of it, or at another
    image size.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; make it with: python pretrain_target.py --source {source.name}")
    saved = files.load(path, "target", required=("network", "arch", "width", "image_size", "source", "fingerprint"))
    for what, there, needed in (
        ("source", saved["source"], source.name),
        ("image size", saved["image_size"], source.image_size),
        ("version of the source", saved["fingerprint"], source.fingerprint),
    ):
        if there != needed:
            raise UserError(f"{path}: a target trained on another {what} ({there}, not {needed})")
    network = models.build(saved["arch"], saved["image_size"], 0, saved["width"])
    network.load_state_dict(saved["network"])
    network = network.to(device).requires_grad_(False)
    return Target(network, path, files.digest(path), device, precision, saved.get("scale", {}))
