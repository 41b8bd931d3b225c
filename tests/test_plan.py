"""The tables' scripts: every command they list is one that its script takes; what is missing is
done, once."""

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
from benchmarks import plan
from distillers import __main__ as distillers
from distillers import method
from evaluation import results
from tests.conftest import DISTILL, ROOT, TARGET
from utils.presets import PRESETS, STAGES

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("run_*.sh"))
ENVIRONMENT = dict(os.environ, PYTHON=sys.executable, TQDM_DISABLE="1")


def shell(script, *flags, check=True):
    done = subprocess.run(
        ["bash", f"scripts/{script}", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def listed(script, *flags):
    """The commands that --dry-run lists, as their words after `python`, and its last line."""
    lines = shell(script, "--dry-run", *flags).stdout.splitlines()
    return [line.split("python ", 1)[1].split() for line in lines[:-1]], lines[-1]


def parse(words, monkeypatch):
    """What the command's own parser makes of it."""
    made = words[words.index("--distilled") + 1] if "--distilled" in words else ""
    reduced = made.startswith(("runs/quick/", "runs/departures/"))
    name = f"quick-{made.split('/')[2]}" if reduced else [*made.split("/"), ""][1]
    stand_in = SimpleNamespace(meta=dict(preset=name), target_kind="class")
    monkeypatch.setattr("pretrain.load_distilled", lambda path: stand_in)
    if words[0] == "-m" and words[1] == "distillers":
        assert words[2] in distillers.METHODS, (
            f"the scripts list a method that is not there: {words[2]}"
        )
        chosen = importlib.import_module(f"distillers.{words[2]}").METHOD
        assert ("--target-network" in words) == chosen.needs_target, words[2]
        return method.parse_args(chosen, words[3:])
    if words[0] == "distill.py":
        return method.parse_args(importlib.import_module("distill").METHOD, words[1:])
    if words[0] == "-m":
        return importlib.import_module(words[1]).parse_args(words[2:])
    return importlib.import_module(words[0].removesuffix(".py")).parse_args(words[1:])


MORE = ["--oracle", "--probes", "--head"]
WITHOUT_MORE = {"run_kd.sh", "run_figures.sh", "run_departures.sh"}


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_listed_command_is_accepted_by_its_parser(script, quick, monkeypatch):
    commands, last = listed(script, "--seeds", "0", *quick)
    if quick and script not in WITHOUT_MORE:
        commands += listed(script, "--seeds", "0", *quick, "--targets", "cars", *MORE)[0]
    assert len(commands) > 5 and last.startswith("0 of ")
    for words in {" ".join(words): words for words in commands}.values():
        parse(words, monkeypatch)


def test_what_the_paper_lacks_comes_with_one_flag_each(monkeypatch):
    flags = ["--seeds", "0 1", "--targets", "cars", "--methods", "scratch random krr_st"]
    usual, _ = listed("run_tinyimagenet.sh", *flags)

    def more(flag):
        commands, _ = listed("run_tinyimagenet.sh", *flags, flag)
        assert all(words in commands for words in usual) and all(
            parse(words, monkeypatch) for words in commands
        )
        return [" ".join(words) for words in commands if words not in usual]

    oracle = more("--oracle")
    assert oracle[0].startswith(
        "pretrain.py --source tinyimagenet --target-network "
        "runs/tinyimagenet/target/seed0/target.pt"
    )
    assert [
        "finetune.py --weights runs/tinyimagenet/full/seed0/convnet4/seed1/model.pt" in each
        for each in oracle
    ] == [False] * 3 + [True]  # a pre-training and an evaluation of each seed
    probes = more("--probes")
    assert len(probes) == 3 * 2 * 6 and sum("--protocol knn" in each for each in probes) == 3 * 2
    shares = {each.partition("--label-fraction ")[2].split(" ")[0] for each in probes}
    assert shares == {"0.01", "0.05", "0.1", "0.5", ""} and not any(
        "tinyimagenet --protocol" in each for each in probes
    )
    head = more("--head")
    assert len(head) == 2 and all(
        "/random/" in each and "--dataset tinyimagenet" in each for each in head
    )
    done = shell("run_kd.sh", "--dry-run", *MORE, check=False)
    assert (
        done.returncode == 2 and "--oracle --probes --head: nothing to add to here" in done.stderr
    )


def test_probes_leave_the_results_that_the_plan_waits_for(roots, tmp_path):
    script = "set -euo pipefail; methods=scratch targets=digits quick_width=0.125\n"
    script += "source scripts/table.sh\nfor p in 'linear 0.1' 'knn '; do\n"
    script += 'tuned ${p% *} "${p#* }" digits scratch convnet3 0 32 digits; done\n'
    words = [
        "bash",
        "-c",
        script + "carry_out",
        "toy",
        "--quick",
        *roots[:2],
        "--run-root",
        str(tmp_path),
    ]
    done = subprocess.run(
        words, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = results.read(tmp_path / "quick" / "scratch" / "convnet3-x0.125_32px" / "results.jsonl")
    assert {line["name"] for line in lines} == {"digits_linear_0.1_seed0", "digits_knn_seed0"}


@pytest.mark.parametrize("source", ["cifar100", "tinyimagenet", "imagenet", "imagenette"])
def test_folders_that_quick_commands_name_are_those_that_will_be_made(source, monkeypatch):
    """The shell knows the width of --quick's networks, which the preset decides."""
    script = {
        "cifar100": "run_cifar100.sh",
        "tinyimagenet": "run_tinyimagenet.sh",
        "imagenet": "run_imagenet.sh",
        "imagenette": "run_imagenette.sh",
    }[source]
    commands, _ = listed(
        script, "--quick", "--seeds", "0", "--methods", "scratch random krr_st", "--oracle"
    )
    named = {
        Path(words[words.index("--weights") + 1]) for words in commands if words[0] == "finetune.py"
    } - {Path("none")}
    made = set()
    for words in commands:
        if words[0] == "pretrain.py":
            args, _ = parse(words, monkeypatch)
            home = (
                args.distilled.parent
                if args.distilled
                else args.target_network.parents[2] / "full" / "seed0"
            )
            folder = home / models.label(args.arch, args.width) / f"seed{args.seed}"
            made.add(folder / "model.pt")
    assert named == made and named


def test_presets_change_only_settings_that_there_are():
    for name, changes in PRESETS.items():
        for stage, values in changes.items():
            if stage in STAGES:
                assert values.keys() <= STAGES[stage].keys(), (name, stage)


def test_flags_narrow_and_bad_ones_are_refused():
    commands, _ = listed(
        "run_tinyimagenet.sh", "--methods", "scratch krr_st", "--targets", "cars", "--seeds", "4"
    )
    tuned = [words for words in commands if words[0] == "finetune.py"]
    assert len(tuned) == 2 and all(words[words.index("--dataset") + 1] == "cars" for words in tuned)
    assert sum(words[0] == "pretrain.py" for words in commands) == 1 and [
        "-m",
        "distillers",
    ] not in [words[:2] for words in commands]
    commands, _ = listed("run_cifar100.sh", "--methods", "random", "--", "--device", "cuda")
    assert all(words[-2:] == ["--device", "cuda"] for words in commands if words[0] != "-m")
    for flags, word in (
        (["--methods", "magic"], "magic"),
        (["--colour"], "--colour"),
        (["--jobs", "0"], "--jobs 0"),
        (["--run-root", "a b"], "spaces"),
        (["--seeds"], "value"),
    ):
        done = shell("run_cifar100.sh", "--dry-run", *flags, check=False)
        assert done.returncode == 2 and word in done.stderr


def commands(top, *rows):
    """Tasks of a little script that adds an x to a file in `top`: (file, names of the files that it
    needs)."""
    (top / "make.py").write_text(
        "import sys, time; time.sleep(0.05); open(sys.argv[1], 'a').write('x')"
    )
    return plan.read(
        "\t".join([str(top / row[0]), " ".join(str(top / name) for name in ("make.py", *row))])
        for row in rows
    )


def do(tasks, top, jobs=1):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return plan.carry_out(tasks, jobs, top / "runs")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_commands_wait_for_the_files_that_they_name(tmp_path, capfd):
    tasks = commands(tmp_path, ("b", "a"), ("a",))
    assert [len(task.needs) for task in tasks] == [0, 0]  # those above only
    tasks = commands(tmp_path, ("a",), ("b", "a"), ("c", "b"), ("d",))
    assert [[Path(n.leaves).name for n in task.needs] for task in tasks] == [[], ["a"], ["b"], []]
    assert do(tasks, tmp_path, jobs=2) == 0
    shown = [
        line.split()[-1] for line in capfd.readouterr().out.splitlines() if line.startswith("$")
    ]
    assert {name: (tmp_path / name).read_text() for name in "abcd"} == dict.fromkeys(
        "abcd", "x"
    ) and len(shown) == 4
    assert (
        do(commands(tmp_path, ("a",), ("b", "a")), tmp_path) == 0
        and (tmp_path / "a").read_text() == "x"
    )


def test_a_failure_stops_only_what_needs_it(tmp_path, capfd):
    tasks = commands(tmp_path, ("a",), ("b", "a"), ("c",))
    tasks[0].words = ["-c", "raise SystemExit(3)"]
    assert do(tasks, tmp_path) == 1
    assert (tmp_path / "c").exists() and not (tmp_path / "b").exists()
    assert (
        "failed (3)" in (error := capfd.readouterr().err)
        and "left out, since they need those: 1" in error
    )


def test_a_command_that_another_process_is_at_is_left_to_it(tmp_path):
    [task] = commands(tmp_path, ("a",))
    held = plan.claim(task, tmp_path)
    assert held and plan.claim(task, tmp_path) is None
    held.close()
    plan.claim(task, tmp_path).close()


def test_estimate_from_what_took_how_long(tmp_path):
    for seed in (0, 1, 2):
        run = tmp_path / f"seed{seed}"
        run.mkdir()
        steps = (
            [(10, 4.0), (20, 9.0), (30, 1.0), (100, 21.0)] if seed < 2 else [(25, 10.0)]
        )  # started again at 30
        log = [
            json.dumps(dict(phase="p", step=step, of=100, seconds=seconds))
            for step, seconds in steps
        ]
        (run / "log.jsonl").write_text("\n".join(log) + "\n")
        if seed < 2:
            (run / "model.pt").write_text("")
    line = f"{tmp_path}/seed{{}}/model.pt\tpretrain.py --distilled {tmp_path}/d.pt --seed {{}}"
    tasks = plan.read(
        [line.format(seed, seed) for seed in (0, 1, 2, 3)] + [f"{tmp_path}/o.pt\tother.py"]
    )
    assert tasks[0].spent() == (30.0, 1.0) and tasks[2].spent() == (10.0, 0.25)
    assert plan.estimate(tasks, 1) == (
        "2 of 5 commands done; about 1 min left; 1 of kinds that were not timed yet"
    )


TOY = """
set -euo pipefail
methods="scratch random random_features krr_st" targets=digits quick_width=0.125
source scripts/table.sh
task $runs/digits/target/seed0/target.pt pretrain_target.py --source digits {target}
distilled_set digits krr_st {distill}
for seed in $seeds; do
  folder=$(weights digits krr_st convnet3-x0.125 $seed)
  set=$runs/digits/krr_st/seed0/distilled.pt
  task $folder/model.pt pretrain.py --distilled $set --width 0.125 --epochs 2 --seed $seed
  fine_tuned digits krr_st convnet3-x0.125 $seed 32 digits --steps 2
done
at_the_end -m analysis.tables $runs
carry_out
"""


def test_a_toy_table_killed_and_started_again(roots, runs, tmp_path):
    """From the shell, two jobs and two such processes at once on one run folder; stopped, killed,
    and gone on."""
    steps = ["--outer-steps", "500", "--log-every", "1"]
    script = TOY.format(target=" ".join(TARGET), distill=" ".join([*DISTILL, *steps]))
    shutil.copytree(runs / "target", tmp_path / "digits" / "target")  # done already
    words = ["bash", "-c", script, "toy", *roots[:2], "--run-root", str(tmp_path), "--seeds", "0 1"]
    out = open(tmp_path / "out.txt", "w+")  # noqa: SIM115

    def begin():
        return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out)

    def reach(condition):
        deadline = time.time() + 120
        while not condition():
            assert time.time() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)

    log = tmp_path / "digits" / "krr_st" / "seed0" / "log.jsonl"
    first = begin()
    reach(lambda: log.is_file() and log.read_text().count("\n") > 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 130 and (log.parent / "checkpoint.pt").is_file()
    assert not (log.parent / "distilled.pt").exists()
    before = log.read_text().splitlines()

    pair = [begin(), begin()]
    reach(lambda: any(len(results.read(p)) for p in log.parent.rglob("results.jsonl")))
    pair[0].kill()  # what it had begun goes on, and the other waits for that
    assert pair[1].wait(timeout=120) == 0
    shown = (tmp_path / "out.txt").read_text()
    assert log.read_text().splitlines()[: len(before)] == before  # gone on with, not done again
    for seed in (0, 1):
        [line] = results.read(log.parent / "convnet3-x0.125" / f"seed{seed}" / "results.jsonl")
        assert line["name"] == f"digits_full_seed{seed}" and line["deviations"][
            "finetune.steps"
        ] == [2, 100]
        assert shown.count(f"--dataset digits --seed {seed}") == 1  # each was begun once
    assert "(n=2)" in shown and "KRR-ST" in shown
    listing = subprocess.run(
        [*words, "--dry-run"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    ).stdout
    assert "6 of 6 commands done" in listing


def test_appending_by_several_processes_loses_nothing_and_writes_nothing_twice(tmp_path):
    code = (
        "import sys; from pathlib import Path; from evaluation import results\n"
        "for i in range(100):\n"
        "    results.append(Path(sys.argv[1]), dict(digest=f'{sys.argv[2]}-{i}', filler='x' * "
        "3000))\n"
        "    results.append(Path(sys.argv[1]), dict(digest=f'all-{i}'))\n"
    )
    (tmp_path / "results.jsonl").write_text(
        '{"digest": "first"}\n{"digest": "cut o'
    )  # a full disk, once
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(k)], cwd=ROOT)
        for k in range(3)
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0, 0]
    found = sorted(line["digest"] for line in results.read(tmp_path / "results.jsonl"))
    assert found == sorted(["first", *(f"{k}-{i}" for k in (0, 1, 2, "all") for i in range(100))])
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 401


