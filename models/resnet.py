"""ResNets for small images, and ResNet50 for 224 px.

The ResNets for small images have a 3x3 stem with padding 2, no max-pooling and global average
pooling. Module names are those of torchvision, so that weights for the same stem can be loaded.
"""

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock


class Subsampling1x1(nn.Conv2d):
    """1x1 convolution of every `step`-th pixel, without bias.

    Equals `nn.Conv2d(c_in, c_out, 1, stride=step, bias=False)`, but is computed as a slice and a
    convolution with stride 1. In PyTorch 2.15 (oneDNN 3.13, AVX-512, channels-last), the backward
    pass of the strided convolution writes outside its buffers if c_in is below 16. This corrupts
    the heap and crashes the process.
    """

    def __init__(self, c_in, c_out, step):
        super().__init__(c_in, c_out, 1, bias=False)
        self.step = step

    def forward(self, x):
        return super().forward(x[:, :, :: self.step, :: self.step])


class SmallImageResNet(nn.Module):
    """ResNet of torchvision's basic blocks that maps (b, 3, S, S) to (b, widths[3], 1, 1).

    The stem keeps the resolution. Its padding of 2 results in maps of S + 2 pixels, as in the
    paper's networks.

    Args:
        blocks: number of blocks in each of the four stages.
        widths: width of each stage.
        zero_init_residual: initialise the scale of each block's last batch norm with 0, so that
            the block starts as the identity. True for the paper's ResNet10 and ResNet18, False for
            its target network.
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
    """Return (features, feature width) of a `SmallImageResNet`."""
    return SmallImageResNet(blocks, widths, zero_init_residual), widths[-1]


def resnet50():
    """Return (features, feature width) of torchvision's ResNet50 without its head.

    `features` maps (b, 3, S, S) to (b, 2048). It is the target of the paper's appendix D.
    """
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    return network, 2048
