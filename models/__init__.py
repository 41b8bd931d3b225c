"""The paper's networks, by name: `build("convnet3", image_size=32, num_outputs=10)`."""

import torch
from torch import nn

from models.alexnet import alexnet
from models.convnet import convnet, instance_norm
from models.mobilenet import mobilenet
from models.resnet import resnet, resnet50
from models.vgg import POOL, vgg
from utils.errors import UserError


class Network(nn.Module):
    """Feature extractor f_omega with a linear head h_W.

    `embed` returns features (b, d_h) and `forward` outputs (b, num_outputs) of x (b, 3, S, S).

    Args:
        features: module of the feature extractor.
        feature_dim: d_h.
        num_outputs: outputs of the head; 0 means no head, and `forward` equals `embed`.
    """

    def __init__(self, features, feature_dim, num_outputs):
        super().__init__()
        self.features = features
        self.feature_dim = feature_dim
        self.fc = nn.Linear(feature_dim, num_outputs) if num_outputs else nn.Identity()

    def embed(self, x):
        return self.features(x).flatten(1)

    def forward(self, x):
        return self.fc(self.embed(x))


def _scaled(width, *channels):
    """Multiply channel counts by a width, with a minimum of 1; POOL marks stay unchanged."""
    return [c if c == POOL else max(1, round(c * width)) for c in channels]


def _mobilenet(size, w):
    stages = (
        (1, 16, 1, 1),
        (2, 24, 2, 1),
        (2, 32, 3, 2),
        (2, 64, 4, 2),
        (2, 96, 3, 1),
        (2, 160, 3, 2),
        (2, 320, 1, 1),
    )
    stages = [
        (expansion, *_scaled(w, c), blocks, stride) for expansion, c, blocks, stride in stages
    ]
    return (*_scaled(w, 32), stages, *_scaled(w, 1280))


_VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)

# name -> function that returns (features, feature width), and (image size, relative width) -> its
# arguments
ARCHITECTURES = {
    "convnet3": (convnet, lambda size, w: (_scaled(w, 128, 256, 512), size)),
    "convnet4": (convnet, lambda size, w: (_scaled(w, 64, 128, 256, 512), size)),
    "convnet5": (convnet, lambda size, w: (_scaled(w, 32, 64, 128, 256, 512), size)),
    "dc_convnet3": (convnet, lambda size, w: (_scaled(w, *[128] * 3), size, instance_norm)),
    "dc_convnet4": (convnet, lambda size, w: (_scaled(w, *[128] * 4), size, instance_norm)),
    "dc_convnet5": (convnet, lambda size, w: (_scaled(w, *[128] * 5), size, instance_norm)),
    "vgg11": (vgg, lambda size, w: (_scaled(w, *_VGG11), size)),
    "alexnet": (alexnet, lambda size, w: (_scaled(w, 128, 192, 256, 192, 192), size)),
    "mobilenet": (mobilenet, _mobilenet),
    "resnet10": (resnet, lambda size, w: ((1, 1, 1, 1), _scaled(w, 64, 128, 256, 512))),
    "resnet18": (resnet, lambda size, w: ((2, 2, 2, 2), _scaled(w, 64, 128, 256, 512))),
    "resnet18_target": (
        resnet,
        lambda size, w: ((2, 2, 2, 2), _scaled(w, 64, 128, 256, 512), False),
    ),
    "resnet50_target": (resnet50, lambda size, w: ()),
}


def build(arch, image_size, num_outputs, width=1.0):
    """Return a new `Network` in channels-last memory format.

    torch's global generator initialises its weights.

    Args:
        arch: key of `ARCHITECTURES`.
        image_size: height and width in pixels, at least 32.
        num_outputs: outputs of the head; 0 means no head.
        width: factor on all hidden widths; above 0.

    Raises:
        UserError: if `width` is not above 0, or if `arch` does not support it.
    """
    if width <= 0:
        raise UserError(f"--width {width:g}: must be above 0")
    if arch == "resnet50_target" and width != 1.0:
        raise UserError("resnet50_target comes at width 1 only")
    function, arguments = ARCHITECTURES[arch]
    network = Network(*function(*arguments(image_size, width)), num_outputs)
    return network.to(memory_format=torch.channels_last)


def label(arch, width=1.0):
    """Return the name in run folders and tables, such as convnet3 or convnet3-x0.25."""
    return arch if width == 1.0 else f"{arch}-x{width:g}"
