"""MobileNetV2 (Sandler et al., 2018), with expansion 2 in the inverted residual blocks.

The paper cites MobileNetV1, but its numbers come from this network (departure D14
network-variants).
"""

from torch import nn


def conv_bn(c_in, c_out, kernel, stride=1, groups=1):
    """Return a convolution without bias, followed by batch norm."""
    convolution = nn.Conv2d(
        c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 convolution and 1x1 projection.

    With stride 1 there is a shortcut, which is a 1x1 convolution if the channel counts differ.
    """

    def __init__(self, c_in, c_out, expansion, stride):
        super().__init__()
        hidden = c_in * expansion
        self.body = nn.Sequential(
            conv_bn(c_in, hidden, 1),
            nn.ReLU(inplace=True),
            conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            conv_bn(hidden, c_out, 1),
        )
        self.shortcut = None
        if stride == 1:
            self.shortcut = nn.Identity() if c_in == c_out else conv_bn(c_in, c_out, 1)

    def forward(self, x):
        return self.body(x) if self.shortcut is None else self.body(x) + self.shortcut(x)


def mobilenet(stem, stages, last):
    """Return (features, feature width) of a MobileNet.

    `features` maps (b, 3, S, S) to (b, last, 1, 1) for any S.

    Args:
        stem: width of the first convolution.
        stages: list of (expansion, output width, number of blocks, stride of the first block).
        last: width of the last convolution.
    """
    layers, c_in = [conv_bn(3, stem, 3), nn.ReLU(inplace=True)], stem
    for expansion, c_out, blocks, stride in stages:
        for block in range(blocks):
            layers.append(InvertedResidual(c_in, c_out, expansion, stride if block == 0 else 1))
            c_in = c_out
    layers += [conv_bn(c_in, last, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers), last
