"""The table of departures: means, deviations and deviations paired by seed, against numbers worked
out by hand."""

import json
import math

import pytest

from analysis import departures
from data.distilled import load_distilled
from tests.conftest import command


def line(method, seed, target, accuracy, protocol="linear"):
    few = (
        dict(labels_per_class=0, label_fraction=0.2)
        if protocol == "linear"
        else dict(labels_per_class=20)
    )
    return (
        dict(
            method=method,
            seed=seed,
            dataset=target,
            protocol=protocol,
            accuracy=accuracy,
            digest=f"{method}{seed}{target}{protocol}",
        )
        | dict(label_fraction=0.0)
        | few
    )


LINES = [
    line("krr_st", 0, "cars", 10.0),
    line("krr_st", 1, "cars", 12.0),
    line("krr_st", 2, "cars", 20.0),
    line("krr_st_d5", 0, "cars", 9.0),
    line("krr_st_d5", 1, "cars", 11.5),
    line("krr_st_d5", 2, "cars", 19.0),
    line("krr_st", 0, "cifar10", 40.0),
    line("krr_st", 1, "cifar10", 44.0),
    line("krr_st_d5", 1, "cifar10", 43.0),
    line("krr_st_d5", 2, "cifar10", 45.0),
    line("krr_st", 0, "cars", 5.0, "full"),
]


def test_differences_are_paired_by_seed():
    mean, deviation, sure = departures.difference(
        {0: 9.0, 1: 11.5, 2: 19.0}, {0: 10.0, 1: 12.0, 2: 20.0}
    )
    assert mean == pytest.approx(-2.5 / 3)
    assert deviation == pytest.approx(
        math.sqrt(sum((d + 2.5 / 3) ** 2 for d in (-1, -0.5, -1)) / 3)
    )
    # Student's t of two degrees of freedom: 4.303; standard error 0.2887 / sqrt(3) = 0.1667: 0.717
    # below 0.833
    assert sure
    assert not departures.difference({0: 9.0, 1: 13.0}, {0: 10.0, 1: 12.0})[2]
    assert not departures.difference({0: 9.0}, {0: 10.0})[2]
    assert departures.difference({1: 9.0}, {0: 10.0}) is None


def test_means_over_data_sets_are_of_seeds_that_all_have():
    found = departures.group_by_seed(LINES)
    assert found["krr_st"]["probe, 20%", "mean"] == {0: 25.0, 1: 28.0}
    assert found["krr_st_d5"]["probe, 20%", "mean"] == {1: 27.25, 2: 32.0}


def test_table_has_each_row_with_its_command_and_comes_back_from_the_file(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))
    monkeypatch.setattr(departures, "RESULTS", tmp_path / "departures.jsonl")
    departures.main(["--collect", str(folder)])
    first = capsys.readouterr().out
    departures.main([])
    assert capsys.readouterr().out == first
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in first.splitlines()
        if row.startswith("|")
    ]
    assert rows[0] == ["probe, 20%", "cars", "cifar10", "mean", "seeds", "command"]
    assert rows[2][1:4] == ["14.00 ± 4.32", "42.00 ± 2.00", "26.50 ± 1.50"]
    assert rows[3][0] == "KRR-ST, D5: pool that never resets"
    assert rows[3][1:] == [
        "13.17 ± 4.25 (-0.83 ± 0.24*)",
        "44.00 ± 1.00 (-1.00 ± 0.00)",
        "29.62 ± 2.38 (-0.75 ± 0.00)",
        "3",
        "`bash scripts/run_departures.sh --methods krr_st_d5`",
    ]
    assert rows[4] == ["fine-tuned, 20 labels/class", "cars", "mean", "seeds", "command"]
    assert rows[6][1:4] == ["5.00 ± 0.00", "5.00 ± 0.00", "1"]


def test_summary_has_the_means_over_data_sets_and_the_loss_of_the_distilled_images():
    loss = [
        line("krr_st", 0, target, value, departures.LOSS)
        for target, value in (("initial images", 40.0), ("distilled images", 20.0))
    ]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in departures.summary(LINES + loss).splitlines()
    ]
    assert rows[0][:-2] == [
        "mean over data sets",
        "probe, 20%",
        "fine-tuned, 20 labels/class",
        departures.LOSS,
    ]
    assert rows[2][:-2] == ["KRR-ST", "26.50 ± 1.50", "5.00 ± 0.00", "20.00 ± 0.00"]
    assert (
        rows[3][1:-1] == ["29.62 ± 2.38 (-0.75 ± 0.00)", "", "", "2"]
        and "krr_st_d5`" in rows[3][-1]
    )
    assert departures.summary([]) == departures.tables([]) == "No results yet."


def test_command_refuses_a_file_that_is_none(tmp_path):
    (tmp_path / "results.jsonl").write_text("no json\n")
    done = command("-m", "analysis.departures", tmp_path, check=False)
    assert (
        done.returncode == 2
        and "line 1 is not a result" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_outer_losses_come_from_the_distilled_sets(distilled, tmp_path):
    copy = tmp_path / "digits" / "krr_st" / "seed0" / "distilled.pt"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(distilled.read_bytes())
    initial, learned = departures.read_losses(tmp_path)
    meta = load_distilled(distilled).meta
    assert learned["method"] == "krr_st" and learned["accuracy"] == pytest.approx(
        100 * meta["outer_loss_distilled"], 1e-3
    )
    found = departures.group_by_seed([initial, learned])["krr_st"]
    assert found == {
        (departures.LOSS, "initial images"): {0: initial["accuracy"]},
        (departures.LOSS, "distilled images"): {0: learned["accuracy"]},
    }
