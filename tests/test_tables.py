"""Tables from lines of results, compared with tables written out here."""

import csv
import io
import json
import statistics

import pytest

from analysis import docs, tables
from evaluation import results
from utils.errors import UserError
from utils.presets import deviations, preset

BASE = dict(
    source="cifar100",
    method="krr_st",
    distilled_seed=0,
    num_images=1000,
    arch="convnet3",
    width=1.0,
    image_size=32,
    seed=0,
    dataset="cifar10",
    protocol="full",
    labels_per_class=0,
    label_fraction=0.0,
    deviations={},
)
SCRATCH = dict(method="scratch", source=None, distilled_seed=None, num_images=None)
SMALL = {"width": [0.25, 1.0], "num_images": [300, 1000], "image_size": [32, 64]}


def make_line(accuracy, **changes):
    return BASE | changes | dict(accuracy=accuracy, digest=json.dumps([accuracy, changes]))


def test_table_at_the_scale_of_the_paper():
    lines = [make_line(a, seed=s) for s, a in enumerate((88.5, 88.6, 88.7))]
    lines += [make_line(a, seed=s, dataset="cars") for s, a in enumerate((20.0, 30.0))]
    lines += [
        make_line(87.3, **SCRATCH),
        make_line(50.0, dataset="digits", **SCRATCH),
    ]  # the only result on digits
    lines += [
        make_line(99.0, labels_per_class=1),
        make_line(99.0, protocol="linear"),
        make_line(99.0, source="cifar10"),
        make_line(99.0, arch="vgg11"),
        make_line(99.0, method="krr_st_d5", deviations={"distill.keep_pool_count": [True, False]}),
    ]
    [(settings, columns, _)] = tables.split_by_scale(TABLES["table1"], lines)
    assert settings is None and columns == [("convnet3", "cifar10"), ("convnet3", "cars")]
    shown = tables.format_tables(lines, ["table1"])["table1"].split("\n\nTable")[0].splitlines()
    assert shown[2:5] + shown[-3:] == [
        "| accuracy in %      |            | cifar10                | cars                   |",
        "| ------------------ | ---------- | ---------------------: | ---------------------: |",
        "| no pre-training    | ours       | 87.30 ± 0.00 (n=1)     |                        |",
        "| KRR-ST             | ours       | **88.60 ± 0.08 (n=3)** | **25.00 ± 5.00 (n=2)** |",
        "|                    | paper      | **88.72 ± 0.11**       | **28.68 ± 0.32**       |",
        "|                    | difference | -0.12 ✓                | -3.68 ✗                |",
    ]
    assert (
        "| k-means            | paper      | 87.67 ± 0.09           | 20.02 ± 0.44           |"
        in shown
    )
    assert "✓: within two of the paper's standard deviations." in shown[
        0
    ] and "Reduced" not in "".join(shown)


def test_results_at_another_scale_are_in_a_table_that_says_so():
    lines = [
        make_line(60.0 + s, seed=s, deviations=SMALL | {"finetune.steps": [300, 10000]})
        for s in (0, 1)
    ]
    lines += [
        make_line(
            9.0,
            dataset="cars",
            deviations=SMALL | {"finetune.steps": [300, 5000], "cars train": [6098, 8144]},
        )
    ]
    lines += [
        make_line(
            55.0,
            width=0.25,
            deviations={"width": [0.25, 1.0], "finetune.steps": [300, 10000]},
            **SCRATCH,
        )
    ]
    lines += [make_line(58.0, method="random", deviations={**SMALL, "num_images": [50, 1000]})]
    [(settings, *_)] = tables.split_by_scale(TABLES["table1"], lines)
    assert "width 0.25 (1.0)" in settings
    shown = tables.format_tables(lines)["table1"]
    heading, _, *rows = shown.splitlines()
    assert (
        "not comparable with the paper" in heading
        and "✓" not in shown
        and "difference" not in shown
    )
    assert (
        "cars train 6,098 (8,144)" in heading and "finetune.steps 300 (5,000 or 10,000)" in heading
    )
    assert "width 0.25 (1.0)" in heading and "num_images" not in heading  # it differs between rows
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == [
        "no pre-training",
        "",
        "random real images (num_images 50 (1,000))",
        "random real images",
        "KRR-ST (num_images 300 (1,000))",
        "KRR-ST",
    ]
    assert "**60.50 ± 0.50 (n=2)**" in shown and "paper, full scale" in shown


