"""The target g_phi: a network of ours or an encoder trained elsewhere, and its features of the
source."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import models
from data.originals import resize
from models import saved as networks
from models.encoders import load_encoder
from models.features import project
from models.frozen import Frozen
from utils import files, progress
from utils.device import autocast
from utils.errors import UserError

BATCH = 512  # images in a pass


@dataclass
class Target:
    """The target of a source: where its file lies, and in what it differs from the paper's.

    `feature_dim` is d_y; `deviations` are `presets.deviations` of the stage that made it; `name`
    tells in results which target it is, and is empty for a network of ours.
    """

    path: Path
    digest: str
    device: torch.device
    precision: str
    deviations: dict
    feature_dim: int
    name: str = ""

    def features(self, x):
        """g_phi of normalised images (b, 3, S, S): (b, d_y) float32."""
        raise NotImplementedError

    def require_network(self):
        """Raise UserError where `features` cannot be computed, before a run needs it."""

    def features_at(self, images, index):
        """g_phi of the images of the source at `index` (b,): (b, d_y) float32."""
        raise NotImplementedError

    def features_of(self, images):
        """g_phi(X_t): (n, d_y) float32 of the whole source, mapped from disk."""
        raise NotImplementedError


@dataclass
class NetworkTarget(Target):
    """A network of ours, trained by Barlow Twins, in eval mode at the source's image size."""

    network: torch.nn.Module = None

    def __post_init__(self):
        self.frozen = Frozen(self.network)

    def features(self, x):
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.frozen(x).float()

    def features_at(self, images, index):
        return self.features(images.normalised(index, self.device))

    def features_of(self, images):
        """As `Target.features_of`; computed at the first call and kept beside the target's file."""
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
            table = files.create_array(partial, np.float32, (len(images), self.feature_dim))
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


@dataclass
class FeatureTarget(Target):
    """Features of the source that an encoder, or other software, has computed at full resolution.

    `table` (n, d_y) is mapped from disk. `encoder` holds the facts by which the encoder is built
    again for other images, `what` and `weights` the flags that named it; None without an encoder.
    `mean` and `std` (3,) are the source's statistics.
    """

    table: torch.Tensor = None
    encoder: dict | None = None
    components: dict | None = None
    mean: torch.Tensor = None
    std: torch.Tensor = None

    def __post_init__(self):
        self._loaded = None

    def features(self, x):
        """As `Target.features`: the images are resized to the encoder's input size.

        Raises:
            UserError: without an encoder, or when its weights are not those of `table`.
        """
        encoder = self.require_network()
        pixels = x * self.std.to(x)[:, None, None] + self.mean.to(x)[:, None, None]
        with torch.no_grad(), autocast(self.device, self.precision):
            features = encoder(resize(pixels.clamp(0, 1), encoder.image_size)).float()
        mean, components = ((self.components or {}).get(name) for name in ("mean", "components"))
        if components is not None:
            mean, components = mean.to(features), components.to(features)
        return project(features, mean, components)

    def features_at(self, images, index):
        return self.table[index].to(self.device)

    def features_of(self, images):
        return self.table

    def require_network(self):
        """As `Target.require_network`; returns the encoder."""
        if self.encoder is None:
            raise UserError(
                f"{self.path}: made from --features, so it has no network for new images"
            )
        if self._loaded is None:
            what, weights, size = (self.encoder[name] for name in ("what", "file", "image_size"))
            loaded = load_encoder(what, self.device, weights, size)
            if loaded.facts["weights"] != self.encoder["weights"]:
                raise UserError(
                    f"{self.path}: {what} has other weights now than when the features were "
                    "computed"
                )
            self._loaded = loaded
        return self._loaded


def load_target(path, source, device, precision):
    """Read a target.pt for the `ImageSet` that it was made from.

    Raises:
        UserError: when there is none, or when it was made from another source, from other images of
            it or, for a network of ours, at another image size.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; make it with: python pretrain_target.py --source {source.name}"
        )
    saved = files.load(path, "target", required=("source", "fingerprint"))
    facts = [("source", saved["source"], source.name)]
    if "features" not in saved:
        facts.append(("image size", saved.get("image_size"), source.image_size))
    for description, found, needed in (
        *facts,
        ("version of the source", saved["fingerprint"], source.fingerprint),
    ):
        if found != needed:
            raise UserError(
                f"{path}: a target made with another {description} ({found}, not {needed})"
            )
    common = dict(
        path=path,
        digest=files.digest(path),
        device=device,
        precision=precision,
        deviations=saved.get("deviations", {}),
    )
    if "features" in saved:
        return _feature_target(saved, source, common)
    files.require(saved, path, "target", ("network", "arch", "width"))
    if fault := networks.find_fault(saved):
        raise UserError(f"{path}: {fault}")
    network = models.build(saved["arch"], saved["image_size"], 0, saved["width"])
    networks.load_weights(network, saved["network"], saved["arch"], path)
    network = network.to(device).requires_grad_(False)
    return NetworkTarget(**common, feature_dim=network.feature_dim, network=network)


def _feature_target(saved, source, common):
    path = common["path"]
    files.require(
        saved, path, "target", ("features", "encoder", "components", "name", "mean", "std")
    )
    table = torch.from_numpy(files.open_array(path.parent / "features.npy", saved["features"]))
    if table.ndim != 2 or len(table) != len(source):
        raise UserError(f"{path}: features of shape {tuple(table.shape)} for {len(source)} images")
    names = ("encoder", "components", "mean", "std", "name")
    return FeatureTarget(
        **common, feature_dim=table.shape[1], table=table, **{name: saved[name] for name in names}
    )
