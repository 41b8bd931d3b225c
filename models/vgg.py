"""VGG11 with batch norm and a single linear head (Simonyan and Zisserman, 2015; as the paper uses
it)."""

from torch import nn

POOL = 0  # marks a 2x2 max-pool among the widths


def vgg(widths, image_size):
    """3x3 convolution, batch norm and ReLU for each width, a 2x2 max-pool for each `POOL`.

    Returns (features, feature width); the features map (b, 3, S, S) to (b, widths[-2], S/2^p,
    S/2^p).
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