def test_lock_of_results_is_waited_for(tmp_path):
    results.append(tmp_path, dict(digest="a"))
    with open(tmp_path / "results.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code = "from pathlib import Path; from evaluation import results; "
        code += "results.append(Path({!r}), dict(digest='b'))"
        other = subprocess.Popen([sys.executable, "-c", code.format(str(tmp_path))], cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1)
    assert other.wait(timeout=30) == 0 and len(results.read(tmp_path / "results.jsonl")) == 2


def test_gpu_script_lists_commands_that_are_accepted_and_compares_their_losses(
    tmp_path, monkeypatch
):
    listing, stand_in = tmp_path / "listing", tmp_path / "python"
    stand_in.write_text(f"""#!/usr/bin/env bash
if [ "$1" = - ]; then exec {sys.executable} "$@"; fi
echo "$*" >> {listing}
case $* in *benchmarks.speed*) echo "Preset of $4";; esac
""")
    stand_in.chmod(0o755)
    losses = dict(cpu_fp32=[2.0, 1.0] * 5, cuda_fp32=[2.0] * 9 + [1.5], cuda_bf16=[2.0, 1.1] * 5)
    for name, each in losses.items():
        folder = tmp_path / "runs" / "digits" / name / "seed0"
        (folder / "convnet3-x0.25" / "seed0").mkdir(parents=True)
        log = [dict(phase="distil", step=i, loss=loss) for i, loss in enumerate(each)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        found = json.dumps(dict(digest=name, accuracy=90.125)) + "\n"
        (folder / "convnet3-x0.25" / "seed0" / "results.jsonl").write_text(found)
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", tmp_path / "runs"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=ENVIRONMENT | dict(PYTHON=str(stand_in)),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    commands = [
        line.replace(str(tmp_path / "runs"), "runs").split()
        for line in listing.read_text().splitlines()
    ]
    assert len(commands) == 15
    for words in commands:
        parse(words, monkeypatch)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("cpu_", "cuda_"))]
    assert [[row[4].strip(","), row[6].strip(";")] for row in rows] == [
        ["0.0e+00", "0.0e+00"],
        ["1.0e+00", "1.0e+00"],
        ["1.0e-01", "1.0e-01"],
    ]
    assert [row[9].strip(",") for row in rows] == ["1.5000", "1.9500", "1.5500"] and rows[0][
        -2
    ] == "90.12"
    assert done.stdout.endswith("Preset of cifar100\n" * 2 + "Preset of tinyimagenet\n" * 2)
