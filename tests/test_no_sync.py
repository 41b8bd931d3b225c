"""Training steps neither wait for the device nor mix devices, generators or dtypes.

Each step runs on the device meta, which has no values, in float32 and in bf16. There, reading a
value (`item`, `bool`, `cpu`) raises. `Guard` refuses what a GPU would turn into a wait or an error.
(Fake CUDA tensors would be closer to a GPU, but builds of PyTorch with CUDA have no gradients of
them on machines without a driver.)
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.images import load_images
from data.loading import Loader
from tests.steps import STEPS, Finished
from utils import optim
from utils.sampling import Batches

META = torch.device("meta")
aten = torch.ops.aten


class Guard(TorchDispatchMode):
    """Refuse operations on tensors of several devices, and random numbers of another generator.

    Copies to another device must not block. Scalars on the CPU are allowed, as on a GPU. The device
    meta has no generator, so the steps have None in its place.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._check_copy(args[0], target, kwargs.get("non_blocking"))
        elif function is aten.copy_.default:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            self._check_copy(args[1], args[0].device, non_blocking)
        else:
            leaves = tree_leaves((args, kwargs))
            tensors = [each for each in leaves if torch.is_tensor(each)]
            on = {each.device.type for each in tensors if each.ndim or each.device.type != "cpu"}
            assert len(on) < 2, f"tensors on several devices in {function}"
            generated = any(isinstance(each, torch.Generator) for each in leaves)
            on_device = on == {"meta"} or torch.device(kwargs.get("device") or "cpu") == META
            assert not (generated and on_device), "a generator of the CPU"
        return function(*args, **kwargs)

    @staticmethod
    def _check_copy(source, device, non_blocking):
        crosses = source.device.type == "cpu" and device.type != "cpu"
        assert not crosses or non_blocking, "a copy from the CPU that blocks"


class Bf16Products(TorchFunctionMode):
    """What autocast to bf16 does on CUDA: it casts the inputs of products and convolutions."""

    FUNCTIONS = (
        F.conv2d,
        F.linear,
        torch.conv2d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.mm,
        torch.Tensor.__matmul__,
        torch.Tensor.__rmatmul__,
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FUNCTIONS:
            args = [
                each.bfloat16() if torch.is_tensor(each) and each.dtype == torch.float32 else each
                for each in args
            ]
        return function(*args, **(kwargs or {}))


def autocast(device, precision):
    return Bf16Products() if precision == "bf16" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """The device meta has neither a generator nor autocast."""

    def build(self, seed, device, per_rank=False):
        torch.manual_seed(seed)
        self.cpu, self.device = torch.Generator().manual_seed(seed), None

    monkeypatch.setattr("utils.sampling.Randomness.__init__", build)
    for module in (
        "distillers.dm",
        "distillers.dsa",
        "distillers.experts",
        "distillers.matching",
        "distillers.pool",
        "distillers.ssl_bilevel",
        "finetune",
        "kd",
        "pretrain",
        "pretrain_target",
    ):
        monkeypatch.setattr(f"{module}.autocast", autocast)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_images("digits", "train", 32, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_step(name, precision, source):
    with pytest.raises(Finished):
        STEPS[name](source, META, precision, Guard)


@pytest.mark.parametrize("name", STEPS)
def test_planted_wait_is_caught(name, source, monkeypatch):
    """The optimiser reads a value of the first parameter."""
    build = optim.make_optimizer

    def waiting(name, params, *args, **kwargs):
        made = build(name, params, *args, **kwargs)
        first = made.param_groups[0]["params"][0]
        made.register_step_post_hook(lambda *_: first.sum().item())
        return made

    monkeypatch.setattr("utils.optim.make_optimizer", waiting)
    with pytest.raises(RuntimeError, match="cannot be called on meta"):
        STEPS[name](source, META, "fp32", Guard)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x: x.sum() if x.sum() > 0 else -x, "cannot be called on meta"),
        (lambda x: x.cpu(), "Cannot copy out of meta"),
        (lambda x: x + torch.ones(len(x)).to(META), "copy from the CPU that blocks"),
        (lambda x: x[torch.arange(2)], "several devices"),
        (lambda x: x * torch.ones(len(x)), "several devices"),
        (lambda x: torch.rand(3, generator=torch.Generator(), device=META), "generator of the CPU"),
        (lambda x: x @ x.bfloat16(), "dtype"),
    ],
)
def test_planted_fault_is_caught(fault, error, source, monkeypatch):
    monkeypatch.setattr(
        "utils.optim.gradient_norm",
        lambda parameters: fault(next(iter(parameters)).flatten().detach()),
    )
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=error):
        STEPS["pre-training, features"](source, META, "fp32", Guard)


def test_loader_of_tensors_on_the_device_has_no_thread():
    tensors = [torch.zeros(5, 3, device=META), torch.zeros(5, dtype=torch.long, device=META)]
    loader = Loader(tensors, Batches(5, 2, torch.Generator()), META)
    with Guard():
        batches = [loader.next() for _ in range(3)]
    assert [[tuple(rows.shape) for rows in batch] for batch in batches] == [
        [(2, 3), (2,)],
        [(2, 3), (2,)],
        [(1, 3), (1,)],
    ]
    assert loader.worker is None and Loader([torch.zeros(5)], None, META).worker
