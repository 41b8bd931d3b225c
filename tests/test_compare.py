"""Tables with paired differences, compared with numbers calculated by hand."""

import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from analysis import compare, docs
from data.distilled import load_distilled
from evaluation import results
from experiments.tables import TABLES, Protocol, Source, Table, TargetNetwork
from tests.conftest import run_command
from utils.errors import UserError
from utils.presets import DISTILL


def make_line(method, seeds, dataset, accuracy, protocol="linear", source="digits"):
    few = dict(labels_per_class=0, label_fraction=0.2)
    if protocol == "full":
        few = dict(labels_per_class=20, label_fraction=0.0)
    return dict(
        method=method,
        source=source,
        distilled_seed=seeds[0],
        seed=seeds[1],
        dataset=dataset,
        protocol=protocol,
        accuracy=accuracy,
        digest=f"{method}{seeds}{dataset}{protocol}",
        arch="convnet3",
        width=1.0,
        image_size=32,
        num_images=10,
        deviations={},
        **few,
    )


PROTOCOLS = Protocol("linear", label_fractions=(0.2,)), Protocol("full", labels_per_class=(20,))
TABLE = Table(
    "toy",
    "A toy.",
    sources=(Source("digits"),),
    methods=("scratch", "krr_st", "krr_st_d5"),
    protocols=PROTOCOLS,
)
LINES = [
    make_line("krr_st", (0, 0), "cars", 10.0),
    make_line("krr_st", (1, 1), "cars", 12.0),
    make_line("krr_st", (2, 2), "cars", 20.0),
    make_line("krr_st_d5", (0, 0), "cars", 9.0),
    make_line("krr_st_d5", (1, 1), "cars", 11.5),
    make_line("krr_st_d5", (2, 2), "cars", 19.0),
    make_line("krr_st", (0, 0), "cifar10", 40.0),
    make_line("krr_st", (1, 1), "cifar10", 44.0),
    make_line("krr_st_d5", (1, 1), "cifar10", 43.0),
    make_line("krr_st_d5", (2, 2), "cifar10", 45.0),
    make_line("krr_st", (0, 0), "cars", 5.0, "full"),
]


def parse_rows(text):
    return [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in text.splitlines()
        if row.startswith("|") and not row.startswith("| -")
    ]


def test_differences_are_paired_and_averaged_over_pre_trainings():
    ours = {(0, 0): 9.0, (0, 1): 7.0, (1, 0): 11.5, (2, 0): 1.0}
    base = {(0, 0): 10.0, (0, 1): 9.0, (1, 0): 12.0, (3, 0): 5.0}
    assert compare.paired_differences(ours, base) == [-1.5, -0.5]  # distillations 0 and 1


def test_row_without_distillations_is_compared_with_each_distillation():
    scratch = {(None, 0): 5.0, (None, 1): 7.0}
    sets = {(0, 0): 6.0, (0, 1): 9.0, (1, 0): 4.0}
    assert compare.paired_differences(sets, scratch) == [1.5, -1.0]
    assert compare.paired_differences(scratch, sets) == [-1.5, 1.0]
    assert compare.paired_differences(scratch, {(None, 0): 1.0, (None, 2): 0.0}) == [4.0]
    assert compare.paired_differences({}, sets) == []


def test_interval_is_that_of_students_t():
    values = [-1.0, -0.5, -1.0]
    low, high = compare.interval(values)
    # Student's t of two degrees of freedom: 4.303; standard error 0.2887 / sqrt(3) = 0.1667.
    assert (low, high) == pytest.approx((-2.5 / 3 - 0.7172, -2.5 / 3 + 0.7172), abs=1e-4)
    assert (low, high) == pytest.approx(
        stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    )
    assert compare.interval([1.0]) is None
    spread = compare.interval([0.0, 0.0, 3.0])
    assert spread[0] < 0 < spread[1] and math.isclose(sum(spread), 2.0)


def test_means_over_data_sets_use_seeds_with_all_data_sets():
    found = compare.group_by_seeds(LINES)
    column = "linear, 20 % of labels", compare.MEAN
    assert found["krr_st"][column] == {(0, 0): 25.0, (1, 1): 28.0}
    assert found["krr_st_d5"][column] == {(1, 1): 27.25, (2, 2): 32.0}


