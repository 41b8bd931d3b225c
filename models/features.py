"""The features of a whole source under an encoder: computed once, resumable, in bounded memory."""

from pathlib import Path

import numpy as np
import torch

from utils import files
from utils.device import autocast
from utils.errors import UserError
from utils.moments import Moments

BATCH = 64  # images in a pass of the encoder
ROWS = 2048  # rows of a table at a time


class FeatureTable:
    """Features (n, d) float32 in a .npy file while they are computed; part of a checkpoint."""

    def __init__(self, path, n):
        self.path, self.n, self.array = Path(path), n, None

    def write(self, start, features):
        """Set the rows from `start` to `features` (b, d); the first call makes the file."""
        if self.array is None:
            self.array = files.create_array(self.path, np.float32, (self.n, features.shape[1]))
        self.array[start : start + len(features)] = features.float().cpu().numpy()

    def state_dict(self):
        """The width d; the rows are on disk when this returns."""
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
            raise ValueError(f"{self.path.name} is of shape {array.shape}")
        self.array = array


def compute_features(encoder, originals, table, run, device, precision):
    """Fill `table` with the encoder's features of all images of `originals`, a batch a step.

    Raises:
        UserError: for an image that cannot be decoded or features that are not finite.
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
    """The array (n, d) in a .npy or .safetensors file, as float32.

    Raises:
        UserError: where the file is missing or unreadable, or holds anything but one finite
            two-dimensional array of `n` rows.
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


def reduce_features(array, path, count):
    """Write the leading principal components of features to a .npy file.

    Args:
        array: (n, d) features, which may be mapped from disk.
        path: file to write, float32.
        count: D, components to keep; 0 keeps the features as they are.

    Returns:
        (components, facts): `components` is None without a reduction, else a dict with `mean` (d,)
        and `components` (D, d) float32; `facts` holds `encoder_dim` d, `zeros`, the share of
        features that are exactly 0, and `variance_kept`, the share of variance in the components.
    """
    n, width = array.shape
    count = min(count, width, max(1, n - 1)) if count else 0
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
        for start in range(0, n, ROWS):
            rows = torch.from_numpy(np.array(array[start : start + ROWS], dtype=np.float32))
            out[start : start + len(rows)] = project(rows, mean, components).numpy()
        out.flush()
    return None if components is None else dict(mean=mean, components=components), facts


def project(features, mean, components):
    """Features (b, d) as coordinates (b, D) along `components` (D, d); unchanged where that is
    None."""
    return features if components is None else (features - mean) @ components.T
