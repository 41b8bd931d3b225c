"""No training step waits for the device: each runs on the device meta, which has no values.

There, reading a value (`item`, `bool`, `cpu`) raises. `NoBlockingCopy` also refuses copies from the
CPU that wait, which a GPU would turn into a synchronisation.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import kd
import models
import pretrain
import pretrain_target
from data.distilled import Distilled
from data.images import load_images
from distillers import method, registry
from utils.presets import preset
from utils.sampling import Randomness

META = torch.device("meta")
aten = torch.ops.aten


class NoBlockingCopy(TorchDispatchMode):
    """Refuse copies from the CPU to another device that block, and CPU indices of its tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._check(args[0], target, kwargs.get("non_blocking"))
        elif function is aten.copy_.default:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            self._check(args[1], args[0].device, non_blocking)
        elif function in (aten.index.Tensor, aten.index_put_.default):
            for index in args[1]:
                assert index is None or index.device == args[0].device, "an index on the CPU"
        return function(*args, **kwargs)

    @staticmethod
    def _check(source, device, non_blocking):
        crosses = source.device.type == "cpu" and device.type != "cpu"
        assert not crosses or non_blocking, "a copy from the CPU that blocks"


class Run:
    """Stands in for `Run`: three steps, no files."""

    limits, folder, done = {}, None, {}

    def resume(self, *args, **kwargs):
        pass

    def steps(self, phase, total):
        with NoBlockingCopy():
            yield from range(min(total, 3))
        if phase == "distil":
            raise Finished

    def log(self, step, **scalars):
        assert any(torch.is_tensor(each) for each in scalars.values())


class Target:
    """Stands in for a `Target` with stored features."""

    digest, deviations, feature_dim, name, path = "0", {}, 8, "", "target.pt"

    def __init__(self, n):
        self.table = torch.randn(n, self.feature_dim)

    def features_of(self, source):
        return self.table

    def features_at(self, source, index):
        return self.table[index].to(META)

    def features(self, x):
        return x.flatten(1)[:, : self.feature_dim]

    def require_network(self):
        pass


class Finished(Exception):
    """Raised at the end of a loop, because what follows may read values."""


@pytest.fixture(autouse=True)
def without_device_generator(monkeypatch):
    """The device meta has no generator."""

    def build(self, seed, device, per_rank=False):
        torch.manual_seed(seed)
        self.cpu, self.device = torch.Generator().manual_seed(seed), None

    monkeypatch.setattr("utils.sampling.Randomness.__init__", build)


@pytest.fixture(scope="module")
def source(data_root):
    return load_images("digits", "train", 32, data_root)


def network(outputs, arch="convnet3"):
    return models.build(arch, 32, outputs, 0.125).to(META)


def settings(stage, **changed):
    return SimpleNamespace(**(preset("digits", stage) | dict(precision="fp32") | changed))


def data_for(kind, targets, outputs):
    facts = dict(size=32, outputs=outputs, kind=kind, folder=None, identity={}, meta={})
    images = torch.randn(20, 3, 32, 32, device=META)
    return pretrain.TrainingData(
        images, targets.to(META), lambda x: x, **facts, deviations={}, num_images=20
    )


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("kind", ["feature", "class"])
def test_pretraining(kind, augment):
    targets = torch.randn(20, 8) if kind == "feature" else torch.arange(20) % 8
    recipe = preset("digits", "pretrain", kind, "convnet3") | dict(augment=augment, steps=3)
    args = SimpleNamespace(**recipe, precision="fp32")
    pretrain.pretrain(
        network(8), data_for(kind, targets, 8), args, Run(), Randomness(0, META), META
    )


def test_fine_tuning(source):
    finetune.finetune(network(10), source, settings("finetune"), Run(), Randomness(0, META), META)


def test_barlow_twins(source):
    pretrain_target.train(
        network(0, "resnet18_target"), source, settings("target", seed=0), Run(), META
    )


def test_knowledge_distillation():
    distilled = Distilled(
        torch.randn(20, 3, 32, 32), torch.randn(20, 8), "feature", torch.zeros(3), torch.ones(3), {}
    )
    kd.train_student(
        network(10), network(10), distilled, settings("kd"), Run(), Randomness(0, META), META
    )


@pytest.mark.parametrize("name", ["krr_st", "dm", "dsa", "frepo", "kip", "ssl_bilevel"])
def test_distillation(name, source):
    module = importlib.import_module(registry.METHODS[name].module)
    args = method.parse_args(module.METHOD, ["--source", "digits", "--num-images", "20"])
    chosen = module.METHOD.choose(source, 20, 0)
    with pytest.raises(Finished):
        module.METHOD.distill(source, chosen, Target(len(source)), args, Run(), META)


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda loss: loss.item(), "cannot be called on meta"),
        (lambda loss: loss if loss > 0 else -loss, "cannot be called on meta"),
        (lambda loss: loss.cpu(), "Cannot copy out of meta"),
        (lambda loss: loss + torch.ones(3).to(META), "copy from the CPU that blocks"),
        (lambda loss: torch.zeros(3, device=META)[torch.arange(2)], "index on the CPU"),
    ],
)
def test_a_step_that_waits_is_caught(read, error, monkeypatch):
    monkeypatch.setattr(
        "utils.optim.gradient_norm", lambda parameters: read(next(iter(parameters)).sum())
    )
    with pytest.raises((AssertionError, RuntimeError), match=error):
        test_pretraining("feature", False)
