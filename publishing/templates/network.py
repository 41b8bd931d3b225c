from pathlib import Path

from network import build
from safetensors.torch import load_file

FILE = "model.safetensors"


def load(folder=Path(__file__).parent):
    """The trained network in eval mode.

    network(x) are its outputs and network.embed(x) its features (b, d) of normalised images x
    (b, 3, S, S).
    """
    network = build()
    network.load_state_dict(load_file(Path(folder) / FILE))
    return network.eval()