def test_scratch_at_another_image_size_is_at_reduced_scale():
    both = [
        make_line(60.0, arch="convnet4", image_size=64, source="tinyimagenet"),
        make_line(50.0, arch="convnet4", **SCRATCH),
    ]
    [(settings, _, rows)] = tables.split_by_scale(TABLES["table2"], both)
    assert settings is None and [row[0] for row in rows] == ["krr_st"]
    assert tables.deviations_of(both[1], TABLES["table2"]) == {"image_size": [32, 64]}


def test_kd_rows_are_named_after_their_images():
    facts = dict(protocol="kd", arch="vgg11", image_size=64)
    images = dict(source="tinyimagenet", seed=0, num_images=2000)
    lines = [
        make_line(60.0, source="tinyimagenet", images=images | dict(method="krr_st"), **facts),
        make_line(
            33.0,
            images=images | dict(method="gaussian"),
            deviations={"kd.lr": [1e-3, 1e-4]},
            **SCRATCH,
            **facts,
        ),
        make_line(70.0, images=images | dict(method="krr_st"), **SCRATCH, **facts),
    ]
    [(settings, columns, rows)] = tables.split_by_scale(TABLES["table4"], lines)
    assert settings is None and columns == [("vgg11", "cifar10")]
    assert [(method, cells["vgg11", "cifar10"]) for method, _, cells in rows] == [
        ("gaussian", [33.0]),
        ("krr_st", [60.0]),
    ]
    assert (
        "on 2000 images of KRR-ST" in tables.format_tables(lines)["cifar10"]
    )  # the third result is in no table of the paper


def test_variants_have_separate_tables():
    lines = [
        make_line(88.0),
        make_line(80.0, method="krr_st_d5", deviations={"distill.keep_pool_count": [True, False]}),
        make_line(
            81.0,
            method="krr_st_random_targets",
            deviations={"distill.random_targets": [True, False]},
        ),
    ]
    made = tables.format_tables(lines)
    assert "D5: pool that never resets" in made["ablations"] and "random targets" in made["y_init"]
    assert (
        "D5" not in made["y_init"]
        and "D5" not in made["table1"]
        and "Reduced" not in "".join(made.values())
    )
    assert not {"ablations", "y_init"} & tables.format_tables(lines[:1]).keys()


def test_fid_of_different_networks_is_in_separate_tables():
    facts = dict(protocol="fid", dataset="cifar100", network="inception")
    lines = [
        {
            k: v
            for k, v in (BASE | facts | changes | dict(digest=str(i))).items()
            if k not in ("arch", "accuracy")
        }
        for i, changes in enumerate(
            (
                dict(fid=70.0),
                dict(fid=30.0, method="random"),
                dict(fid=1.0, network="resnet18_target of cifar100, abc"),
            )
        )
    ]
    shown = tables.format_tables(lines)["fid"]
    standard, own = shown.split("Appendix F")[1:]
    assert (
        "features of inception" in standard
        and "**30.00 ± 0.00 (n=1)**" in standard
        and "-6.28" in standard
    )
    assert (
        "features of resnet18_target of cifar100, abc" in own
        and "1.00 ± 0.00 (n=1)" in own
        and "paper" not in own
    )
    assert "| 1.00" not in standard and "✓" not in shown
    other = [each | dict(source="imagenet", dataset="imagenet") for each in lines[:1]]
    shown = tables.format_tables(lines + other)["fid"]
    assert (
        "imagenet, features of inception" in shown
        and "features of inception" in tables.format_tables(other)["fid"]
    )


def test_tables_as_csv_and_latex():
    lines = [make_line(a, seed=s) for s, a in enumerate((88.5, 88.7))]
    out = io.StringIO()
    tables.write_csv([TABLES["table1"]], lines, out)
    [row] = csv.DictReader(io.StringIO(out.getvalue()))
    assert (row["table"], row["scale"], row["method"], row["dataset"]) == (
        "table1",
        "paper",
        "krr_st",
        "cifar10",
    )
    assert [float(row[key]) for key in ("mean", "std", "paper_mean", "paper_std")] == pytest.approx(
        [88.6, 0.1, 88.72, 0.11]
    )
    assert (
        float(row["difference"]) == pytest.approx(-0.12)
        and row["within_two_std"] == "True"
        and row["n"] == "2"
    )
    made = tables.format_tables(lines, ["table1"], tables.format_latex)["table1"]
    assert (
        r"KRR-ST & ours & \textbf{88.60 $\pm$ 0.10 (n=2)} \\" in made
        and r"\begin{tabular}{llr}" in made
    )
    assert r"-0.12 $\checkmark$" in made and r"accuracy in \%" in made


