"""Feature dimensions and parameter counts of every network, as in the paper."""

import pytest
import torch
import torchvision

import models
from models.resnet import Subsampling1x1
from utils.errors import UserError

# (name, image size, width of the features, parameters of the feature extractor)
EXPECTED = [
    ("convnet3", 32, 8192, 1_480_704),
    ("convnet4", 64, 8192, 1_552_896),
    ("convnet5", 224, 25_088, 1_570_560),
    ("dc_convnet3", 32, 2048, 299_520),
    ("dc_convnet4", 64, 2048, 447_360),
    ("dc_convnet5", 224, 6272, 595_200),
    ("vgg11", 32, 512, 9_225_984),
    ("vgg11", 64, 2048, 9_225_984),
    ("vgg11", 224, 25_088, 9_225_984),
    ("alexnet", 32, 3072, 1_843_392),
    ("alexnet", 64, 12_288, 1_843_392),
    ("mobilenet", 32, 1280, 1_079_504),
    ("mobilenet", 64, 1280, 1_079_504),
    ("resnet10", 32, 512, 4_898_112),
    ("resnet18", 64, 512, 11_168_832),
    ("resnet18_target", 32, 512, 11_168_832),
]


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("arch", "size", "width", "count"), EXPECTED)
def test_feature_dimension_and_parameters_are_those_of_the_paper(arch, size, width, count):
    network = models.build(arch, size, 7).eval()
    assert count_parameters(network.features) == count
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        assert network.embed(x).shape == (2, width)
        assert torch.equal(network(x), network.fc(network.embed(x)))
    assert network(x).shape == (2, 7)


def test_head_is_linear():
    assert count_parameters(models.build("convnet3", 32, 512).fc) == 4_194_816


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize(
    "arch", [name for name in models.ARCHITECTURES if name != "resnet50_target"]
)
def test_every_network_accepts_every_size_and_small_widths(arch, size):
    network = models.build(arch, size, 4, width=0.125)
    loss = network(torch.randn(2, 3, size, size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("width", [0.0, -0.25])
def test_width_must_be_positive(width):
    with pytest.raises(UserError, match="--width"):
        models.build("convnet3", 32, 4, width)


def test_instance_norm_normalises_each_image_separately():
    """Compare with the normalisation of each channel of each image."""
    network, x = (
        models.build("dc_convnet3", 32, 4, width=0.05).double(),
        torch.randn(3, 3, 32, 32).double(),
    )
    maps = network.features[0](x)
    normalised = (maps - maps.mean((2, 3), keepdim=True)) / (
        maps.var((2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(network.features[1](maps), normalised)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))
    assert network.features[1].weight.shape == network.features[1].bias.shape == (6,)


def test_resnet50_target_has_the_parameters_of_resnet50():
    network = models.build("resnet50_target", 64, 0).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 2048)


def test_resnet_maps_have_the_paper_sizes():
    features = models.build("resnet10", 32, 1).features
    sides = []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(features, name).register_forward_hook(
            lambda module, x, y: sides.append(y.shape[-1])
        )
    features(torch.randn(2, 3, 32, 32))
    assert sides == [34, 34, 17, 9, 5]


@pytest.mark.parametrize(
    ("arch", "zero"), [("resnet18", True), ("resnet10", True), ("resnet18_target", False)]
)
def test_residual_branches_start_at_zero_except_in_the_target(arch, zero):
    norms = [
        m for name, m in models.build(arch, 32, 1).features.named_modules() if name.endswith(".bn2")
    ]
    assert norms and all(bool((m.weight == 0).all()) == zero for m in norms)


def test_subsampled_convolution_equals_the_strided_one():
    ours = Subsampling1x1(5, 7, 2).double()
    x = torch.randn(3, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torch.nn.functional.conv2d(x, ours.weight, stride=2))


def test_seed_determines_the_network_with_names_of_torchvision():
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(models.build("resnet18_target", 32, 0).state_dict())
    assert all(torch.equal(value, built[1][name]) for name, value in built[0].items())
    theirs = {
        name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")
    }
    assert {name.removeprefix("features.") for name in built[0]} == theirs
