"""Benchmarks: timing, the comparison of devices, and the parts of gpu.sh at toy size."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import agreement, distillation, interruption, smoke, speed, stages, step, timing
from distillers import registry
from tests.conftest import ROOT, run_command
from utils.errors import UserError
from utils.sampling import Randomness

CPU, GPU, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


class Clock:
    """A clock that only the measured steps move, and CUDA events that read it."""

    def __init__(self, monkeypatch):
        self.now, self.waits, self.at = 0.0, 0, None
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def wait(self):
        self.waits += 1

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event


def test_the_first_step_is_not_timed(monkeypatch):
    clock, took = Clock(monkeypatch), []

    def step():
        took.append(0.25 if took else 10.0)
        clock.now += took[-1]

    assert timing.time_call(step, CPU) == (0.25, 4)  # a second
    assert len(took) == 5


def test_long_steps_are_timed_once(monkeypatch):
    clock = Clock(monkeypatch)
    assert timing.time_call(lambda: setattr(clock, "now", clock.now + 7.0), CPU) == (7.0, 1)


@pytest.mark.parametrize(("slow", "fast", "count"), [(0.5, 0.1, 20), (0.1, 0.01, 100)])
def test_gpu_steps_are_timed_between_events_after_a_second_of_warm_up(
    monkeypatch, slow, fast, count
):
    clock, waits = Clock(monkeypatch), []

    def step():
        clock.now += slow if clock.now < 0.9 else fast  # until the clocks have risen
        waits.append(clock.waits)

    seconds, steps = timing.time_call(step, GPU)
    assert seconds == pytest.approx(fast) and steps == count
    assert clock.now - steps * fast >= 1
    assert len({*waits[-count:]}) == 1  # the host does not wait between the timed steps


def test_operations_and_limit():
    a = torch.randn(4, 5)
    assert timing.count_flop(lambda: a @ a.T) == 2 * 4 * 5 * 4
    assert timing.find_limit({"matrix product": 3.0, "convolution": 5.0}) == 5.0
    assert timing.find_limit({"matrix product": 6.0, "convolution": 5.0}) == 6.0


def test_rates_are_those_of_the_best_product(monkeypatch):
    sizes = dict(products=(8, 16), convolutions=((2, 4, 8), (2, 8, 8)))
    monkeypatch.setitem(timing.SIZES, "cpu", sizes)
    monkeypatch.setattr(
        timing, "time_call", lambda function, device, seconds: (function(), 2.0)[1:] * 2
    )
    rates = timing.peak_rates(CPU, "bf16")
    assert rates == {"matrix product": 2 * 16**3 / 2, "convolution": 2 * 2 * 64 * 8 * 8 * 9 / 2}


def test_share_of_the_limit_and_ratio():
    def time(seconds):
        return dict(seconds=seconds, steps=1, memory=1.0)

    facts = dict(arch="convnet3", width=1.0, image_size=32, num_images=10, outer_batch=12)
    facts |= dict(chunk=0, compile="off")
    facts |= dict(outer_steps=100, pool_size=1, pool_steps=2, preset="cifar100", precision="fp32")
    peak = {"matrix product": 4e9, "convolution": 5e9}
    rounds = [dict(ours=time(1.0), plain=time(each), peak=peak) for each in (2.0, 3.0, 7.0)]
    parts = {"training step of the pool member": [0.5, 1e9]}
    facts |= dict(machine="a CPU", torch="2.0", rounds=rounds, parts=parts, errors={})
    text = speed.format_result(facts | dict(flop=2.5e9, plain_flop=5e9))
    assert "convnet3, --compile off)" in text
    assert "**3.00 (2.00 to 7.00) times as fast as the plain step in fp32**" in text
    assert "n = 3 pairs" in text and "50 (50 to 50) % of the limit" in text
    assert "| 500.0 | 1.0 | 2 | 40% |" in text
    assert "higher rate (medians: matrix product 4, convolution 5)" in text


@pytest.mark.parametrize(("plain", "chunk"), [(False, "0"), (False, "4"), (True, "0")])
def test_operations_are_counted_without_computing(plain, chunk):
    words = ["--width", "0.05", "--num-images", "10", "--outer-batch", "12", "--chunk", chunk]
    args, _ = speed.parse_args([*words, "--device", "cpu", "--precision", "fp32"])
    whole = step.make_step(plain, args, CPU)
    operations = timing.count_flop(whole)
    counted = step.without_values(whole)
    assert counted.x_syn.is_meta and timing.count_flop(counted) == operations
    if not plain:
        of_parts = sum(timing.count_flop(part) for part in step.parts(counted).values())
        assert of_parts == operations


def test_steps_are_counted_and_timed_in_a_loop():
    run, x, steps = stages.TimedRun(CPU), torch.randn(8, 8), 0
    run.watch.seconds = 0.01
    assert [*run.steps("initialise pool", 100)] == [0, 1, 2]
    with pytest.raises(stages.Finished):
        for number in run.steps("train", 1):
            run.log(number, loss=(x @ x).sum())
            steps += 1
    assert run.flop == 2 * 8**3
    assert steps == run.watch.num_steps + 2 and run.watch.seconds_per_step > 0


EXPECTED = [2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("found", "fits", "fits_after_training"),
    [
        (EXPECTED, True, True),
        ([2.0001, 1.05, 0.5], True, True),
        ([2.001, 1.0, 0.5], False, True),
        ([2.0, 1.0, 0.6], False, False),
        ([2.3, 1.0, 0.5], False, False),
        ([2.0, math.nan, 0.5], False, False),
        ([2.0, 1.0], False, False),
        ([], False, False),
    ],
)
def test_agreement_of_losses(found, fits, fits_after_training):
    assert agreement.agree(found, EXPECTED) == fits
    assert agreement.agree(found, EXPECTED, trained=True) == fits_after_training


def test_differences_are_relative():
    assert agreement.differences([2.2, 1.0, 0.4], EXPECTED) == pytest.approx((0.1, 0.2))
    assert all(map(math.isnan, agreement.differences([math.inf], [math.inf])))


def test_draws_are_those_of_the_cpu_on_each_device():
    before = torch.rand
    expected = Randomness(0, CPU)
    usual = torch.rand(3, generator=expected.device), torch.randint(9, (2,))
    with agreement.equal_draws():
        randomness = Randomness(0, META)  # which has no generator
        assert torch.equal(torch.rand(3, generator=randomness.device), usual[0])
        assert torch.equal(torch.randint(9, (2,)), usual[1])
        assert torch.rand(3, device=META, generator=randomness.device).device == META
    assert torch.rand is before


def test_smoke_covers_every_method():
    assert {*smoke.METHODS} == {*registry.SETS}
    assert {*smoke.VARIANTS} <= {*registry.VARIANTS}
    assert {*smoke.TRAINING} <= {each.name for each in smoke.all_commands()}


class Fake:
    """A command whose losses differ between its first and its second run."""

    name, folder, artefact = "target", "run", ""

    def __init__(self, *losses):
        self.losses = [*losses]

    def run(self, runs, *flags):
        (runs / "run").mkdir(parents=True, exist_ok=True)
        return self.losses.pop(0)


@pytest.mark.parametrize(
    ("losses", "resumed", "code"),
    [
        (([1.0], [1.0], [1.0], [1.0]), True, 0),
        (([1.0], [1.2], [1.0], [1.0]), True, 1),
        (([1.0], [1.0], [1.0], [1.0000001]), True, 1),
        (([1.0], [1.0], [], []), True, 1),
        (([1.0], [1.0], [1.0], [1.0]), False, 1),
    ],
)
def test_smoke_fails_on_wrong_numbers(losses, resumed, code, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "all_commands", lambda: [Fake(*losses)])
    monkeypatch.setattr(interruption, "is_resumed_bit_by_bit", lambda *args: resumed)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    with pytest.raises(SystemExit) as stop:
        smoke.main(["--device", "cpu"])
    shown = capsys.readouterr().out
    assert stop.value.code == code and ("FAILED" in shown) == bool(code)


def test_a_run_that_ends_before_it_is_interrupted_is_an_error(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit('no GPU')"], stderr=subprocess.PIPE, text=True
    )
    with pytest.raises(UserError, match="no step 3: no GPU"):
        interruption.wait_for_step(process, tmp_path, 3)


def log_line(step, seconds, loss=0.5):
    return dict(phase="distil", step=step, of=100, seconds=seconds, loss=loss)


def test_position_of_a_distillation():
    others = [dict(phase="initialise pool", step=9, of=9)]
    assert "not logged" in distillation.describe(others, 0)
    before = [*others, log_line(10, 1.0, 0.75), log_line(20, 2.0)]
    assert distillation.describe(before, len(before)) == (
        "step 20 of 100, outer loss 0.7500 at step 10, 0.5000 now"
    )
    text = distillation.describe([*before, log_line(30, 5.0), log_line(40, 41.0)], len(before))
    assert text.startswith("step 40 of 100")
    assert text.endswith("3,600.00 ms a step (n = 10), 0.06 hours left")


def test_a_piece_stops_at_its_end(monkeypatch):
    calls = []

    class Process:
        def wait(self, timeout=None):
            calls.append(timeout is not None)
            if timeout is not None:
                raise subprocess.TimeoutExpired("", timeout)
            return 130

        def send_signal(self, number):
            calls.append(number)

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: Process())
    monkeypatch.setattr(distillation.time, "monotonic", lambda: 0.0)
    assert distillation.run_until(5.0, ["distill.py"]) == 130
    assert calls == [True, distillation.signal.SIGINT, False]
    assert distillation.run_until(0.0, ["distill.py"]) == 130 and len(calls) == 3  # not started


def gpu_sh(*words, **environment):
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *map(str, words)],
        cwd=ROOT,
        env=os.environ | dict(PYTHON=sys.executable) | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_script_runs_the_modules_of_a_part(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\necho "$*"\n')
    stand_in.chmod(0o755)
    listed = {
        part: gpu_sh(part, "--device", "cpu", PYTHON=str(stand_in)).stdout.splitlines()
        for part in ("smoke", "speed", "distill")
    }
    assert listed == {
        "smoke": ["-m benchmarks.smoke --device cpu"],
        "speed": [f"-m benchmarks.{each} --device cpu" for each in ("stages", "speed")],
        "distill": ["-m benchmarks.distillation --device cpu"],
    }
    for words in ([], ["other"]):
        done = gpu_sh(*words)
        assert done.returncode == 2 and done.stderr.startswith("usage:")


@pytest.mark.long
def test_smoke_part():
    done = gpu_sh("smoke", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout and "FAILED" not in done.stdout
    for name in (*smoke.METHODS, *smoke.VARIANTS):
        assert f"\n{name}: " in done.stdout


@pytest.mark.long
def test_speed_of_all_stages():
    done = run_command("-m", "benchmarks.stages", "--device", "cpu", "--preset", "digits")
    lines = [line for line in done.stdout.splitlines() if "preset digits" in line]
    assert [line.partition(",")[0] for line in lines] == [*stages.STAGES]
    for line in lines:
        assert f"torch {torch.__version__}" in line and "% of the limit" in line and "n = " in line


@pytest.mark.long
def test_distillation_part_is_resumed(tmp_path):
    roots = ["--run-root", tmp_path / "runs", "--data-root", tmp_path / "data"]
    words = ["distill", "--device", "cpu", "--preset", "digits", "--images", "40", *roots]
    words += ["--target-epochs", "1", "--log-every", "2", "--outer-steps", "6", "--width", "0.125"]
    words += ["--pool-steps", "3", "--num-images", "8", "--outer-batch", "16", "--seed", "1"]
    stopped = gpu_sh(*words, "--minutes", "0")
    assert stopped.returncode == 130 and "rerun the same command" in stopped.stdout
    finished = gpu_sh(*words, "--minutes", "20")
    assert finished.returncode == 0, finished.stderr
    assert "step 6 of 6" in finished.stdout
    (folder,) = (tmp_path / "runs").glob("synthetic40-32px-*")
    settings = json.loads((folder / "krr_st" / "seed1" / "config.json").read_text())["settings"]
    assert settings["num_images"] == 8
    assert (folder / "krr_st" / "seed1" / "distilled.pt").is_file()


def test_lines_of_the_script_are_short():
    assert max(map(len, (ROOT / "benchmarks/gpu.sh").read_text().splitlines())) <= 100