def test_paper_csv_has_all_tables():
    assert {name for name in tables.TITLES if name != "ablations"} <= {
        table.name for table in TABLES.values()
    }
    assert TABLES["table2"].numbers["krr_st", "convnet4", "cars"] == (49.26, 0.64)
    assert len(TABLES["table1"].numbers) == 63 and TABLES["table3"].methods == [
        "scratch",
        "random",
        "frepo",
        "krr_st",
    ]


TABLES = {table.name: table for table in tables.all_tables()}


def test_written_tables_are_reproducible_and_stale_ones_are_detected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results.jsonl")
    page = tmp_path / "README.md"
    page.write_text(
        "# A\n\n<!-- table table1 -->\nold\n<!-- end of table -->\n\ntext | with | bars\n\n"
        "<!-- table digits -->\n<!-- end of table -->\nend\n"
    )
    for seed in (1, 0):
        results.append(tmp_path / "runs" / "a", make_line(88.0 + seed, seed=seed))
    results.append(
        tmp_path / "runs" / "b", make_line(97.0, dataset="digits", source="digits", method="random")
    )
    tables.collect([tmp_path / "runs"], tmp_path / "results.jsonl")
    with pytest.raises(UserError, match="stale"):
        docs.main(["--check", str(page)])
    assert "old" in page.read_text()  # --check changes nothing
    docs.main(["--write", str(page)])
    first = page.read_text()
    assert "88.50 ± 0.50 (n=2)" in first and "97.00 ± 0.00 (n=1)" in first and "old" not in first
    assert first.startswith("# A\n\n<!-- table table1 -->\n") and first.endswith(
        "<!-- end of table -->\nend\n"
    )
    docs.main(["--check", str(page)])
    page.write_text(docs.MARK.sub(lambda m: m[1] + m[3], first))  # all tables deleted
    docs.main(["--write", str(page)])
    assert page.read_text() == first
    assert "2 tables up to date" in capsys.readouterr().out


def test_collecting_again_replaces_results_in_any_order(tmp_path):
    out = tmp_path / "results.jsonl"
    for folder, accuracy in (("a", 50.0), ("b", 51.0)):
        results.append(tmp_path / folder, make_line(accuracy, digest=folder))
        results.append(
            tmp_path / folder,
            make_line(accuracy, digest=folder + "1", seed=1 if folder == "a" else 2),
        )
    tables.collect([tmp_path / "a", tmp_path / "b"], out)
    first = out.read_bytes()
    assert sorted((each["seed"], each["accuracy"]) for each in results.read(out)) == [
        (0, 51.0),
        (1, 50.0),
        (2, 51.0),
    ]
    tables.collect([tmp_path / "b", tmp_path / "a"], out)
    assert out.read_bytes() == first and b"digest" in first
    tables.collect([tmp_path / "b"], out)  # other stored results are kept
    assert out.read_bytes() == first


def test_deviations_are_the_settings_that_differ_from_the_preset():
    usual = preset("tinyimagenet", "distill") | dict(image_size=64, source="x")
    assert deviations("tinyimagenet", "distill", usual) == {}
    small = usual | dict(num_images=400, outer_steps=10, image_size=32)
    assert deviations("tinyimagenet", "distill", small) == {
        "num_images": [400, 2000],
        "image_size": [32, 64],
        "distill.outer_steps": [10, 160_000],
    }
    assert deviations("tinyimagenet", "target", dict(width=0.5, epochs=1000)) == {
        "target.width": [0.5, 1.0]
    }
    soft = preset("tinyimagenet", "pretrain", "soft", "mobilenet")
    assert deviations("tinyimagenet", "pretrain", soft, "soft", "mobilenet") == {}
    assert deviations("tinyimagenet", "pretrain", soft, "soft", "vgg11") == {
        "pretrain.batch_size": [256, 500]
    }


