"""ConvNets: those of KRR-ST (paper, section 4.1) and of dataset condensation (dm, dsa, mtt, mkdt).

The latter use instance norm and the same width in all layers.
"""

from torch import nn


def instance_norm(channels):
    """Return instance norm with learned scale and shift: each channel of an image on its own."""
    return nn.GroupNorm(channels, channels)


def convnet(widths, image_size, norm=nn.BatchNorm2d):
    """Return (features, feature width) of a ConvNet.

    Each of the k entries of `widths` is a block of 3x3 convolution, `norm`, ReLU and 2x2 average
    pooling. `features` maps (b, 3, S, S) to (b, widths[-1], S/2^k, S/2^k).
    """
    layers, c_in = [], 3
    for c_out in widths:
        layers += [
            nn.Conv2d(c_in, c_out, 3, padding=1),
            norm(c_out),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
        ]
        c_in = c_out
    side = image_size // 2 ** len(widths)
    return nn.Sequential(*layers), c_in * side * side
