"""Tasks run once and in order, also if several processes share the run folder."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import results
from experiments import scheduler
from experiments.scheduler import TaskList
from tests.conftest import ROOT


def make_tasks(top, *rows):
    """Make tasks that append an x to a file in `top`. A row is (file, files that it needs...)."""
    (top / "make.py").write_text(
        "import sys, time; time.sleep(0.05); open(sys.argv[1], 'a').write('x')"
    )
    made = TaskList()
    for row in rows:
        made.add([top / name for name in ("make.py", *row)], top / row[0])
    return made.tasks


def carry_out(tasks, top, jobs=1):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return scheduler.carry_out(tasks, jobs, top / "runs")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_tasks_wait_for_the_files_that_they_name(tmp_path, capfd):
    tasks = make_tasks(tmp_path, ("b", "a"), ("a",))
    assert [len(task.needs) for task in tasks] == [0, 0]  # tasks wait for earlier ones only
    tasks = make_tasks(tmp_path, ("a",), ("b", "a"), ("c", "b"), ("d",), ("d", "a"))
    needs = [[Path(each.outputs[0]).name for each in task.needs] for task in tasks]
    assert needs == [[], ["a"], ["b"], []]
    assert carry_out(tasks, tmp_path, jobs=2) == 0
    out = capfd.readouterr().out
    shown = [line.split()[-1] for line in out.splitlines() if line.startswith("$")]
    assert {name: (tmp_path / name).read_text() for name in "abcd"} == dict.fromkeys("abcd", "x")
    assert len(shown) == 4
    assert carry_out(make_tasks(tmp_path, ("a",), ("b", "a")), tmp_path) == 0
    assert (tmp_path / "a").read_text() == "x"


def test_tasks_wait_for_evaluations_that_they_name():
    made = TaskList()
    made.add(["x.py", "first"], "a")
    folder = "runs/net/results.jsonl"
    made.add(["finetune.py", "--seed", 0], f"{folder}#cars_full_seed0", reads=["a"])
    made.add(["finetune.py", "--seed", 1], f"{folder}#cars_0.1_seed1", f"{folder}#cars_seed1")
    made.add(["kd.py", "--teacher", "runs/net/cars_full_seed0/model.pt"], "b")
    made.add(["print.py"])
    assert [[made.tasks.index(each) for each in task.needs] for task in made.tasks] == [
        [],
        [0],
        [],
        [1],
        [0, 1, 2, 3],
    ]


def test_task_is_done_when_all_its_outputs_exist(tmp_path):
    made = TaskList()
    made.add(["finetune.py"], *(f"{tmp_path}/results.jsonl#{name}" for name in ("a", "b")))
    [task] = made.tasks
    results.append(tmp_path, dict(digest="1", name="a", seconds=2.0))
    assert not task.is_done()
    results.append(tmp_path, dict(digest="2", name="b", seconds=3.0))
    assert task.is_done() and task.time_spent() == (5.0, 1.0)


def test_task_is_left_out_only_if_all_its_outputs_are_made():
    made = TaskList()
    made.add(["a.py"], "r#a", "r#b")
    made.add(["b.py"], "r#b", "r#c")
    made.add(["c.py"], "r#a", "r#c")
    assert [task.words for task in made.tasks] == [["a.py"], ["b.py"]]


def test_second_signal_does_not_interrupt_the_wait(tmp_path):
    """The commands may still write their checkpoints."""
    (tmp_path / "slow.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_):\n"
        "    open(sys.argv[1] + '.stopping', 'w').close()\n"
        "    time.sleep(1)\n"
        "    open(sys.argv[1] + '.saved', 'w').close()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "open(sys.argv[1] + '.started', 'w').close()\n"
        "time.sleep(100)\n"
    )
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from experiments import scheduler\n"
        "made, top = scheduler.TaskList(), sys.argv[1]\n"
        "made.add([top + '/slow.py', top + '/x'], top + '/x')\n"
        "sys.exit(scheduler.carry_out(made.tasks, 1, Path(top)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    for name in ("x.started", "x.stopping"):
        deadline = time.time() + 60
        while not (tmp_path / name).exists():
            assert time.time() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130 and (tmp_path / "x.saved").exists()


def test_failed_task_stops_dependent_tasks_only(tmp_path, capfd):
    tasks = make_tasks(tmp_path, ("a",), ("b", "a"), ("c",))
    tasks[0].words = ["-c", "raise SystemExit(3)"]
    assert carry_out(tasks, tmp_path) == 1
    assert (tmp_path / "c").exists() and not (tmp_path / "b").exists()
    error = capfd.readouterr().err
    assert "failed (3)" in error and "1 failed; 1 dependent commands did not run" in error


def test_task_of_another_process_is_not_run(tmp_path):
    [task] = make_tasks(tmp_path, ("a",))
    held = scheduler.acquire_lock(task, tmp_path)
    assert held and scheduler.acquire_lock(task, tmp_path) is None
    held.close()
    scheduler.acquire_lock(task, tmp_path).close()


def test_estimate_uses_the_times_of_finished_tasks(tmp_path):
    for seed in (0, 1, 2):
        run = tmp_path / f"seed{seed}"
        run.mkdir()
        # The first two were resumed after step 20, so their seconds restart.
        resumed = [(10, 4.0), (20, 9.0), (30, 1.0), (100, 21.0)]
        steps = resumed if seed < 2 else [(25, 10.0)]
        log = [dict(phase="p", step=step, of=100, seconds=seconds) for step, seconds in steps]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if seed < 2:
            (run / "model.pt").write_text("")
    made = TaskList()
    for seed in (0, 1, 2, 3):
        words = ["pretrain.py", "--distilled", tmp_path / "d.pt", "--seed", seed]
        made.add(words, tmp_path / f"seed{seed}" / "model.pt")
    made.add(["other.py"], tmp_path / "o.pt")
    assert made.tasks[0].time_spent() == (30.0, 1.0)
    assert made.tasks[2].time_spent() == (10.0, 0.25)
    assert scheduler.estimate(made.tasks, 1) == (
        "2 of 5 commands done; about 1 min remaining; no estimate yet for 1"
    )


TOY = """
import sys
from experiments import __main__ as experiments
from experiments.tables import TABLES, Protocol, Scale, Source, Table
from utils import cli

