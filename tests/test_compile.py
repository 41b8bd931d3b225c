"""torch.compile of a pool: equal to the uncompiled pool, and compiled once for all members."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import distill
from distillers.pool import Pool
from models.frozen import Frozen
from tests.conftest import DISTILL
from utils import device
from utils.errors import UserError

CPU = torch.device("cpu")
NETWORK = dict(
    arch="convnet3", image_size=32, num_outputs=4, width=0.03, device=CPU, lr=0.05, weight_decay=0.0
)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile records as with a compiler, and runs PyTorch's own kernels."""
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def outer_losses(steps, **network):
    """Losses of a small distillation with three members, reset after four steps each."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    pool = Pool(3, 4, g, **NETWORK | network)
    x, y = torch.randn(6, 3, 32, 32, generator=g), torch.randn(6, 4, generator=g)
    x, y = x.contiguous(memory_format=torch.channels_last).requires_grad_(), y.requires_grad_()
    args = SimpleNamespace(chunk=0, ridge=1e-4, ridge_per_image=False, bias_column=True)
    sgd, losses = torch.optim.SGD([x, y], lr=0.05), []
    for _ in range(steps):
        x_real, y_real = torch.randn(9, 3, 32, 32, generator=g), torch.randn(9, 4, generator=g)
        member = pool.draw(g)
        loss = distill.outer_loss(member, x_real, y_real, x, y, args)
        sgd.zero_grad()
        loss.backward(inputs=[x, y])
        sgd.step()
        pool.advance(member, x.detach(), y.detach())
        losses.append(loss.item())
    return losses, pool


def check_fifty_steps():
    """Compare 50 steps of a compiled and a plain pool, and count the compilations."""
    torch.compiler.reset()
    counters.clear()
    plain, pool = outer_losses(50)
    assert not counters["stats"]["unique_graphs"]
    compiled, other = outer_losses(50, compiled=True)
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert compiled[:10] == pytest.approx(plain[:10], rel=1e-4)
    # Features of real images, features of distilled images, and the training pass.
    assert counters["stats"]["unique_graphs"] == 3
    for ours, theirs in zip(pool.members, other.members, strict=True):
        assert ours.steps == theirs.steps
        for name, value in ours.network.state_dict().items():
            torch.testing.assert_close(
                theirs.network.state_dict()[name], value, rtol=1e-3, atol=1e-4
            )


@pytest.mark.long
def test_fifty_compiled_steps_equal_plain_ones_with_one_compilation_for_all_members(traced):
    check_fifty_steps()


@pytest.mark.long
def test_fifty_steps_with_a_real_compiler():
    if fault := device.find_compiler_fault(CPU):
        pytest.skip(f"torch.compile does not work: {fault}")
    check_fifty_steps()


def test_compiled_bf16_steps_equal_plain_ones(traced):
    plain, _ = outer_losses(6, precision="bf16")
    assert outer_losses(6, precision="bf16", compiled=True)[0] == pytest.approx(plain, rel=1e-2)


def test_checkpoints_of_compiled_and_plain_pools_are_interchangeable(traced):
    _, pool = outer_losses(5)
    _, other = outer_losses(2, compiled=True)
    other.load_state_dict(pool.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(pool.members, other.members, strict=True):
        torch.testing.assert_close(ours.embed(x), theirs.embed(x))


def test_command_compiles_and_does_not_store_the_choice(traced, monkeypatch, roots):
    monkeypatch.setattr(device, "find_compiler_fault", lambda device: None)
    distill.main(["--source", "digits", *DISTILL, "--name", "on", "--compile", "on", *roots])
    assert counters["stats"]["unique_graphs"]
    config = json.loads((Path(roots[3]) / "digits" / "on" / "seed0" / "config.json").read_text())
    assert "compile" not in config["settings"]


def test_choice(monkeypatch):
    def compiles(choice, place, steps=160_000):
        args = SimpleNamespace(compile=choice, outer_steps=steps)
        return device.should_compile(args, place)

    cuda = torch.device("cuda")
    monkeypatch.setattr(device, "find_compiler_fault", lambda device: None)
    assert compiles("auto", cuda) and compiles("on", CPU) and compiles("on", cuda, 2)
    assert not compiles("auto", CPU) and not compiles("off", cuda)
    assert not compiles("auto", cuda, 2000)  # compiling takes longer than so few steps
    monkeypatch.setattr(device, "find_compiler_fault", lambda device: "no g++")
    assert not compiles("auto", cuda)
    with pytest.raises(UserError, match=r"--compile on: .*no g\+\+"):
        compiles("on", CPU)


def test_missing_compiler_is_found(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", fail)
    assert device.find_compiler_fault.__wrapped__(CPU) == "no compiler"


def test_batch_norm_is_folded_once_for_the_same_weights(monkeypatch):
    _, pool = outer_losses(2)
    member, x = pool.members[0], torch.randn(2, 3, 32, 32)
    frozen, folds = Frozen(member.network), []
    fold = frozen.skeleton.fold
    monkeypatch.setattr(frozen.skeleton, "fold", lambda *args: folds.append(1) or fold(*args))
    first = frozen(x)
    assert torch.equal(frozen(x), first) and len(folds) == 1
    for change in (
        lambda: member.train_step(x, torch.randn(2, 4)),
        lambda: member.network.features[1].running_mean.add_(1),
        lambda: member.network.load_state_dict(pool.members[1].network.state_dict()),
        lambda: member.network.double().float(),
    ):
        change(), folds.clear()
        assert torch.equal(frozen(x), Frozen(member.network)(x)) and len(folds) == 1