def test_no_pre_training_appears_only_in_columns_of_other_rows():
    scratch = [
        make_line("scratch", (None, 0), dataset, 8.0, protocol, source=None)
        for dataset, protocol in (("cars", "linear"), ("digits", "linear"), ("cifar10", "full"))
    ]
    rows = [
        (row[0], row[1].partition(" ")[0])
        for row in parse_rows(compare.format_datasets(TABLE, [*LINES, *scratch]))
    ]
    assert ("no pre-training", "8.00") in rows and ("digits: digits", "linear,") not in rows
    shown = parse_rows(compare.format_means(TABLE, [*LINES, *scratch]))
    assert [row[:3] for row in shown[1:]] == [
        ["KRR-ST", "26.50 ± 1.50", "5.00 ± 0.00"],
        ["KRR-ST, D5: pool that never resets", "29.62 ± 2.38 (-0.75)", ""],
    ]


def test_there_is_a_table_per_data_set_and_one_of_means():
    rows = parse_rows(compare.format_datasets(TABLE, LINES))
    assert rows[0] == ["digits: cars", "linear, 20 % of labels", "full, 20 labels/class", "n"]
    assert rows[1] == ["KRR-ST", "14.00 ± 4.32", "5.00 ± 0.00", "3 x 1"]
    assert rows[2] == [
        "KRR-ST, D5: pool that never resets",
        "13.17 ± 4.25 (-0.83 [-1.55, -0.12]*)",
        "",
        "3 x 1",
    ]
    assert rows[3] == ["digits: cifar10", "linear, 20 % of labels", "n"]
    assert rows[5][1:] == ["44.00 ± 1.00 (-1.00)", "2 x 1"]  # one pair: no interval
    loss = [
        make_line("krr_st", (0, None), f"{name} images", accuracy, compare.LOSS)
        for name, accuracy in (("initial", 40.0), ("distilled", 20.0))
    ]
    loss.append(make_line("krr_st_d5", (0, None), "distilled images", 30.0, compare.LOSS))
    [heading, krr_st, d5] = parse_rows(compare.format_means(TABLE, LINES + loss))
    assert heading == [
        "digits, mean over data sets",
        "linear, 20 % of labels",
        "full, 20 labels/class",
        compare.LOSS,
        "n",
    ]
    assert krr_st == ["KRR-ST", "26.50 ± 1.50", "5.00 ± 0.00", "20.00 ± 0.00", "2 x 1"]
    assert d5[3] == "30.00 ± 0.00 (+10.00)"
    [heading, _] = parse_rows(compare.format_means(TABLE, [LINES[0], *loss[:2]]))
    assert heading == ["digits, evaluated on cars", "linear, 20 % of labels", "n"]
    assert (
        compare.format_means(TABLE, []) == compare.format_datasets(TABLE, []) == "No results yet."
    )


def test_each_target_network_has_a_table_with_all_rows_that_use_no_target():
    targets = tuple(map(TargetNetwork, ("target", "encoder", "without_results")))
    table = Table(
        "toy",
        "A toy.",
        sources=(Source("digits", targets=targets), Source("photos")),
        methods=("scratch", "random", "krr_st"),
        protocols=PROTOCOLS,
        against="scratch",
    )
    lines = [
        make_line("scratch", (None, 0), "cars", 1.0, source=None),
        make_line("random", (0, 0), "cars", 2.0),
        make_line("krr_st.target", (0, 0), "cars", 3.0),
        make_line("krr_st.encoder", (0, 0), "cars", 5.0),
        make_line("krr_st", (0, 0), "cars", 6.0, source="photos"),
        make_line("dsa", (0, 0), "cars", 9.0),  # not a row of this table
    ]
    rows = parse_rows(compare.format_datasets(table, lines))
    heads = [row[0] for row in rows if "cars" in row[0]]
    assert heads == [
        "digits, target network target: cars",
        "digits, target network encoder: cars",
        "photos: cars",
    ]
    krr_st = [row[1] for row in rows if row[0] == "KRR-ST"]
    assert krr_st == ["3.00 ± 0.00 (+2.00)", "5.00 ± 0.00 (+4.00)", "6.00 ± 0.00 (+5.00)"]
    assert sum(row[0] == "random real images" for row in rows) == 2
    assert sum(row[0] == "no pre-training" for row in rows) == 3
    other = parse_rows(compare.format_datasets(table, lines, against="random"))
    assert next(row[1] for row in other if row[0] == "KRR-ST") == "3.00 ± 0.00 (+1.00)"


