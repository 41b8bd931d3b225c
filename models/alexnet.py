"""AlexNet for small images, with batch norm and one linear head, as in papers on distillation."""

from torch import nn


def alexnet(widths, image_size):
    """Return (features, feature width) of an AlexNet.

    Five convolutions (5x5, 5x5, 3x3, 3x3, 3x3), each with batch norm and ReLU. Max-pooling follows
    convolutions 1, 2 and 5. `features` maps (b, 3, S, S) to (b, widths[4], S/8, S/8).
    """
    layers, c_in = [], 3
    for c_out, kernel, pool in zip(
        widths, (5, 5, 3, 3, 3), (True, True, False, False, True), strict=True
    ):
        layers += [
            nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]
        if pool:
            layers.append(nn.MaxPool2d(2))
        c_in = c_out
    return nn.Sequential(*layers), c_in * (image_size // 8) ** 2
