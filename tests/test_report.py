"""The report: one self-contained HTML file about all runs, including damaged ones."""

import base64
import html.parser
import io
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from analysis import report
from data.distilled import load_distilled
from data.images import load_images
from evaluation import results
from tests.test_tables import make_line
from utils import files
from utils.errors import UserError

HOSTILE = """<script>alert('&"$x_1$')</script>"""


class Parsed(html.parser.HTMLParser):
    """The tags, attributes, text and pictures of a page. Tags must be closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.pictures, self.open = set(), set(), "", {}, []
        self.links = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "a":
            self.links.append(dict(attributes)["href"])
        if tag == "img":
            known = dict(attributes)
            kind, data = known["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            self.pictures.setdefault(known["alt"], []).append(np.asarray(picture))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open and self.open[-1] == "style" else f" {data}"


def read_report(root, roots, tmp_path):
    out = tmp_path / "out" / "page.html"
    report.main([str(root), *roots[:2], "--out", str(out)])
    page = Parsed(out.read_text())
    assert page.tags <= {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "div",
        "table",
        "tr",
        "th",
        "td",
        "strong",
        "details",
        "summary",
        "figure",
        "figcaption",
        "img",
        "ul",
        "li",
        "span",
        "code",
        "a",
    }
    known = {"lang", "charset", "name", "content", "class", "open", "alt", "src", "href"}
    assert page.attributes <= known
    assert all((out.parent / unquote(link)).is_file() for link in page.links)
    assert not re.search(r"https?:|url\(|@import|<link|<script", out.read_text())
    return page


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Use few points, because t-SNE takes most of the time of a report."""
    monkeypatch.setattr(report, "MOST_POINTS", 60)


@pytest.fixture
def root(roots, weights, tmp_path):
    """Copy a toy target, a distilled set and a network to a new run root."""
    for folder in ("target/seed0", "krr_st/seed0", "krr_st/seed0/convnet3-x0.125/seed0"):
        (tmp_path / "runs" / "digits" / folder).mkdir(parents=True, exist_ok=True)
        for path in (Path(roots[3]) / "digits" / folder).iterdir():
            if path.is_file() and path.name != "results.jsonl":  # written by other tests
                shutil.copy2(path, tmp_path / "runs" / "digits" / folder)
    return tmp_path / "runs"


def write_unfinished_run(folder, log, command="python -m distillers dm", **settings):
    folder.mkdir(parents=True)
    content = dict(command=[command], settings=settings, versions={})
    files.write_json(folder / "config.json", content)
    (folder / "log.jsonl").write_text(log)


def test_report_shows_finished_runs(root, roots, tmp_path):
    results.append(
        root / "digits" / "krr_st" / "seed0" / "convnet3-x0.125" / "seed0",
        make_line(61.5, dataset="digits"),
    )
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    page = read_report(root, roots, tmp_path)
    assert {
        path: path.stat().st_mtime_ns for path in root.rglob("*")
    } == before  # the report changes no file
    assert "61.50 ± 0.00 (n=1)" in page.text and "Left out" not in page.text
    linked = {Path(link).name for link in page.links if "krr_st/seed0/" in link}
    assert linked == {"distilled.pt", "images.png", "config.json", "log.jsonl"}
    assert "python distill.py --source digits --num-images 20" in page.text
    assert "krr_st/seed0, finished" in page.text and "target/seed0, finished" in page.text
    changed = page.text.index("Settings that differ", page.text.index("krr_st/seed0, finished"))
    words = page.text[changed:].split()
    assert words[words.index("outer_steps") :][:3] == [
        "outer_steps",
        "4",
        "300",
    ]  # value and preset
    assert page.text.index("outer_steps", changed) < page.text.index("other settings", changed)
    moved = load_distilled(root / "digits" / "krr_st" / "seed0" / "distilled.pt").meta[
        "distance_from_initial"
    ]
    assert f"in standard deviations of the source) {moved:.4f}" in re.sub(r"\s+", " ", page.text)
    assert {
        "train target: loss",
        "distil: loss",
        "distil: gradient",
        "t-SNE of the features",
    } <= page.pictures.keys()
    assert any(title.endswith("convnet3-x0.125: pre-train") for title in page.pictures)
    again = (tmp_path / "out" / "page.html").read_bytes()
    read_report(root, roots, tmp_path)
    assert (tmp_path / "out" / "page.html").read_bytes() == again


