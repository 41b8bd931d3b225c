"""MobileNet: inverted residual blocks with expansion 2 (Sandler et al., 2018, with a smaller
expansion).

The paper cites MobileNetV1; the network its numbers come from is this V2 (departure D14
network-variants).
"""

from torch import nn


def conv_bn(c_in, c_out, kernel, stride=1, groups=1):
    convolution = nn.Conv2d(
        c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection; a shortcut (1x1 where channels differ) when
    stride is 1."""

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
    """`stages` holds (expansion, output width, blocks, stride of the first block); `stem` and
    `last` are widths.

    Returns (features, feature width); the features map (b, 3, S, S) to (b, last, 1, 1) at any S.
    """
    layers, c_in = [conv_bn(3, stem, 3), nn.ReLU(inplace=True)], stem
    for expansion, c_out, blocks, stride in stages:
        for block in range(blocks):
            layers.append(InvertedResidual(c_in, c_out, expansion, stride if block == 0 else 1))
            c_in = c_out
    layers += [conv_bn(c_in, last, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers), last
