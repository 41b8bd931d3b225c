"""The file of a trained network, model.pt."""

import math

import torch

import models
from utils import files
from utils.errors import UserError
from utils.presets import SMALLEST_IMAGE_SIZE


def make_content(network, arch, width, image_size, num_outputs, meta):
    """Return the dict for `files.save(path, "model", ...)`.

    Args:
        network: `Network`.
        arch, width, image_size, num_outputs: arguments of `models.build`.
        meta: dict of plain values: source, method, seed, settings.
    """
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return dict(
        network=state,
        arch=arch,
        width=width,
        image_size=image_size,
        num_outputs=num_outputs,
        meta=meta,
    )


def load_model(path):
    """Read a model.pt. Raises UserError if it is invalid.

    Returns:
        The dict of `make_content`, with its `path`.
    """
    saved = files.load(
        path, "model", required=("network", "arch", "width", "image_size", "num_outputs", "meta")
    )
    outputs = saved["num_outputs"]
    wrong = None if isinstance(outputs, int) and outputs > 0 else f"num_outputs {str(outputs)[:40]}"
    wrong = wrong or (None if isinstance(saved["meta"], dict) else "meta that is not a dictionary")
    if fault := find_fault(saved) or wrong:
        raise UserError(f"{path}: {fault}")
    return saved | {"path": str(path)}


def find_fault(saved):
    """Return a description of what is invalid in a file's network, or None.

    `saved` has `network`, `arch`, `width` and `image_size`.
    """
    arch, width, size, network = (
        saved[name] for name in ("arch", "width", "image_size", "network")
    )
    if not isinstance(arch, str) or arch not in models.ARCHITECTURES:
        return f"unknown network {str(arch)[:40]}"
    if not isinstance(width, (int, float)) or not 0 < width < math.inf:
        return f"width {str(width)[:40]}"
    if not isinstance(size, int) or size < SMALLEST_IMAGE_SIZE:
        return f"image size {str(size)[:40]}"
    if not isinstance(network, dict) or not all(
        torch.is_tensor(value) for value in network.values()
    ):
        return "weights that are not tensors by name"
    if name := files.find_non_finite(network):
        return f"values that are not finite ({name})"


def rebuild(saved, num_outputs=None):
    """Build the `Network` of a model.pt.

    Args:
        saved: dict of `load_model`.
        num_outputs: outputs of a new head that replaces the stored one; None keeps the stored one.

    Raises:
        UserError: if the weights do not fit the network.
    """
    new_head = num_outputs is not None
    network = models.build(
        saved["arch"],
        saved["image_size"],
        num_outputs if new_head else saved["num_outputs"],
        saved["width"],
    )
    state = saved["network"]
    if new_head:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        state |= {f"fc.{name}": value for name, value in network.fc.state_dict().items()}
    load_weights(network, state, saved["arch"], saved.get("path", "model file"))
    return network


def load_weights(network, state, arch, path):
    """Load `state` into `network`. Raises UserError with `path` if it does not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path}: weights do not fit {arch} ({str(error).splitlines()[-1].strip()[:160]})"
        ) from error


def build_untrained(arch, width, image_size):
    """Return the dict of `load_model` for a network that torch's generator initialises."""
    network = models.build(arch, image_size, 1, width)
    return make_content(network, arch, width, image_size, 1, {"source": None, "method": "scratch"})


# Prefixes of keys in checkpoints of solo-learn, lightly and DDP.
PREFIXES = ("backbone.", "encoder.", "module.", "model.")
# Keys under which checkpoints store a state dict.
CONTAINERS = ("state_dict", "model", "network", "model_state_dict", "teacher")


def load_matching(network, path):
    """Load a state dict from a file of other software into `network`.

    The state dict may be stored under one of the keys `CONTAINERS`, and its keys may start with any
    of the `PREFIXES`. Entries that the network does not have, such as heads, are skipped and
    listed on standard output.

    Raises:
        UserError: if the file contains no state dict, if an entry of the network is missing or has
            another shape, or if values are not finite.
    """
    state = files.read_data(path, "state dict")
    while isinstance(state, dict) and (
        inner := next((k for k in CONTAINERS if isinstance(state.get(k), dict)), None)
    ):
        state = state[inner]
    if not isinstance(state, dict) or not any(map(torch.is_tensor, state.values())):
        raise UserError(f"{path}: not a state dict (a dictionary of tensors by name)")
    if name := files.find_non_finite(state):
        raise UserError(f"{path}: values that are not finite ({name})")
    wanted = network.state_dict()
    prefix = _best_prefix(state, wanted)
    found = {name: state[prefix + name] for name in wanted if prefix + name in state}
    missing = [
        name for name in wanted if name not in found and not name.endswith("num_batches_tracked")
    ]
    other = [
        name for name, value in found.items() if getattr(value, "shape", None) != wanted[name].shape
    ]
    if missing or other:
        what = f"lacks {_listed(missing)}" if missing else f"has other shapes of {_listed(other)}"
        raise UserError(f"{path}: does not fit the network: it {what}")
    network.load_state_dict(wanted | found)
    if unused := [
        name
        for name in state
        if name.removeprefix(prefix) not in found or not name.startswith(prefix)
    ]:
        print(f"{path}: skipped entries: {_listed(unused)}")


def _best_prefix(state, wanted):
    """Return the combination of `PREFIXES` that matches most keys of `wanted` in `state`."""
    prefixes = {""}
    for name in state:
        prefix = ""
        while step := next(
            (each for each in PREFIXES if name.removeprefix(prefix).startswith(each)), None
        ):
            prefix += step
            prefixes.add(prefix)
    return max(
        sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in state for name in wanted)
    )


def _listed(names, most=4):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