def test_report_has_the_images_of_the_set(root, roots, data_root, tmp_path):
    d = load_distilled(root / "digits" / "krr_st" / "seed0" / "distilled.pt")
    source = load_images("digits", "train", 32, data_root)
    page = read_report(root, roots, tmp_path)
    initial = source.pixels[torch.tensor(d.meta["initial"])].permute(0, 3, 1, 2) / 255
    for title, pixels in (("distilled", d.pixels()), ("initial", initial)):
        [shown] = page.pictures[title]
        wanted = make_grid(pixels, nrow=10, padding=1, pad_value=1.0).permute(1, 2, 0).numpy() * 255
        assert shown.shape == wanted.shape and np.abs(shown - wanted).max() <= 1
    colours = {
        tuple(map(int, pixel)) for pixel in page.pictures["t-SNE of the features"][0].reshape(-1, 3)
    }
    near = [
        min(sum(abs(a - b) for a, b in zip(c, wanted, strict=True)) for c in colours)
        for wanted in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xAA, 0xAA, 0xAA))
    ]
    assert max(near) < 30  # X_s, Y_s and X_t, with a palette


def test_target_network_in_a_folder_of_another_name_is_found(root, roots, tmp_path):
    (root / "digits" / "target").rename(root / "digits" / "encoder")
    page = read_report(root, roots, tmp_path)
    assert "t-SNE of the features" in page.pictures
    shutil.rmtree(root / "digits" / "encoder")
    page = read_report(root, roots, tmp_path)
    assert "t-SNE of the features" not in page.pictures
    assert f"{root / 'digits'}: target network not found" in page.text


def test_initial_images_are_omitted_without_the_source(root, tmp_path):
    page = read_report(root, ["--data-root", str(tmp_path / "nothing")], tmp_path)
    assert "distilled" in page.pictures and "initial" not in page.pictures
    assert "digits at 32 px is not prepared" in page.text and not (tmp_path / "nothing").exists()


def test_report_shows_unfinished_runs_and_incomplete_logs(root, roots, tmp_path):
    lines = [dict(phase="distil", step=s, of=1200, loss=1 / s, seconds=1.0) for s in (50, 100)]
    lines += [
        dict(phase="distil", step=150, of=1200, loss=float("nan")),
        dict(phase="distil", step=[1], loss=1),
        dict(phase=["x"], step="late", loss=2),
        dict(phase="distil", step=200, of=1200, loss={}),
    ]
    log = "".join(json.dumps(each) + "\n" for each in lines) + '[1, 2]\n{"phase": "dist'
    write_unfinished_run(
        root / "digits" / "dm" / "seed0", log, preset="digits", num_images=30, outer_steps=1200
    )
    write_unfinished_run(root / "digits" / "mtt" / "seed0", "", num_images=30)
    Image.new("RGB", (700, 300), "red").save(root / "digits" / "dm" / "seed0" / "images.png")
    (root / "digits" / "dm" / "seed0" / "log.jsonl").write_bytes(log.encode() + b"\xff\xfe")
    page = read_report(root, roots, tmp_path)
    assert (
        "unfinished: distil, step 200 of 1,200" in page.text
        and "unfinished, no log yet" in page.text
    )
    assert "(2 unfinished)" in page.text and "Left out" not in page.text
    assert page.pictures["images so far"][0].shape[1] == 520
    assert len(page.pictures["distil: loss"]) == 2  # of KRR-ST, and what is a number of dm's


