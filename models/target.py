"""The target g_phi, a network of this project or an encoder, and its features of the source."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import models
from data.images import normalise
from data.originals import Originals, resize
from models import saved as networks
from models.encoders import load_encoder
from models.features import BATCH as ENCODER_BATCH
from models.features import project
from models.frozen import Frozen
from utils import files, progress
from utils.device import autocast
from utils.errors import UserError

BATCH = 512  # images per batch


@dataclass
class Target:
    """The target g_phi of a source.

    Attributes:
        path: path of target.pt.
        digest: `files.digest` of it.
        device: torch device.
        precision: as --precision.
        deviations: `presets.deviations` of the stage that made the target.
        feature_dim: d_y.
        name: name of an encoder or a feature file in results; empty for a network of this project.
    """

    path: Path
    digest: str
    device: torch.device
    precision: str
    deviations: dict
    feature_dim: int
    name: str = ""

    def features(self, x):
        """Return g_phi(x), (b, d_y) float32, of normalised images (b, 3, S, S)."""
        raise NotImplementedError

    def require_network(self):
        """Raise UserError if `features` is not available."""

    def features_at(self, images, index):
        """Return the features (b, d_y) float32 of the source's images at `index` (b,)."""
        raise NotImplementedError

    def features_of(self, images):
        """Return g_phi(X_t), (n, d_y) float32, of all images, mapped from disk."""
        raise NotImplementedError

    def test_features(self, source, images, root):
        """Return the features of the source's test split, (n, d_y) float32, mapped from disk.

        The first call computes them and stores them beside target.pt.

        Args:
            source: `ImageSet` of the training images; their statistics normalise the test images.
            images: `ImageSet` of the test images.
            root: path of the data root.
        """
        name = f"features-test-{self.digest}-{images.fingerprint}-{self.precision}.npy"
        return self._stored(
            self.path.parent / name, images, self._test_batches(source, images, root)
        )

    def _test_batches(self, source, images, root):
        """Yield the features (b, d_y) of the test split in order, in batches."""
        raise NotImplementedError

    def _stored(self, path, images, batches):
        """Return the array in the file `path`, which is first filled from `batches` if needed."""
        record = path.with_suffix(".json")
        if not record.is_file():
            with files.wait_for_lock(path.with_suffix(".lock")):
                if not record.is_file():  # another process may have computed them in the meantime
                    for leftover in path.parent.glob(f"{path.stem}.*.partial"):  # killed process
                        leftover.unlink()
                    self._write(path, images, batches)
                    files.write_json(
                        record, {"name": path.name, "features": files.compute_checksums(path)}
                    )
        content = files.read_json(record, "record of features")
        if content.get("name") != path.name:
            raise UserError(f"{record}: the record of another file; delete it to recreate it")
        return torch.from_numpy(files.open_array(path, content["features"]))

    def _write(self, path, images, batches):
        with files.atomic_write(path) as partial:
            table = files.create_array(partial, np.float32, (len(images), self.feature_dim))
            start = 0
            with progress.progress_bar(total=len(images), desc="target features") as bar:
                for features in batches:
                    table[start : start + len(features)] = features.cpu().numpy()
                    start += len(features)
                    bar.update(len(features))
            if not np.isfinite(table).all():
                raise UserError(f"{self.path}: the features of {images.name} are not finite")
            table.flush()


@dataclass
class NetworkTarget(Target):
    """Target network of this project, in eval mode, at the source's image size."""

    network: torch.nn.Module = None

    def __post_init__(self):
        self.frozen = Frozen(self.network)

    def features(self, x):
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.frozen(x).float()

    def features_at(self, images, index):
        return self.features(images.normalised(index, self.device))

    def features_of(self, images):
        """As `Target.features_of`. The first call stores the features beside target.pt."""
        path = self.path.parent / f"features-{self.digest}-{self.precision}.npy"
        return self._stored(path, images, self._batches(images, images.mean, images.std))

    def _test_batches(self, source, images, root):
        return self._batches(images, source.mean, source.std)

    def _batches(self, images, mean, std):
        for index in torch.arange(len(images)).split(BATCH):
            yield self.features(normalise(images.raw(index, self.device), mean, std))