def test_best_value_of_each_column_is_bold():
    lines = [
        make_line(a, method=m, dataset=t)
        for m, t, a in (
            ("random", "cifar10", 80.0),
            ("random", "cars", 30.0),
            ("dm", "cifar10", 81.0),
            ("dm", "cars", 29.0),
        )
    ]
    shown = tables.format_tables(lines, ["table1"])["table1"]
    assert [text in shown for text in ("**81.00", "**30.00", "**80.00", "**29.00")] == [
        True,
        True,
        False,
        False,
    ]
    assert statistics.pstdev([1, 3]) == 1  # of the population


def test_other_protocols_are_below_the_table_of_the_same_sets():
    few = [
        ("linear", 0.01),
        ("linear", 0.5),
        ("linear", 0.1),
        ("linear", 0.05),
        ("linear", 0.0),
        ("knn", 0.0),
    ]
    lines = [
        make_line(50.0 + i, protocol=p, label_fraction=f, **method)
        for method in ({}, SCRATCH)
        for i, (p, f) in enumerate(few)
    ]
    lines += [make_line(9.0, method="dm", protocol="head", dataset="cifar100"), make_line(88.0)]
    lines += [make_line(44.0, protocol="linear", source="digits")]  # in no table of the paper
    main, *beside = tables.format_tables(lines, ["table1"])["table1"].split("\n\nTable 1")
    assert main.startswith("Table 1") and "knn" not in main and "88.00" in main
    assert [text.split(", under")[0].split(" on ")[1] for text in beside] == ["cifar10", "cifar100"]
    heads = [cell.strip() for cell in beside[0].splitlines()[2].split("|")[3:-1]]
    assert heads == [
        "knn",
        "linear, 1 % of labels",
        "linear, 5 % of labels",
        "linear, 10 % of labels",
        "linear, 50 % of labels",
        "linear",
    ]
    [krr] = [row for row in beside[0].splitlines() if "KRR-ST" in row]
    assert [float(cell.split()[0].strip("*")) for cell in krr.split("|")[3:-1]] == [
        55,
        50,
        53,
        52,
        51,
        54,
    ]
    assert (
        "DM" in beside[1]
        and "| **9.00 ± 0.00 (n=1)** |" in beside[1]
        and "paper" not in "".join(beside)
    )
    rest = tables.format_tables(lines)
    assert (
        rest.keys() == {"table1", "cifar10"} and rest["cifar10"].count("(n=1)") == 1
    )  # each result once


def test_settings_are_listed_once_unless_they_differ():
    few, more = SMALL, SMALL | {"finetune.steps": [300, 10000]}
    lines = [
        make_line(60.0, deviations=more),
        make_line(50.0, protocol="linear", deviations=few),
        make_line(
            9.0,
            method="dm",
            protocol="head",
            dataset="cifar100",
            deviations=few | {"dm.real_batch": [16, 256]},
        ),
    ]
    main, same, other = tables.format_tables(lines, ["table1"])["table1"].split("\n\nTable 1")
    assert "finetune.steps 300 (10,000)" in main and "width 0.25 (1.0)" in main
    assert (
        "**Reduced scale**, with the settings of the table above." in same and "width" not in same
    )
    assert "not comparable" in other and "dm.real_batch 16 (256)" in other


def test_probes_of_variants_are_below_their_table():
    lines = [
        make_line(50.0, protocol="linear"),
        make_line(40.0, protocol="linear", method="krr_st_d5"),
    ]
    made = tables.format_tables(lines)
    assert "40.00" in made["ablations"] and "40.00" not in made["table1"] and "y_init" not in made


def test_oracle_has_a_row_but_is_never_bold():
    full = {name: pair for name, pair in SMALL.items() if name != "num_images"}
    lines = [
        make_line(60.0, deviations=SMALL),
        make_line(55.0, method="random", deviations=SMALL),
        make_line(70.0, method="full", num_images=50_000, deviations=full),
        make_line(52.0, deviations=full, **SCRATCH),
    ]
    heading, _, *rows = tables.format_tables(lines)["table1"].splitlines()
    assert "num_images 300 (1,000)" in heading
    [oracle] = [row for row in rows if "full source (oracle) " in row]
    assert (
        "70.00 ± 0.00" in oracle
        and "**70.00" not in oracle
        and "**60.00 ± 0.00 (n=1)**" in "".join(rows)
    )
    alone = tables.format_tables([make_line(70.0, method="full")])["table1"]
    assert "| full source (oracle) | ours  | 70.00 ± 0.00 (n=1) |" in alone
