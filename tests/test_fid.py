"""The Frechet distance against closed forms, and the command on a toy set."""

import math
import sys

import pytest
import torch

import models
from data.distilled import load_distilled
from evaluation import fid, results
from models import saved
from utils import files
from utils.errors import UserError

make_generator = torch.Generator().manual_seed


def test_distance_of_diagonal_gaussians():
    """Compare with |m1 - m2|^2 + sum_i (s1_i - s2_i)^2."""
    g = make_generator(0)
    m1, m2, s1, s2 = (torch.rand(7, generator=g, dtype=torch.float64) for _ in range(4))
    expected = sum(
        (a - b) ** 2 + (c - d) ** 2 for a, b, c, d in zip(m1, m2, s1, s2, strict=True)
    ).item()
    assert fid.frechet_distance(m1, s1.square().diag(), m2, s2.square().diag()) == pytest.approx(
        expected, rel=1e-12
    )


def test_distance_in_two_dimensions():
    """Use tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)) for M = C1 C2, which do not commute."""
    c1 = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    c2 = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    product = c1 @ c2
    assert not torch.allclose(product, product.T)
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    zero = torch.zeros(2, dtype=torch.float64)
    assert fid.frechet_distance(zero, c1, zero, c2) == pytest.approx(10 - 2 * root, rel=1e-12)
    assert fid.frechet_distance(zero, c1, zero, c1) == pytest.approx(0, abs=1e-12)
    assert fid.frechet_distance(zero, c2, zero, c1) == pytest.approx(
        fid.frechet_distance(zero, c1, zero, c2)
    )


def test_distance_equals_that_from_the_eigenvalues_of_the_product():
    g = make_generator(1)
    a, b = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    c1, c2 = a @ a.T, b @ b.T
    m = torch.randn(2, 6, generator=g, dtype=torch.float64)
    root = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    expected = (m[0] - m[1]).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert fid.frechet_distance(m[0], c1, m[1], c2) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_distance_of_singular_covariances(rank):
    """Compare a projection P of rank r with 9 P, the identity and 0, which have closed forms."""
    q = torch.linalg.qr(torch.randn(40, 40, generator=make_generator(2), dtype=torch.float64))[0][
        :, :rank
    ]
    p, zero = q @ q.T, torch.zeros(40, dtype=torch.float64)
    assert fid.frechet_distance(zero, p, zero, 9 * p) == pytest.approx(
        4 * rank, rel=1e-9
    )  # r (1 - 3)^2
    assert fid.frechet_distance(zero, p, zero, torch.eye(40)) == pytest.approx(
        40 - rank, rel=1e-9
    )  # P^(1/2) = P
    other = torch.zeros(40, 40, dtype=torch.float64)
    assert fid.frechet_distance(zero, p, zero, other) == pytest.approx(rank, rel=1e-9)


def test_moments_do_not_depend_on_the_batches():
    x = torch.randn(50, 4, generator=make_generator(3)) * torch.tensor([1.0, 10, 0.1, 3]) + 100
    moments = fid.Moments()
    for part in x.split(7):
        moments.add(part)
    torch.testing.assert_close(moments.mean(), x.double().mean(0))
    torch.testing.assert_close(moments.covariance(), torch.cov(x.double().T), rtol=1e-6, atol=1e-9)


def test_command_uses_our_networks_and_stores_results(roots, runs, distilled, tmp_path):
    target, data, own = runs / "target" / "seed0" / "target.pt", roots[:2], tmp_path / "model.pt"
    network = models.build("vgg11", 32, 10, 0.125)  # 64 features
    files.save(
        own, "model", saved.make_content(network, "vgg11", 0.125, 32, 10, {"method": "krr_st"})
    )
    flags = ["--distilled", str(distilled), *data]
    for network in (target, own, target):
        fid.main([*flags, "--network", str(network)])
    lines = [
        line
        for line in results.read(distilled.parent / "results.jsonl")
        if line["protocol"] == "fid"
    ]
    assert [line["name"] for line in lines] == [
        "fid_target",
        "fid_model",
    ]  # the third command finds its result
    assert (
        "resnet18_target-x0.125 of digits" in lines[0]["network"]
        and "vgg11-x0.125 of krr_st" in lines[1]["network"]
    )
    assert all(
        line["fid"] >= 0 and line["source"] == "digits" and line["num_images"] == 20
        for line in lines
    )

    content = files.load(distilled, "distilled")
    content = {name: content[name] for name in content if name not in ("kind", "format")}
    low_rank = content | dict(meta=content["meta"] | dict(num_images=6))
    files.save(tmp_path / "low_rank.pt", "distilled", low_rank)
    fid.main([*flags, "--distilled", str(tmp_path / "low_rank.pt"), "--network", str(target)])
    [line] = results.read(tmp_path / "results.jsonl")
    assert line["num_images"] == 6  # of equal size, not all 20 images

    files.save(
        tmp_path / "one.pt",
        "distilled",
        content | dict(images=content["images"][:1], targets=content["targets"][:1]),
    )
    for more, word in (
        (["--distilled", str(tmp_path / "one.pt"), "--network", str(target)], "at least two"),
        (["--network", str(distilled)], "not a target file"),
        (["--network", "x.pt"], "no such file"),
    ):
        with pytest.raises(UserError, match=word):
            fid.main([*flags, *more])


def test_real_images_are_closer_to_their_source_than_noise(roots, runs, distilled):
    d = load_distilled(distilled)
    source = fid.load_images("digits", "train", 32, runs.parents[1] / "data")
    _, features = fid.load_network(
        runs / "target" / "seed0" / "target.pt", source, torch.device("cpu")
    )
    d.images = source.normalised(torch.arange(200), "cpu")
    real = fid.measure_fid(d, source, features, torch.device("cpu"))
    d.images = torch.randn(200, 3, 32, 32, generator=make_generator(4))
    assert real < 0.1 * fid.measure_fid(d, source, features, torch.device("cpu"))


def test_only_the_device_is_a_flag(distilled, capsys):
    flags = ["--distilled", str(distilled), "--device", "cpu"]
    assert fid.parse_args(flags).precision == "fp32"
    for more in (["--precision", "bf16"], ["--deterministic"]):
        with pytest.raises(SystemExit):
            fid.parse_args([*flags, *more])
        assert f"unrecognized arguments: {' '.join(more)}" in capsys.readouterr().err


def test_inception_without_its_package_is_an_error(distilled, roots, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        fid.main(["--distilled", str(distilled), *roots[:2]])