def test_target_networks_are_rows_if_the_reference_names_one():
    targets = TargetNetwork("small"), TargetNetwork("large")
    source = Source("digits", targets=targets)
    table = replace(TABLE, sources=(source,), methods=("scratch", "krr_st"), against="krr_st.large")
    lines = [
        make_line("scratch", (None, 0), "cars", 1.0, source=None),
        make_line("krr_st.small", (0, 0), "cars", 3.0),
        make_line("krr_st.large", (0, 0), "cars", 5.0),
    ]
    heading, *rows = parse_rows(compare.format_datasets(table, lines))
    assert heading[0] == "digits: cars"
    assert [row[:2] for row in rows] == [
        ["no pre-training", "1.00 ± 0.00 (-4.00)"],
        ["KRR-ST, target large", "5.00 ± 0.00"],
        ["KRR-ST, target small", "3.00 ± 0.00 (-2.00)"],
    ]


def test_each_network_has_a_table_without_the_results_of_other_tables():
    table = replace(TABLE, networks=("vgg11", "convnet3"))
    lines = [
        make_line("krr_st", (0, 0), "cars", 1.0),
        make_line("krr_st", (0, 0), "cars", 2.0) | dict(arch="vgg11"),
        make_line("krr_st", (0, 0), "cars", 3.0) | dict(arch="resnet10"),
        make_line("krr_st", (0, 0), "cars", 4.0, "full") | dict(labels_per_class=100),
        make_line("krr_st", (0, 0), "cars", 5.0) | dict(label_fraction=0.0),
        make_line("krr_st", (0, 0), "cars", 6.0, "knn"),
    ]
    rows = parse_rows(compare.format_datasets(table, lines))
    assert [row[:2] for row in rows if row[0] == "KRR-ST"] == [
        ["KRR-ST", "2.00 ± 0.00"],
        ["KRR-ST", "1.00 ± 0.00"],
    ]
    assert [row[0] for row in rows if "digits" in row[0]] == [
        "digits, vgg11: cars",
        "digits, convnet3: cars",
    ]


def test_network_without_results_has_no_table():
    table = replace(TABLE, networks=("vgg11", "convnet3"))
    text = compare.format_means(table, [make_line("krr_st", (0, 0), "cars", 1.0)])
    assert [row[0] for row in parse_rows(text)] == ["digits, convnet3, evaluated on cars", "KRR-ST"]


def test_other_sources_are_left_out():
    line = make_line("krr_st", (0, 0), "cars", 1.0, source="cifar10")
    assert not compare.describes(TABLE, line)
    assert compare.describes(replace(TABLE, more_sources=(Source("cifar10"),)), line)
    assert compare.describes(TABLE, line | dict(source=None))


def test_reference_row_must_have_results(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.TABLES, "toy", TABLE)
    monkeypatch.setattr(compare, "results_file", lambda name: tmp_path / "toy.jsonl")
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    compare.main(["toy", "--against", "krr_st_d5"])
    for name in ("scratch", "krr_st.encoder", "magic"):
        with pytest.raises(UserError, match=f"--against {name}: not one of krr_st, krr_st_d5"):
            compare.main(["toy", "--against", name])


def test_table_of_paired_seeds_has_no_other_pairs():
    paired = replace(TABLE, paired_seeds=True)
    lines = [
        make_line("krr_st", (0, 0), "cars", 1.0),
        make_line("krr_st", (0, 1), "cars", 5.0),
        make_line("scratch", (0, 1), "cars", 2.0),
        make_line("full", (0, 1), "cars", 3.0),
    ]
    assert [compare.describes(TABLE, line) for line in lines] == [True] * 4
    assert [compare.describes(paired, line) for line in lines] == [True, False, True, True]


@pytest.mark.parametrize(
    ("protocol", "labels", "made"),
    [
        (Protocol("full"), (0, 0.0), True),
        (Protocol("full"), (15, 0.0), False),
        (Protocol("full", label_fractions=(0.1, 1)), (0, 0.0), True),
        (Protocol("full", label_fractions=(0.1, 1)), (0, 0.1), True),
        (Protocol("full", label_fractions=(0.1,)), (0, 0.0), False),
        (Protocol("full", labels_per_class=(15, 20)), (20, 0.0), True),
        (Protocol("linear"), (0, 0.0), False),
    ],
)
def test_results_of_a_protocol(protocol, labels, made):
    found = dict(protocol="full", labels_per_class=labels[0], label_fraction=labels[1])
    assert protocol.matches(found) == made


