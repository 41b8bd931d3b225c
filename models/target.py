"""The target network g_phi: its file, and its features of the whole source, computed once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import models
from models import saved as networks
from models.frozen import Frozen
from utils import files, progress
from utils.device import autocast
from utils.errors import UserError

BATCH = 512  # images in a pass


@dataclass
class Target:
    """A frozen network with features (b, d_y), where its file lies, and in what its training
    differs from the paper's (`presets.deviations`)."""

    network: torch.nn.Module
    path: Path
    digest: str
    device: torch.device
    precision: str
    deviations: dict

    def __post_init__(self):
        self.frozen = Frozen(self.network)

    def features(self, x):
        """g_phi of normalised images (b, 3, S, S): (b, d_y) float32, in eval mode."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.frozen(x).float()

    def features_of(self, images):
        """g_phi(X_t): (n, d_y) float32 of the whole set, kept beside the target's file and mapped
        from there."""
        path = self.path.parent / f"features-{self.digest}-{self.precision}.npy"
        record = path.with_suffix(".json")
        if not record.is_file():
            with files.wait_for_lock(path.with_suffix(".lock")):
                if not record.is_file():  # another process may have done it meanwhile
                    for partial in path.parent.glob(
                        f"{path.stem}.*.partial"
                    ):  # of a process that was killed
                        partial.unlink()
                    self._write_features(images, path)
                    files.write_json(record, {"name": path.name, "features": files.checksums(path)})
        content = files.read_json(record, "record of features")
        if content.get("name") != path.name:
            raise UserError(
                f"{record}: not the record of {path.name}; delete it, and it is made again"
            )
        return torch.from_numpy(files.open_array(path, content["features"]))

    def _write_features(self, images, path):
        with files.atomic_write(path) as partial:
            table = files.create_array(partial, np.float32, (len(images), self.network.feature_dim))
            for index in progress.bar(
                torch.arange(len(images)).split(BATCH), desc="target features"
            ):
                table[index.numpy()] = (
                    self.features(images.normalised(index, self.device)).cpu().numpy()
                )
            if not np.isfinite(table).all():
                raise UserError(
                    f"{self.path}: a target whose features of {images.name} are not finite"
                )
            table.flush()


def load_target(path, source, device, precision):
    """The `Target` in a target.pt, for the `ImageSet` that it was trained on.

    Raises UserError when there is none, or when it was trained on another source, on other images
    of it, or at another image size.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it with: python pretrain_target.py --source {source.name}"
        )
    saved = files.load(
        path, "target", required=("network", "arch", "width", "image_size", "source", "fingerprint")
    )
    for description, found, needed in (
        ("source", saved["source"], source.name),
        ("image size", saved["image_size"], source.image_size),
        ("version of the source", saved["fingerprint"], source.fingerprint),
    ):
        if found != needed:
            raise UserError(
                f"{path}: a target trained on another {description} ({found}, not {needed})"
            )
    if fault := networks.find_fault(saved):
        raise UserError(f"{path}: {fault}")
    network = models.build(saved["arch"], saved["image_size"], 0, saved["width"])
    networks.load_weights(network, saved["network"], saved["arch"], path)
    network = network.to(device).requires_grad_(False)
    return Target(network, path, files.digest(path), device, precision, saved.get("deviations", {}))
