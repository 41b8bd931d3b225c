"""ConvNet3, ConvNet4 and ConvNet5: the networks that KRR-ST distils with (paper, section 4.1); and,
with instance norm and one width throughout, those of dataset condensation (dm, dsa, mtt)."""

from torch import nn


def instance_norm(channels):
    """Each image's channels normalised by themselves, so that no image depends on the others of its
    batch."""
    return nn.GroupNorm(channels, channels)


def convnet(widths, image_size, norm=nn.BatchNorm2d):
    """Blocks of 3x3 convolution, `norm`, ReLU and 2x2 average pooling, one per entry of `widths`.

    Returns (features, feature width); the features map (b, 3, S, S) to (b, widths[-1], S/2^k,
    S/2^k).
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
