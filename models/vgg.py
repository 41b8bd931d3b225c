"""VGG11 with batch norm and one linear head, as in the paper (Simonyan and Zisserman, 2015)."""

from torch import nn

POOL = 0  # marks 2x2 max-pooling in a list of widths


def vgg(widths, image_size):
    """Return (features, feature width) of a VGG.

    Each width is a 3x3 convolution with batch norm and ReLU. Each of the p entries `POOL` is a 2x2
    max-pooling. `features` maps (b, 3, S, S) to (b, widths[-2], S/2^p, S/2^p).
    """
    layers, c_in, side = [], 3, image_size
    for c_out in widths:
        if c_out == POOL:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        else:
            layers += [
                nn.Conv2d(c_in, c_out, 3, padding=1),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
            c_in = c_out
    return nn.Sequential(*layers), c_in * side * side
