"""Each figure is drawn with its content, reproducibly."""

import numpy as np
import pytest
from PIL import Image

from analysis import compare, figures, tables
from data.distilled import load_distilled
from data.images import load_images
from distillers import registry
from evaluation import results
from experiments.tables import TABLES
from tests.test_tables import SCRATCH, make_line
from utils.errors import UserError


def read_pixels(path):
    """Read the pixels of a picture, which must not be empty."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert (
        pixels.shape[0] > 100
        and pixels.shape[1] > 200
        and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    )
    return pixels


def test_images_are_drawn_beside_their_initial_ones(distilled, roots, tmp_path):
    d = load_distilled(distilled)
    source = load_images("digits", "train", 32, roots[1])
    initial = source.raw(d.meta["initial"], "cpu")
    assert (initial - d.pixels()).abs().mean() < 0.05  # after four small steps
    both, fewer = tmp_path / "a" / "both.png", tmp_path / "fewer.png"
    figures.main(["images", "--distilled", str(distilled), *roots[:2], "--out", str(both)])
    figures.main(
        ["images", "--distilled", str(distilled), *roots[:2], "--out", str(fewer), "--most", "3"]
    )
    assert read_pixels(both).shape[1] > read_pixels(fewer).shape[1]
    before = both.read_bytes()
    figures.main(["images", "--distilled", str(distilled), *roots[:2], "--out", str(both)])
    assert both.read_bytes() == before


def test_tsne_draws_three_colours(distilled, roots, runs, tmp_path):
    out = tmp_path / "tsne.png"
    figures.main(
        [
            "tsne",
            "--distilled",
            str(distilled),
            "--target-network",
            str(runs / "target" / "seed0" / "target.pt"),
            *roots[:2],
            "--real",
            "60",
            "--out",
            str(out),
        ]
    )
    colours = {tuple(pixel) for pixel in read_pixels(out).reshape(-1, 3)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xAA, 0xAA, 0xAA)} <= colours  # X_s, Y_s and X_t


def test_curves_are_drawn_from_logs(distilled, runs, tmp_path):
    out = tmp_path / "curves.png"
    figures.main(
        ["curves", "--out", str(out), str(distilled.parent), str(runs / "target" / "seed0")]
    )
    read_pixels(out)
    with pytest.raises(UserError, match=r"no log\.jsonl"):
        figures.main(["curves", "--out", str(out), str(tmp_path)])


def make_lines():
    for arch in ("vgg11", "alexnet", "mobilenet", "resnet10"):
        for seed in (0, 1):
            facts = dict(arch=arch, image_size=64, seed=seed)
            for target in ("cars", "dogs"):
                yield make_line(30.0 + seed, dataset=target, **facts, **SCRATCH)
                yield make_line(
                    40.0 + seed, dataset=target, source="tinyimagenet", num_images=2000, **facts
                )
    for m in (10, 100):
        yield make_line(50.0 + m / 10, num_images=m, deviations={"num_images": [m, 1000]})
    yield make_line(45.0, **SCRATCH)


def test_bars_and_counts_are_drawn_from_results(tmp_path, monkeypatch):
    for each in make_lines():
        results.append(tmp_path / "runs", each)
    for name in ("bars", "count"):
        figures.main([name, "--out", str(tmp_path / f"{name}.png"), str(tmp_path / "runs")])
        read_pixels(tmp_path / f"{name}.png")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "runs" / "results.jsonl")  # the default
    figures.main(["bars", "--out", str(tmp_path / "default.png")])
    assert (tmp_path / "default.png").read_bytes() == (tmp_path / "bars.png").read_bytes()
    (tmp_path / "none").mkdir()
    for name, word in (("bars", "no results for table5"), ("count", "two numbers of images")):
        with pytest.raises(UserError, match=word):
            figures.main([name, "--out", str(tmp_path / "x.png"), str(tmp_path / "none")])


def make_gain_lines():
    """Yield probes of three rows for two target networks and three seeds."""
    for target, gains in (("untrained", (0, 1)), ("encoder", (4, 9))):
        for method, gain in (("random_features", 0), ("krr_st", gains[0]), ("full", gains[1])):
            for seed in (0, 1, 2):
                for dataset, level in (("cifar10", 40), ("imagenette", 50)):
                    facts = dict(source="imagenette", method=f"{method}.{target}", seed=seed)
                    facts |= dict(dataset=dataset, protocol="linear", labels_per_class=100)
                    yield make_line(
                        level + gain * (1 + seed / 10),
                        distilled_seed=None if method == "full" else seed,
                        **facts,
                    )


def test_gain_by_target_network(tmp_path, monkeypatch):
    (source,) = TABLES["targets"].sources
    other = [line | dict(accuracy=0.0, labels_per_class=5) for line in make_gain_lines()]
    gains = figures.read_gains([*make_gain_lines(), *other], source)
    assert [*gains] == ["untrained", "encoder"]
    assert gains["encoder"]["krr_st"] == pytest.approx([4, 4.4, 4.8])
    assert gains["encoder"]["full"] == pytest.approx([9, 9.9, 10.8])
    for each in make_gain_lines():
        results.append(tmp_path / "runs", each)
    figures.main(["gain", "--out", str(tmp_path / "gain.png"), str(tmp_path / "runs")])
    read_pixels(tmp_path / "gain.png")
    monkeypatch.setattr(compare, "results_file", lambda name: tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"scripts/run_targets\.sh"):
        figures.main(["gain", "--out", str(tmp_path / "x.png")])


def test_methods_differ_without_colour():
    """Check that hatches, or markers with dashes, are unique for each method."""
    named = {name for table in tables.all_tables() for name in table.methods}
    methods = {*registry.METHODS} & named | {tables.ORACLE}
    assert (
        len(set(figures.HATCHES)) == len(figures.HATCHES) >= len(methods) - 1
    )  # Gaussian noise is in Table 4 only
    looks = {
        (figures.MARKERS[i % len(figures.MARKERS)], figures.DASHES[i % 4])
        for i in range(len(methods))
    }
    assert len(looks) == len(methods)