def test_stored_results_give_the_same_tables_in_documents(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setitem(TABLES, "toy", TABLE)
    compare.main(["toy", "--collect", str(folder)])
    first = capsys.readouterr().out
    compare.main(["toy"])
    assert first.endswith(capsys.readouterr().out) and "toy.jsonl: 11 results" in first
    page = tmp_path / "page.md"
    page.write_text("<!-- table toy.datasets -->\n<!-- end of table -->\n")
    with pytest.raises(UserError, match="stale"):
        docs.main(["--check", str(page)])
    docs.main(["--write", str(page)])
    assert "13.17 ± 4.25 (-0.83 [-1.55, -0.12]*)" in page.read_text()
    with pytest.raises(UserError, match="--against magic: not one of"):
        compare.main(["toy", "--against", "magic"])


def test_collecting_replaces_the_same_results_and_keeps_others(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setitem(TABLES, "toy", TABLE)
    new = LINES[3] | dict(accuracy=99.0, digest="new", deviations={})
    for name, lines in dict(first=LINES, second=[new]).items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (tmp_path / name / "results.jsonl").write_text(text)
        compare.main(["toy", "--collect", str(tmp_path / name)])
    stored = compare.results.read(tmp_path / "toy.jsonl")
    assert [line["accuracy"] for line in stored if line["digest"] == "new"] == [99.0]
    old = {line["digest"] for line in LINES} - {LINES[3]["digest"]}
    assert {line["digest"] for line in stored} == {*old, "new"}
    assert stored == sorted(stored, key=compare.sort_key)


def test_invalid_results_file_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").write_text("no json\n")
    done = run_command("-m", "analysis.compare", "departures", tmp_path, check=False)
    assert done.returncode == 2 and "line 1 is not a result" in done.stderr
    assert "Traceback" not in done.stderr


def test_outer_losses_are_read_from_the_distilled_sets(distilled, tmp_path):
    copy = tmp_path / "digits" / "krr_st" / "seed0" / "distilled.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(distilled.read_bytes())
    initial, learned, cost = compare.read_losses(tmp_path)
    assert cost["protocol"] == compare.COST and cost["method"] == "krr_st"
    meta = load_distilled(distilled).meta
    assert learned["method"] == "krr_st" and learned["source"] == "digits"
    assert learned["accuracy"] == pytest.approx(100 * meta["outer_loss_distilled"], 1e-3)
    found = compare.group_by_seeds([initial, learned])["krr_st"]
    assert found == {
        (compare.LOSS, "initial images"): {(0, None): initial["accuracy"]},
        (compare.LOSS, "distilled images"): {(0, None): learned["accuracy"]},
    }


def test_tflop_are_those_of_all_passes():
    """Write the operations of a ConvNet3 out: 2 x 9 x channels in x channels out per output."""
    settings = dict(DISTILL, image_size=32, width=0.25, outer_steps=500, outer_batch=64)
    settings |= dict(pool_size=6, pool_steps=9, pool_batch=40, updates_per_batch=4)
    sizes, channels = (32, 16, 8), (3, 32, 64, 128)
    forward = sum(
        2 * 9 * before * after * size**2
        for size, (before, after) in zip(sizes, pairwise(channels), strict=True)
    )
    initial_steps = 6 * sum(range(1, 9)) / 8  # a member starts with 1 to 8 steps
    passes = 500 * (64 + 4 * 3 * 100 + 3 * 40 * 9 / 10) + initial_steps * 3 * 40
    images = torch.zeros(100, 3, 32, 32)
    distilled = SimpleNamespace(images=images, num_outputs=8, meta=dict(settings=settings))
    assert compare.measure_tflop(distilled) == pytest.approx(passes * forward / 1e12)
    # Older sets do not store these two settings.
    for name in ("pool_batch", "updates_per_batch"):
        del settings[name]
    passes = 500 * (64 + 3 * 100 + 3 * 100 * 9 / 10) + initial_steps * 3 * 100
    assert compare.measure_tflop(distilled) == pytest.approx(passes * forward / 1e12)


def test_stored_departures_have_every_row_and_seed():
    lines = results.read(compare.results_file("departures"))
    assert {each["method"] for each in lines} == {*TABLES["departures"].methods}
    keys = [
        (each["method"], each["seed"], compare.column_of(each))
        for each in lines
        if each["protocol"] != compare.LOSS
    ]
    assert len(keys) == len({*keys}) == 3 * 6 * len(TABLES["departures"].methods)