def test_damaged_files_are_listed_and_left_out(root, roots, tmp_path):
    made = root / "digits" / "krr_st" / "seed0"
    for name in ("a", "b", "c"):
        shutil.copytree(
            made, root / "digits" / name / "seed0", ignore=shutil.ignore_patterns("convnet*")
        )
    whole = (made / "distilled.pt").read_bytes()
    broken = [
        root / "digits" / "a" / "seed0" / "distilled.pt",
        root / "digits" / "b" / "seed0" / "config.json",
        root / "digits" / "c" / "seed0" / "results.jsonl",
        root / "digits" / "c" / "seed0" / "images.png",
        root / "x" / "results.jsonl",
    ]
    broken[0].write_bytes(whole[: len(whole) // 2])
    broken[1].write_text('{"settings": {')
    broken[2].write_text("no result\n")
    (root / "digits" / "c" / "seed0" / "distilled.pt").unlink()
    broken[3].write_bytes(b"\x89PNG no picture")
    broken[4].parent.mkdir()
    good = make_line(61.5, dataset="digits")
    wrong = [
        dict(digest="a"),
        good | dict(deviations=[1]),
        good | dict(accuracy="high"),
        good | dict(arch=None),
        good | dict(protocol="kd"),
        good | dict(images=3),
        good | dict(label_fraction="x"),
    ]
    broken[4].write_text("".join(json.dumps(each) + "\n" for each in [good, *wrong]))
    page = read_report(root, roots, tmp_path)
    left_out = page.text[page.text.index("Left out") : page.text.index("Results ")]
    assert all(str(path) in left_out for path in broken)
    assert all(
        word in left_out for word in ("deviations", "accuracy", "arch", "images", "label_fraction")
    )
    assert "61.50 ± 0.00 (n=1)" in page.text and "Its settings cannot be read" in page.text
    assert (
        len(page.pictures["distilled"]) == 2
    )  # of the whole set, and of the one whose settings are damaged


def test_names_and_values_are_escaped(root, roots, tmp_path):
    folder = root / HOSTILE.replace("/", "") / "<b>&" / "seed0"
    log = "".join(
        json.dumps({"phase": HOSTILE, "step": s, "<i>$\\frac{$": s}) + "\n" for s in (1, 2)
    )
    write_unfinished_run(folder, log, preset=HOSTILE, num_images=3, note=HOSTILE)
    write_unfinished_run(
        folder / "convnet$3" / "seed0",
        log.replace("<i>$\\\\frac{$", "loss"),
        loss="mse",
        arch="<u>",
    )
    results.append(
        folder,
        make_line(
            50.0, dataset="digits", method=HOSTILE, source="<em>", deviations={"<s>": ["<q>", 1]}
        ),
    )
    page = read_report(root, roots, tmp_path)  # where a tag of these would be found
    assert page.text.count(HOSTILE) >= 4 and "<b>&" in page.text and "<em>" in page.text
    assert any("convnet$3" in title for title in page.pictures)


def test_page_of_many_runs_is_small(root, roots, tmp_path):
    below = root / "digits" / "krr_st" / "seed0" / "convnet3-x0.125"
    log = "".join(
        json.dumps(dict(phase="pre-train", step=s, of=300, loss=1 / s)) + "\n"
        for s in range(1, 300)
    )
    for seed in range(1, 120):
        write_unfinished_run(below / f"seed{seed}", log, "pretrain.py", loss="mse", lr=0.5)
        write_unfinished_run(root / "digits" / f"set{seed}" / "seed0", "", num_images=3)
    page = read_report(root, roots, tmp_path)
    [title] = [title for title in page.pictures if title.endswith("(8 of 120 runs)")]
    assert len(page.pictures[title]) == 1 and page.text.count("lr 0.5 (0.1)") == 119
    assert "t-SNE of the features" not in page.pictures  # for few sets only
    assert (tmp_path / "out" / "page.html").stat().st_size < 1e6


def test_folder_without_runs_is_an_error(roots, tmp_path):
    with pytest.raises(UserError, match="contains no runs"):
        report.main([str(tmp_path), *roots[:2]])
    with pytest.raises(UserError, match="no such folder"):
        report.main([str(tmp_path / "x"), *roots[:2]])
    results.append(tmp_path, make_line(61.5))
    report.main([str(tmp_path), *roots[:2]])
    assert "61.50 ± 0.00 (n=1)" in (tmp_path / "report.html").read_text()
