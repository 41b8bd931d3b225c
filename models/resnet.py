"""ResNets for small images: 3x3 stem with padding 2, no max-pool, pooled features; and the ResNet50
for 224 px.

Module names are torchvision's, so that backbones trained elsewhere with the same stem load here.
"""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock


class Subsampling1x1(nn.Conv2d):
    """A 1x1 convolution of every `step`-th pixel: `nn.Conv2d(c_in, c_out, 1, stride=step)`,
    computed as a slice and a convolution of stride 1.

    PyTorch 2.15's backward pass of the strided one (oneDNN 3.13, AVX-512, channels-last) writes
    outside its buffers when c_in is below 16, which ends the process with a corrupted heap.
    """

    def __init__(self, c_in, c_out, step):
        super().__init__(c_in, c_out, 1, bias=False)
        self.step = step

    def forward(self, x):
        return super().forward(x[:, :, :: self.step, :: self.step])


class SmallImageResNet(nn.Module):
    """torchvision's basic blocks behind a stem that keeps the resolution: (b, 3, S, S) -> (b,
    widths[3], 1, 1).

    The stem's padding of 2 makes maps of S + 2 pixels, as in the paper's networks.
    `zero_init_residual` sets the last batch norm of each block to 0, so that a block starts as the
    identity (the paper's ResNet10 and ResNet18; not its self-supervised target).
    """

    def __init__(self, blocks, widths, zero_init_residual):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        c_in = widths[0]
        for stage, (count, c_out) in enumerate(zip(blocks, widths, strict=True), start=1):
            layers = []
            for block in range(count):
                stride = 2 if stage > 1 and block == 0 else 1
                downsample = None
                if stride != 1 or c_in != c_out:
                    downsample = nn.Sequential(
                        Subsampling1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out)
                    )
                layers.append(BasicBlock(c_in, c_out, stride, downsample))
                c_in = c_out
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv1:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


def resnet(blocks, widths, zero_init_residual=True):
    """Returns (features, feature width) of a `SmallImageResNet`."""
    return SmallImageResNet(blocks, widths, zero_init_residual), widths[-1]


def resnet50():
    """torchvision's ResNet50 without its head: (b, 3, S, S) -> (b, 2048); the target of the paper's
    appendix D."""
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    return network, 2048
