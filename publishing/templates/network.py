from pathlib import Path

from network import build
from safetensors.torch import load_file

FILE = "model.safetensors"


def load(folder=Path(__file__).parent):
    """Load the trained network, in eval mode.

    For normalised images x (b, 3, S, S), network(x) returns the outputs and network.embed(x) the
    features (b, d).
    """
    network = build()
    network.load_state_dict(load_file(Path(folder) / FILE))
    return network.eval()
