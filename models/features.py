"""Features of all images of a source, computed by an encoder or read from a file."""

import math
from pathlib import Path

import numpy as np
import torch

from utils import files
from utils.device import autocast
from utils.errors import UserError
from utils.moments import Moments

BATCH = 64  # images per batch of the encoder
ROWS = 2048  # rows of an array per step


class FeatureTable:
    """Features (n, d) float32 in a .npy file that is filled step by step; part of a checkpoint."""

    def __init__(self, path, n):
        self.path, self.n, self.array = Path(path), n, None

    def write(self, start, features):
        """Write `features` (b, d) to the rows from `start`. The first call creates the file."""
        if self.array is None:
            self.array = files.create_array(self.path, np.float32, (self.n, features.shape[1]))
        self.array[start : start + len(features)] = features.float().cpu().numpy()

    def state_dict(self):
        """Flush the rows to disk and return the width d."""
        if self.array is None:
            return {"width": 0}
        self.array.flush()
        return {"width": self.array.shape[1]}

    def load_state_dict(self, state):
        if not state["width"]:
            return
        try:
            array = np.lib.format.open_memmap(self.path, mode="r+")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path.name} is missing or damaged") from error
        if array.shape != (self.n, state["width"]) or array.dtype != np.float32:
            raise ValueError(f"{self.path.name} has shape {array.shape}")
        self.array = array


def compute_features(encoder, originals, table, run, device, precision):
    """Compute the encoder's features of all images, as the phase "features" of a run.

    Args:
        encoder: `Encoder`.
        originals: `Originals` at the encoder's image size.
        table: `FeatureTable` to fill.
        run: `Run` that logs and saves checkpoints.
        device: torch device.
        precision: as --precision.

    Raises:
        UserError: if an image cannot be decoded or a feature is not finite.
    """
    n = len(originals.images)
    run.resume(device, dict(table=table))
    steps = -(-n // BATCH)
    first = run.done.get("features", 0)
    batches = originals.batches([step * BATCH for step in range(first, steps)], BATCH)
    for step in run.steps("features", steps):
        with autocast(device, precision):
            features = encoder(next(batches).to(device)).float()  # (b, d)
        if not features.isfinite().all():
            raise UserError(f"{encoder.facts['name']}: features that are not finite (batch {step})")
        table.write(step * BATCH, features)


def read_features(path, n):
    """Read features (n, d) from a .npy or .safetensors file.

    Args:
        path: path of the file.
        n: expected number of rows.

    Raises:
        UserError: if the file is missing, is unreadable, or does not contain exactly one finite
            array of shape (n, d).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--features {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            array = _read_safetensors(path)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--features {path}: not a readable .npy or .safetensors file") from error
    if getattr(array, "ndim", None) != 2 or array.dtype.kind not in "fiu" or not array.shape[1]:
        shape, kind = getattr(array, "shape", None), getattr(array, "dtype", type(array).__name__)
        raise UserError(f"--features {path}: must be numbers of shape (n, d), not {kind} {shape}")
    if len(array) != n:
        raise UserError(f"--features {path}: {len(array):,} rows for {n:,} images of the source")
    for start in range(0, n, ROWS):
        if not np.isfinite(array[start : start + ROWS]).all():
            raise UserError(f"--features {path}: values that are not finite")
    return array


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            f"--features {path}: needs the package safetensors (pip install safetensors)"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise UserError(f"--features {path}: must hold one tensor, not {len(names)}")
            return file.get_tensor(names[0]).float().numpy()
    except SafetensorError as error:
        raise UserError(f"--features {path}: not a readable safetensors file") from error


def reduce_features(array, path, count, unit_scale=False):
    """Write the leading principal components of features to a .npy file.

    Args:
        array: (n, d) features, which may be mapped from disk.
        path: file to write, float32.
        count: D, number of components to keep, at most n - 1; 0 keeps all dimensions, and so does
            a single image.
        unit_scale: divide the result by its root mean square.

    Returns:
        reduction: dict of arguments of `project`: `mean` (d,) and `components` (D, d) float32, or
            None for both without a reduction, and the number `scale`.
        facts: dict with `encoder_dim` d, `zeros`, the fraction of features that are exactly 0,
            `variance_kept`, the fraction of the variance that the components explain, and `rms`,
            the root mean square before it is divided.
    """
    n, width = array.shape
    count = min(count, width, n - 1)
    moments, zeros = Moments(), 0
    for start in range(0, n, ROWS):
        rows = torch.from_numpy(np.array(array[start : start + ROWS], dtype=np.float32))
        zeros += (rows == 0).sum().item()
        if count:
            moments.add(rows)
    facts = dict(encoder_dim=width, zeros=zeros / (n * width), variance_kept=1.0)
    mean = components = None
    if 0 < count < width:
        mean, components, facts["variance_kept"] = moments.principal_components(count)
        mean, components = mean.float(), components.float()
    with files.atomic_write(path) as partial:
        out = files.create_array(partial, np.float32, (n, width if components is None else count))
        squares = 0.0
        for start in range(0, n, ROWS):
            rows = torch.from_numpy(np.array(array[start : start + ROWS], dtype=np.float32))
            rows = project(rows, mean, components)
            out[start : start + len(rows)] = rows.numpy()
            squares += rows.double().square().sum().item()
        facts["rms"] = math.sqrt(squares / out.size)
        scale = 1 / facts["rms"] if unit_scale and squares else 1.0
        for start in range(0, n, ROWS) if scale != 1 else ():
            out[start : start + ROWS] *= scale
        out.flush()
    return dict(mean=mean, components=components, scale=scale), facts


def project(features, mean=None, components=None, scale=1.0):
    """Project features (b, d) onto `components` (D, d), unless None, and multiply by `scale`."""
    if components is not None:
        features = (features - mean) @ components.T
    return features * scale
