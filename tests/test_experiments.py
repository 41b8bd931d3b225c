"""The commands of each table: every command is accepted by its parser."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
from distillers import method, registry
from experiments.__main__ import make_plan
from experiments.plan import Choice, Plan, to_flags
from experiments.tables import TABLES, Protocol, Scale, Source, Table, TargetNetwork
from tests.conftest import ROOT, run_command
from utils.errors import UserError
from utils.presets import PRESETS, STAGES

SCRIPTS = sorted(
    path
    for path in (ROOT / "scripts").glob("*.sh")
    if path.name.startswith("run_") or path.name == "compare_methods.sh"
)
MORE = ["--oracle", "--probes", "--head"]


def list_commands(*argv):
    """Return the commands of a table, each as the words after `python`."""
    return [task.words for task in make_plan([*map(str, argv)])[1].tasks]


def get_value(words, flag):
    return words[words.index(flag) + 1]


def parse(words, monkeypatch):
    """Parse a command with its own parser and return the arguments."""
    made = get_value(words, "--distilled") if "--distilled" in words else ""
    reduced = made.startswith(("runs/quick/", "runs/departures/"))
    name = f"quick-{made.split('/')[2]}" if reduced else [*made.split("/"), ""][1]
    folder = Path(made).parts[-3] if "/" in made else ""
    kind = registry.targets_of(folder) if folder else "class"
    stand_in = SimpleNamespace(meta=dict(preset=name), target_kind=kind)
    monkeypatch.setattr("pretrain.load_distilled", lambda path: stand_in)
    if words[0] == "-m" and words[1] == "distillers":
        entry = registry.METHODS[words[2]]
        assert ("--target-network" in words) == entry.target_network, words[2]
        return method.parse_args(importlib.import_module(entry.module).METHOD, words[3:])
    if words[0] == "distill.py":
        return method.parse_args(importlib.import_module("distill").METHOD, words[1:])
    if words[0] == "-m":
        return importlib.import_module(words[1]).parse_args(words[2:])
    return importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])


def remove_seeds(words):
    """Return the words that matter to the parser."""
    return tuple(
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in ("--seed", "--weights", "--dataset")
    )


FORMS = [(name, []) for name in TABLES]
FORMS += [(name, ["--quick"]) for name, table in TABLES.items() if table.quick]


@pytest.mark.parametrize(("name", "quick"), FORMS)
def test_each_command_is_accepted_by_its_parser(name, quick, monkeypatch):
    commands = list_commands(name, "--seeds", 0, *quick)
    if any(protocol.name == "full" for protocol in TABLES[name].protocols):
        commands += list_commands(name, "--seeds", 0, *quick, "--datasets", "cars", *MORE)
    assert len(commands) > 5
    for words in {remove_seeds(words): words for words in commands}.values():
        parse(words, monkeypatch)


def test_each_table_has_a_script_that_passes_its_flags(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    stand_in.chmod(0o755)
    tables = set()
    for path in SCRIPTS:
        done = subprocess.run(
            ["bash", path, "--dry-run", "--methods", "a b", "--", "--device", "cuda"],
            env=dict(os.environ, PYTHON=str(stand_in)),
            capture_output=True,
            text=True,
            check=True,
        )
        *first, name, rest = done.stdout.split("|", 3)
        assert (
            first == ["-m", "experiments"] and rest == "--dry-run|--methods|a b|--|--device|cuda|"
        )
        tables.add(name)
    assert tables == {*TABLES}


def test_dry_run_of_a_script_lists_its_commands():
    done = subprocess.run(
        ["bash", "scripts/run_departures.sh", "--dry-run", "--seeds", "1"],
        cwd=ROOT,
        env=dict(os.environ, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        check=True,
    )
    *shown, last = done.stdout.splitlines()
    assert len(shown) == len(list_commands("departures", "--seeds", 1)) and last.startswith("0 of ")
    assert shown[0] == (
        "missing python -m data.prepare tinyimagenet --size 32 --partial --data-root datasets"
    )
    assert shown[-1] == "always  python -m analysis.compare departures runs/departures"


def test_oracle_probes_and_head_add_commands(monkeypatch):
    flags = ["--seeds", "0 1", "--datasets", "cars", "--methods", "scratch", "random", "krr_st"]
    usual = list_commands("table2", *flags)

    def more(flag):
        commands = list_commands("table2", *flags, flag)
        assert all(words in commands for words in usual)
        assert all(parse(words, monkeypatch) for words in commands)
        return [" ".join(words) for words in commands if words not in usual]

    oracle = more("--oracle")
    assert oracle[0].startswith(
        "pretrain.py --source tinyimagenet --target-network "
        "runs/tinyimagenet/target/seed0/target.pt"
    )
    tuned = "finetune.py --weights runs/tinyimagenet/full/seed0/convnet4/seed1/model.pt"
    assert [tuned in each for each in oracle] == [False] * 3 + [True]
    probes = more("--probes")
    assert len(probes) == 3 * 2 * 2 and sum("--protocol knn" in each for each in probes) == 3 * 2
    assert sum("--label-fraction 0.01 0.05 0.1 0.5 1 " in each for each in probes) == 3 * 2
    assert not any("tinyimagenet --protocol" in each for each in probes)
    head = more("--head")
    assert len(head) == 2
    assert all("/random/" in each and "--dataset tinyimagenet" in each for each in head)
    with pytest.raises(UserError, match="--oracle --probes --head: not available for table4"):
        list_commands("table4", *MORE)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "imagenette", "departures"])
def test_commands_read_the_files_that_earlier_commands_write(name, monkeypatch):
    quick = ["--quick"] if TABLES[name].quick else []
    methods = [each for each in ("scratch", "random", "krr_st") if each in TABLES[name].methods]
    commands = list_commands(name, *quick, "--seeds", 0, "--methods", *methods, "--oracle")
    named = {Path(get_value(words, "--weights")) for words in commands if words[0] == "finetune.py"}
    made = set()
    for words in commands:
        if words[0] == "pretrain.py":
            args, _ = parse(words, monkeypatch)
            home = Path(get_value(words, "--run-root")) / TABLES[name].sources[0].name
            home = args.distilled.parent if args.distilled else home / args.name / "seed0"
            folder = home / models.label(args.arch, args.width) / f"seed{args.seed}"
            made.add(folder / "model.pt")
    assert named - {Path("none")} == made and named


def test_presets_change_existing_settings_only():
    for name, changes in PRESETS.items():
        for stage, values in changes.items():
            if stage in STAGES:
                assert values.keys() <= STAGES[stage].keys(), (name, stage)


def test_flags_select_commands_and_bad_flags_are_errors(capsys):
    flags = ["--methods", "scratch krr_st", "--datasets", "cars", "--seeds", 4]
    commands = list_commands("table2", *flags)
    tuned = [words for words in commands if words[0] == "finetune.py"]
    assert len(tuned) == 2 and all(get_value(words, "--dataset") == "cars" for words in tuned)
    assert sum(words[0] == "pretrain.py" for words in commands) == 1
    assert ["-m", "distillers"] not in [words[:2] for words in commands]
    commands = list_commands("table1", "--methods", "random", "--", "--device", "cuda")
    stages = [words for words in commands if words[1] not in ("analysis.tables", "data.prepare")]
    assert len(stages) > 3 and all(words[-2:] == ["--device", "cuda"] for words in stages)
    for flags, word in (
        (["--methods", "magic"], "--methods magic: not one of scratch"),
        (["--archs", "vgg11"], "--archs vgg11: not one of convnet3"),
        (["--sources", "cifar10"], "--sources cifar10: not one of cifar100"),
    ):
        with pytest.raises(UserError, match=word):
            list_commands("table1", *flags)
    with pytest.raises(UserError, match="--distill-seeds"):
        list_commands("departures", "--distill-seeds", 1)
    for words, message in (
        (["table1", "--colour"], "--colour"),
        (["table1", "--jobs", "0"], "must be at least 1"),
        (["table1", "--seeds"], "expected at least one argument"),
        (["table1", "--seeds", "x"], "--seeds x: not a seed"),
    ):
        with pytest.raises(SystemExit) as stopped:
            make_plan(words)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="table9: no such table; choose one of table1, "):
        make_plan(["table9"])
    done = run_command("-m", "experiments", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "python -m experiments: error: the first argument must be a table"
    )


def test_evaluations_that_compute_take_the_device_of_the_user():
    flags = ["--", "--device", "cuda", "--log-every", "5"]
    (fid,) = [w for w in list_commands("figures", *flags) if w[1] == "evaluation.fid"][:1]
    assert get_value(fid, "--device") == "cuda" and "--log-every" not in fid
    *_, last = list_commands("successors", *flags)
    assert last[:2] == ["-m", "experiments.protocols"] and "--log-every" not in last
    assert get_value(last, "--device") == "cuda" and get_value(last, "--precision") == "fp32"
    *_, last = list_commands("successors", "--", "--precision", "bf16")
    assert get_value(last, "--precision") == "bf16" and "--device" not in last


def test_no_two_tables_make_the_same_file_by_different_commands():
    commands = {}
    for name, quick in FORMS:
        for task in make_plan([name, *quick])[1].tasks:
            for output in task.outputs:
                commands.setdefault(output, {})[tuple(task.words)] = name
    # One command evaluates several numbers of labels, so tables may share a result.
    apart = {k: v for k, v in commands.items() if len(v) > 1 and "results.jsonl#" not in k}
    assert not apart


def test_probes_add_the_numbers_of_labels_that_a_table_lacks():
    flags = ["--sources", "imagenette", "--datasets", "cifar10", "--methods", "scratch"]
    usual = list_commands("small", *flags, "--seeds", 0)
    (new,) = [w for w in list_commands("small", *flags, "--seeds", 0, "--probes") if w not in usual]
    at = new.index("--label-fraction")
    assert new[at + 1 : at + 6] == ["0.01", "0.05", "0.1", "0.5", "1"]


def test_quick_ablations_accept_any_source_with_a_quick_preset(monkeypatch):
    sources = [name.removeprefix("quick-") for name in PRESETS if name.startswith("quick-")]
    commands = list_commands("ablations", "--quick", "--sources", *sources, "--seeds", 0)
    distilled = [words for words in commands if words[0] == "distill.py"]
    assert {get_value(words, "--source") for words in distilled} == {*sources}
    assert len(distilled) == len(sources) * len(TABLES["ablations"].methods)
    tenths = {
        get_value(w, "--preset"): get_value(w, "--outer-lr") for w in distilled if "--outer-lr" in w
    }
    assert tenths == {f"quick-{name}": "0.003" for name in sources}
    assert {get_value(words, "--arch") for words in commands if words[0] == "pretrain.py"} == {
        PRESETS[f"quick-{name}"]["distill"]["arch"] for name in sources
    }
    with pytest.raises(UserError, match="--sources tinyimagenet"):
        list_commands("ablations", "--sources", "tinyimagenet")


TWO_TARGETS = Table(
    "two",
    "Two target networks of one source.",
    sources=(
        Source(
            "digits",
            targets=(
                TargetNetwork("target", dict(epochs=2)),
                TargetNetwork("encoder", dict(encoder="file.py:function", pca=16)),
            ),
        ),
    ),
    methods=("scratch", "random", "krr_st", "krr_st_d1", "full_10x"),
    datasets=("digits",),
    protocols=(
        Protocol("linear", label_fractions=(0.1, 1)),
        Protocol("full", labels_per_class=(1, 2), settings=dict(steps=3)),
    ),
    seeds=(0, 1, 2),
    distill_seeds=(5, 6),
    scale=Scale(
        methods=dict(krr_st=dict(outer_lr=0.3)), pretrain=dict(source=dict(steps=7)), width=0.5
    ),
)


def test_sets_are_named_by_their_target_network_if_there_are_two(monkeypatch):
    plan = Plan(TWO_TARGETS, Choice())
    commands = [task.words for task in plan.tasks]
    names = [get_value(w, "--name") for w in commands if w[0] == "distill.py" and "5" in w]
    assert names == ["krr_st.target", "krr_st.encoder", "krr_st_d1.target", "krr_st_d1.encoder"]
    for words in commands:
        if words[0] == "distill.py":
            target = get_value(words, "--name").partition(".")[2]
            assert get_value(words, "--target-network") == f"runs/digits/{target}/seed0/target.pt"
            tenth = "krr_st_d1" in get_value(words, "--name")
            assert get_value(words, "--outer-lr") == ("0.03" if tenth else "0.3")
    made = [w for w in commands if w[0] == "pretrain_target.py"]
    assert [("--name" in w, "--encoder" in w) for w in made] == [(False, False), (True, True)]
    assert (
        sum("random" in words for words in commands) == 2
    )  # once per seed, for both target networks
    trained = [w for w in commands if w[0] == "pretrain.py"]
    assert len(trained) == 2 * 3 * 5 + 3 * 2  # 5 sets per pair of seeds, and the oracles
    oracle = [w for w in trained if "full_10x.encoder" in w]
    assert len(oracle) == 3 and {get_value(w, "--steps") for w in oracle} == {"70"}
    probes = [task for task in plan.tasks if "linear" in task.words]
    assert all(get_value(t.words, "--label-fraction") == "0.1" for t in probes)
    assert [leaf.partition("#")[2] for leaf in probes[0].outputs] == [
        "digits_linear_0.1_seed0",
        "digits_linear_seed0",
    ]
    tuned = [task for task in plan.tasks if "--labels-per-class" in task.words]
    assert len(tuned) == 2 * len(probes) and all(len(task.outputs) == 1 for task in tuned)
    for words in commands:
        if words[0] != "pretrain.py" or "--source" in words:
            parse(words, monkeypatch)


def test_settings_are_converted_to_flags():
    settings = dict(outer_lr=1e-3, raw_init=True, bias_column=False, steps=7, encoder="a:b")
    assert to_flags(settings) == [
        "--outer-lr",
        "0.001",
        "--raw-init",
        "--no-bias-column",
        "--steps",
        "7",
        "--encoder",
        "a:b",
    ]


def test_methods_of_all_tables_are_in_the_registry():
    for table in TABLES.values():
        assert {*table.methods} <= registry.TITLES.keys()
        assert registry.base(table.against) in registry.TITLES or table.name == "figures"
        assert len({*table.methods}) == len(table.methods)


def test_commands_need_only_the_data_sets_that_they_name():
    tasks = make_plan(["small", "--sources", "imagenette", "--seeds", "0"])[1].tasks
    prepared = {get_value(t.words, "data.prepare"): t for t in tasks if "data.prepare" in t.words}
    assert prepared.keys() == {"imagenette", "cifar10", "cars"}

    def all_needs(task):
        return {task}.union(*map(all_needs, task.needs))

    for task in tasks[:-1]:  # the last one prints the table
        needed = {name for name, each in prepared.items() if each in all_needs(task)}
        dataset = [word for word in ("cifar10", "cars") if word in task.words]
        untrained = "none" in task.words
        if task not in prepared.values():
            used = {*dataset} if untrained else {"imagenette", *dataset}
            assert needed == (used or {"imagenette"}), task.command
    assert {*prepared.values()} <= all_needs(tasks[-1])
