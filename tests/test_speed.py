"""What is fast must change nothing: folded batch norm, chunks, and the whole step beside the plain
one."""

import json
import sys
from pathlib import Path

import pytest
import torch

import models
from benchmarks import scaling, speed
from models.frozen import Frozen, Skeleton
from tests.conftest import DISTILL, run_command
from utils import allocator
from utils.run import read_log

ALL = [name for name in models.ARCHITECTURES if name != "resnet50_target"]


def trained(arch):
    """A narrow network in float64 whose batch norms have seen images, in train mode."""
    torch.manual_seed(0)
    network = models.build(arch, 32, 4, width=0.05).double().train()
    for _ in range(3):
        network(2 * torch.randn(8, 3, 32, 32, dtype=torch.float64) + 1)
    return network


@pytest.mark.parametrize("arch", ALL)
def test_frozen_features_and_their_gradient_are_those_of_the_network_in_eval_mode(arch):
    network = trained(arch)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    found = [frozen_features(network, x, chunk) for chunk in (0, 2)]
    assert network.training and all(
        p.requires_grad and p.grad is None for p in network.parameters()
    )
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    expected = network.eval().embed(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for features, by_x in found:
        torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(by_x, gradient, rtol=1e-9, atol=1e-12)


def frozen_features(network, x, chunk):
    """And the gradient of their squared norm."""
    features = Frozen(network)(x, chunk)
    return features, torch.autograd.grad(features.square().sum(), x)[0]


def test_every_batch_norm_is_folded():
    for arch in ALL:
        network = models.build(arch, 32, 0, width=0.05)
        norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        assert len(Skeleton(network).pairs) == norms


def test_frozen_features_follow_the_weights():
    network = trained("convnet3")
    frozen, x = Frozen(network), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    first = frozen(x)
    with torch.no_grad():
        network.features[0].weight.mul_(1.5)
        network.features[1].running_mean.add_(0.5)
    assert not torch.allclose(frozen(x), first)
    torch.testing.assert_close(frozen(x), network.eval().embed(x), rtol=1e-9, atol=1e-12)


def test_chunks_keep_no_layers_for_the_backward_pass():
    frozen, x = (
        Frozen(trained("convnet4")),
        torch.randn(40, 3, 32, 32, dtype=torch.float64, requires_grad=True),
    )

    def kept(chunk):
        bytes_kept = []

        def note(tensor):
            bytes_kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            frozen(x, chunk)
        return sum(bytes_kept)

    assert kept(10) <= 2 * x.nbytes < kept(0)


def losses(roots, name, *flags):
    words = [
        "distill.py",
        "--source",
        "digits",
        *roots,
        *DISTILL,
        "--outer-steps",
        "50",
        "--log-every",
        "1",
    ]
    run_command(*words, "--name", name, *flags)
    return [
        line["loss"]
        for line in read_log(Path(roots[3]) / "digits" / name / "seed0")
        if line["phase"] == "distil"
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool_lr", "tolerance"),
    [
        ("1e-9", 1e-3),  # untrained members: only the outer loss and the update of X_s and Y_s
        ("0.01", 2e-2),  # training the members amplifies rounding errors
    ],
)
def test_fifty_losses_are_those_of_the_plain_step(roots, pool_lr, tolerance):
    ours = losses(roots, f"ours_{pool_lr}", "--pool-lr", pool_lr)
    plain = losses(roots, f"plain_{pool_lr}", "--pool-lr", pool_lr, "--reference")
    assert len(ours) == 50
    assert plain[:5] == pytest.approx(ours[:5], rel=tolerance / 10)
    assert plain == pytest.approx(ours, rel=tolerance)


def test_reference_is_plain(roots):
    words = [
        "distill.py",
        "--source",
        "digits",
        *roots,
        *DISTILL,
        "--name",
        "refused",
        "--reference",
    ]
    done = run_command(*words, "--augment-outer", check=False)
    assert done.returncode == 2 and done.stderr.startswith(
        "distill.py: error: --reference requires"
    )
    assert not Path(roots[3], "digits", "refused").exists()


@pytest.mark.long
def test_speed_prints_a_table_and_collects_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "speed.jsonl")
    words = ["--width", "0.05", "--num-images", "10", "--outer-batch", "12", "--pairs", "1"]
    words += ["--device", "cpu", "--precision", "fp32"]
    speed.RESULTS.write_text(json.dumps(dict.fromkeys(speed.KEY, "another")) + "\n")
    for flags in ([], ["--chunk", "4"]):
        speed.main([*words, *flags, "--collect"])
    results = [json.loads(line) for line in speed.RESULTS.read_text().splitlines()]
    assert results.pop(0)["preset"] == "another"
    assert [result["chunk"] for result in results] == [0, 4]
    whole, chunked = results
    shown = capsys.readouterr().out
    assert "m = 10, b = 12, 32 px, convnet3-x0.05" in shown
    assert "n = 1 pairs: **" in shown and "% of the limit" in shown
    assert whole["plain_flop"] > 2 * whole["flop"]  # the target network
    assert chunked["flop"] > whole["flop"]  # layers twice
    parts = sum(operations for _, operations in whole["parts"].values())
    assert parts == pytest.approx(whole["flop"], rel=0.01)
    (pair,) = whole["rounds"]
    for which in ("ours", "plain"):
        assert pair[which]["seconds"] > 0 and pair[which]["steps"] >= 1
        assert pair[which]["memory"] > 0
    for found in whole["errors"].values():
        assert found["loss"] < 1e-3 and max(found.values()) < 0.05


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_kept_when_asked_for():
    code = """
import sys, torch
from pathlib import Path
from utils.allocator import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
keep_freed_memory(sys.argv[1] == "keep")
before = resident()
torch.ones(2**26).sum()  # 256 MiB
print((resident() - before) // 2**20)
keep_freed_memory(False)
print((resident() - before) // 2**20)
"""
    kept, back = map(int, run_command("-c", code, "keep").stdout.split())
    assert kept > 200 > 50 > back
    assert max(map(int, run_command("-c", code, "usual").stdout.split())) < 50
    allocator.keep_freed_memory(False)


@pytest.mark.long
def test_growth_measures_each_axis_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        scaling, "BASE", dict(num_images=6, outer_batch=8, image_size=32, source=20, chunk=0)
    )
    monkeypatch.setattr(
        scaling,
        "AXES",
        {"num_images": (6, 12), "chunk": (0, 4)}
        | {name: (scaling.BASE[name],) for name in ("outer_batch", "image_size", "source")},
    )
    args = scaling.parse_args(["--width", "0.05", "--device", "cpu"])
    lines = [scaling.measure(setting, args) for _, setting in scaling.all_settings()]
    text = scaling.format_results(lines)
    rows = [row.split("|")[1:3] for row in text.splitlines() if row.startswith("| ")][1:]
    assert ["distilled images m", "12"] in [[cell.strip() for cell in row] for row in rows]
    assert ["--chunk", "4"] in [[cell.strip() for cell in row] for row in rows]
    assert all(line["memory_gib"] > 0 for line in lines)
    scaling.draw(lines, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