@dataclass
class FeatureTarget(Target):
    """Target given by features of the source, from an encoder or a feature file.

    Attributes:
        table: (n, d_y) features, mapped from disk.
        encoder: dict of facts from which `load_encoder` rebuilds the encoder, or None.
        reduction: dict of arguments of `features.project`.
        mean, std: (3,) statistics of the source.
    """

    table: torch.Tensor = None
    encoder: dict | None = None
    reduction: dict = field(default_factory=dict)
    mean: torch.Tensor = None
    std: torch.Tensor = None

    def __post_init__(self):
        self._loaded = None

    def features(self, x):
        """As `Target.features`. The images are resized to the encoder's input size.

        Raises:
            UserError: if there is no encoder, or if it has changed.
        """
        encoder = self.require_network()
        pixels = x * self.std.to(x)[:, None, None] + self.mean.to(x)[:, None, None]
        return self._encode(encoder, resize(pixels.clamp(0, 1), encoder.image_size))

    def _encode(self, encoder, pixels):
        """Return the features (b, d_y) of pixels in [0, 1] at the encoder's input size."""
        with torch.no_grad(), autocast(self.device, self.precision):
            features = encoder(pixels).float()
        reduction = {
            name: value.to(features) if torch.is_tensor(value) else value
            for name, value in self.reduction.items()
        }
        return project(features, **reduction)

    def _test_batches(self, source, images, root):
        encoder = self.require_network()
        originals = Originals(images, "test", encoder.image_size, root)
        for pixels in originals.batches([*range(0, len(images), ENCODER_BATCH)], ENCODER_BATCH):
            yield self._encode(encoder, pixels.to(self.device))

    def features_at(self, images, index):
        return self.table[index].to(self.device)

    def features_of(self, images):
        return self.table

    def require_network(self):
        """As `Target.require_network`; returns the encoder."""
        if self.encoder is None:
            raise UserError(
                f"{self.path}: made with --features, so there is no network for new images"
            )
        if self._loaded is None:
            what, weights, size = (self.encoder[name] for name in ("what", "file", "image_size"))
            loaded = load_encoder(what, self.device, weights, size)
            names = ("weights", "mean", "std")
            changed = [name for name in names if self.encoder[name] != loaded.facts[name]]
            before = self.encoder.get("outputs", loaded.outputs)
            # Devices and package versions round differently.
            if (loaded.outputs - before).norm() > 0.01 * before.norm():
                changed.append("features of the same images")
            if changed:
                raise UserError(
                    f"{self.path}: {what} has changed since the features were computed (other "
                    f"{', '.join(changed)}); restore it, or rerun pretrain_target.py with another "
                    "--name"
                )
            self._loaded = loaded
        return self._loaded


def default_path(run_root, source):
    """Return the path of the target.pt that the later stages use by default.

    `source` is the name of an `ImageSet`.
    """
    return run_root / source / "target" / "seed0" / "target.pt"


def load_target(path, source, device, precision):
    """Read a target.pt.

    Args:
        path: path of the file.
        source: `ImageSet` that the target was made from.
        device: torch device.
        precision: as --precision.

    Returns:
        `Target`.

    Raises:
        UserError: if the file is missing or invalid, or was made from another source, another
            version of its images or, for a network of this project, another image size.
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
        saved, path, "target", ("features", "encoder", "reduction", "name", "mean", "std")
    )
    table = torch.from_numpy(
        files.open_array(path.parent / "features.npy", saved["features"], record=path)
    )
    if table.ndim != 2 or len(table) != len(source):
        raise UserError(f"{path}: features of shape {tuple(table.shape)} for {len(source)} images")
    names = ("encoder", "reduction", "mean", "std", "name")
    return FeatureTarget(
        **common, feature_dim=table.shape[1], table=table, **{name: saved[name] for name in names}
    )
