"""A trained network's file, model.pt."""

import models
from utils import files
from utils.errors import UserError


def content(network, arch, width, image_size, num_outputs, meta):
    """What `files.save(path, "model", ...)` writes; `meta` are plain values: source, method, seed, settings."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    return dict(network=state, arch=arch, width=width, image_size=image_size, num_outputs=num_outputs, meta=meta)


def load_model(path):
    """The dict that `content` made. Raises UserError when it is not one."""
    return files.load(path, "model", required=("network", "arch", "width", "image_size", "num_outputs", "meta"))


def rebuild(saved, num_outputs=None):
    """The network of a model.pt; with `num_outputs`, its feature extractor under a new head of that many outputs.

    Raises UserError when the weights do not fit the network that the file names.
    """
    new_head = num_outputs is not None
    network = models.build(
        saved["arch"], saved["image_size"], num_outputs if new_head else saved["num_outputs"], saved["width"]
    )
    state = saved["network"]
    if new_head:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        state |= {f"fc.{name}": value for name, value in network.fc.state_dict().items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"model file: weights do not fit {saved['arch']} ({str(error).splitlines()[-1]})") from error
    return network


def fresh(arch, width, image_size):
    """As `load_model`, of a network that nobody has trained: torch's generator initialises it."""
    network = models.build(arch, image_size, 1, width)
    return content(network, arch, width, image_size, 1, {"source": None, "method": "scratch"})