KRR_ST = dict(width=0.125, outer_steps=500, outer_batch=64, pool_size=2, pool_steps=3)
TABLES["toy"] = Table(
    "toy",
    "A toy table.",
    sources=(Source("digits"),),
    methods=("krr_st",),
    datasets=("digits",),
    protocols=(Protocol("linear", label_fractions=(0.1, 1)), Protocol("full")),
    seeds=(0, 1),
    scale=Scale(
        width=0.125,
        sets=dict(num_images=20),
        methods=dict(krr_st=KRR_ST),
        pretrain=dict(feature=dict(epochs=2)),
        finetune=dict(steps=2),
    ),
    last=("-m analysis.tables {runs}",),
)
cli.run(experiments.main)
"""


@pytest.mark.long
def test_killed_table_resumes(roots, runs, tmp_path):
    """Run two processes with two jobs each on one run root; stop, kill and resume them."""
    shutil.copytree(runs / "target", tmp_path / "digits" / "target")  # done before
    places = [*roots[:2], "--run-root", str(tmp_path)]
    words = [sys.executable, "-c", TOY, "toy", *places, "--jobs", "2"]
    flags = ["--", "--log-every", "1"]
    out = open(tmp_path / "out.txt", "w+")  # noqa: SIM115

    def start():
        return subprocess.Popen([*words, *flags], cwd=ROOT, stdout=out, stderr=out)

    def wait_until(condition):
        deadline = time.time() + 240
        while not condition():
            assert time.time() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)

    log = tmp_path / "digits" / "krr_st" / "seed0" / "log.jsonl"
    first = start()
    wait_until(lambda: log.is_file() and log.read_text().count("\n") > 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=1800) == 130 and (log.parent / "checkpoint.pt").is_file()
    assert not (log.parent / "distilled.pt").exists()
    before = log.read_text().splitlines()

    pair = [start(), start()]
    wait_until(lambda: any(len(results.read(p)) for p in log.parent.rglob("results.jsonl")))
    pair[0].kill()  # its commands go on, and the other process waits for them
    assert pair[1].wait(timeout=1800) == 0, (tmp_path / "out.txt").read_text()
    shown = (tmp_path / "out.txt").read_text()
    assert log.read_text().splitlines()[: len(before)] == before  # resumed, not restarted
    for seed in (0, 1):
        lines = results.read(log.parent / "convnet3-x0.125" / f"seed{seed}" / "results.jsonl")
        names = [f"digits_{name}_seed{seed}" for name in ("full", "linear", "linear_0.1")]
        assert sorted(line["name"] for line in lines) == sorted(names)
        [full] = [line for line in lines if line["protocol"] == "full"]
        assert full["deviations"]["finetune.steps"] == [2, 100]
        assert shown.count(f"--dataset digits --seed {seed}") == 2  # each command ran once
    assert "(n=2)" in shown and "KRR-ST" in shown
    listing = subprocess.run(
        [*words, "--dry-run", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert "8 of 8 commands done" in listing.stdout
