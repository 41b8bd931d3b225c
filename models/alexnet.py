"""AlexNet for small images with batch norm and a single linear head, as the distillation literature
uses it."""

from torch import nn


def alexnet(widths, image_size):
    """Five convolutions (5x5, 5x5, 3x3, 3x3, 3x3), each with batch norm and ReLU; max-pools after
    1, 2 and 5.

    Returns (features, feature width); the features map (b, 3, S, S) to (b, widths[4], S/8, S/8).
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
