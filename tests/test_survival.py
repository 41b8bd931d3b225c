"""Runs survive other processes, signals, full disks, infinite values and clock changes."""

import contextlib
import json
import math
import os
import signal
import subprocess
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from data import prepare
from data.distilled import Distilled
from data.images import load_images
from distillers import krr
from evaluation import results
from utils import cli, files
from utils import run as running
from utils.errors import UserError
from utils.run import Run, Tensors

CPU = torch.device("cpu")


@contextlib.contextmanager
def fork_process(work):
    """Fork a process that calls `work()` and waits. It is killed at the end of the block."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            os.write(writing, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        yield pid
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run_forked(work):
    """Run `work()` in a forked process and return its exit status."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_run(folder, **settings):
    return Run(folder, "x.pt", settings, log_every=1)


def start_run(folder, steps=2, total=9, device="cpu"):
    """Start a run of one number that counts steps; return both after `steps` checkpoints."""
    run, x = open_run(folder), torch.zeros(1)
    run.resume(CPU, {"x": Tensors(x=x)})
    run.device = device
    loop = run.steps("train", total)
    for _ in range(steps):
        next(loop)
        x += 1
        run.done["train"] = int(x)
        run.checkpoint()
    return run, x


# Several processes


def test_second_process_exits_with_an_error_until_the_first_ends(tmp_path):
    with fork_process(lambda: open_run(tmp_path)) as pid, pytest.raises(UserError) as refused:
        open_run(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}: in use by process {pid} on ")
    open_run(tmp_path).finish("x", {})
    with fork_process(lambda: open_run(tmp_path)):
        assert open_run(tmp_path).finished  # a finished run needs no lock


def test_processes_that_add_results_lose_no_line(tmp_path):
    (tmp_path / "results.jsonl").write_text(
        '{"digest": "0", "accuracy": 1}\n{"digest": "half'
    )  # an incomplete line

    def add(name):
        for i in range(50):
            results.append(tmp_path, {"digest": f"{name}{i}", "accuracy": 1, "more": "x" * 5000})

    with contextlib.ExitStack() as stack:
        for name in "abcd":
            stack.enter_context(fork_process(lambda name=name: add(name)))
    there = [line["digest"] for line in results.read(tmp_path / "results.jsonl")]
    assert sorted(there) == sorted(["0", *(f"{name}{i}" for name in "abcd" for i in range(50))])


def test_unreadable_result_error_names_the_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"digest": "0", "accuracy": 1}\n{"digest": oops}\n')
    with pytest.raises(UserError, match=f"{path}: line 2"):
        results.read(path)


# Checkpoints


def test_file_is_a_zip_archive_with_its_checksum_as_comment(tmp_path):
    path = tmp_path / "x.pt"
    files.save(path, "x", {"a": torch.arange(5)})
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(5))
    assert torch.equal(files.load(path, "x", mapped=True)["a"], torch.arange(5))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    path.write_bytes(path.read_bytes()[:-73] + b"\0\0")  # without the checksum
    assert torch.equal(torch.load(path, weights_only=True)["a"], torch.arange(5))
    with pytest.raises(files.DamagedFile, match="without its checksum"):
        files.load(path, "x")


def test_two_checkpoints_are_kept_until_the_run_ends(tmp_path):
    run, _ = start_run(tmp_path, steps=3)
    newest, before = (
        files.load(tmp_path / name, "checkpoint")
        for name in ("checkpoint.pt", "checkpoint.previous.pt")
    )
    assert (newest["done"], before["done"]) == ({"train": 3}, {"train": 2})
    (tmp_path / "x.pt.123.partial").write_text("of a process that was killed")
    open_run(tmp_path)
    run.finish("x", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "lock", "x.pt"]


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    start_run(tmp_path)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(UserError, match="no older checkpoint is intact; delete it to start over"):
        start_run(tmp_path)


def test_checkpoint_restores_the_settings_but_a_result_does_not(tmp_path):
    start_run(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="lr: None stored, 2 now"):
        open_run(tmp_path, lr=2).resume(CPU, {})
    run, x = start_run(tmp_path, steps=0)
    assert int(x) == 2 and (tmp_path / "config.json").is_file()
    run.finish("x", {})
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: missing"):
        open_run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_run_after_the_step_with_a_checkpoint(tmp_path, capsys, number):
    def main(argv):
        run = open_run(tmp_path)
        run.resume(CPU, {})
        for step in run.steps("train", 100):
            if step == 3:
                os.kill(os.getpid(), number)
            run.log(step, loss=step)

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    assert stop.value.code == 130
    assert (
        "stopped after step 4 of 100 (train); rerun the same command to resume"
        in capsys.readouterr().err
    )
    assert files.load(tmp_path / "checkpoint.pt", "checkpoint")["done"] == {"train": 4}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_outside_a_loop_is_a_one_line_message(capsys, number, request):
    before = signal.getsignal(signal.SIGTERM)
    if number == signal.SIGINT:  # ignored in background jobs of a shell
        kept = signal.signal(number, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(number, kept))
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda argv: os.kill(os.getpid(), number) or time.sleep(5), [])
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("cost", "step"), [(0.5, 1.0), (10.0, 1.0), (0.01, 300.0)])
def test_checkpoints_are_written_in_time_with_limited_cost(tmp_path, monkeypatch, cost, step):
    """Replace the monotonic clock, and let the wall clock jump, which must have no effect."""
    now, written, jumps = [0.0], [], iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 1e9)

    def save(*args, **kwargs):
        now[0] += cost
        written.append(now[0])

    monkeypatch.setattr(files, "save", save)
    run = open_run(tmp_path)
    run.resume(CPU, {})
    for i in run.steps("train", 5000):
        now[0] += step
        run.log(i, loss=1.0)
    gaps = np.diff([0.0, *written])
    assert len(written) * cost <= 0.02 * now[0] + cost
    assert max(gaps) <= max(running.CHECKPOINT_SECONDS + step, 50 * cost) + step + cost
    seconds = [
        json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert seconds == sorted(seconds) and seconds[-1] <= now[0]


# Values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_infinite_value_stops_the_run_at_its_step(tmp_path, value):
    run, _ = start_run(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run.log(2, loss=torch.tensor(1.0), gradient=2.0)
    with pytest.raises(
        UserError, match=r"train, step 4 of 9: gradient is not finite; .* at step 2 of train"
    ):
        run.log(3, loss=torch.tensor(1.0), gradient=torch.tensor(value))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert start_run(tmp_path, steps=0)[1] == 2  # resumes from the checkpoint


def test_gpu_values_are_checked_at_log_lines_and_checkpoints(tmp_path):
    """Check that the error names the step, and that no later checkpoint is written.

    The run believes that its CPU tensors are on a GPU.
    """
    for ending in ("line", "checkpoint"):
        run, _ = start_run(tmp_path / ending, device="cuda")
        run.log_every = 7
        for step in range(2, 6):
            run.log(step, loss=torch.tensor(math.nan if step >= 4 else 1.0), rate=0.1)
        before = (tmp_path / ending / "checkpoint.pt").read_bytes()
        with pytest.raises(UserError, match="train, step 5 of 9: loss is not finite"):
            run.checkpoint() if ending == "checkpoint" else run.log(6, loss=torch.tensor(1.0))
        assert (tmp_path / ending / "checkpoint.pt").read_bytes() == before


def test_logged_means_use_the_values_at_each_step(tmp_path):
    for device in ("cpu", "cuda"):
        run, x = start_run(tmp_path / device, steps=0, device=device)
        run.log_every, loop = 3, run.steps("train", 9)
        for step in range(3):
            next(loop)
            x.fill_(step)
            run.log(step, x=x[0], y=step)
        line = json.loads((tmp_path / device / "log.jsonl").read_text())
        assert (line["step"], line["x"], line["y"]) == (3, 1.0, 1.0)


def test_state_that_is_not_finite_is_not_written(tmp_path):
    run, x = start_run(tmp_path)
    before, x[0] = (tmp_path / "checkpoint.pt").read_bytes(), math.nan
    with pytest.raises(UserError, match=r"train, step 2 of 9: x.x is not finite"):
        run.checkpoint()
    with pytest.raises(UserError, match=r"x.pt not written: a.1 is not finite"):
        run.finish("x", {"a": [1.0, x]})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not run.finished


def test_diverging_run_is_an_error(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    d = Distilled(
        torch.randn(8, 3, 32, 32, generator=g),
        torch.randn(8, 5, generator=g),
        "feature",
        torch.zeros(3),
        torch.ones(3),
        {},
    )
    files.save(tmp_path / "distilled.pt", "distilled", d.content())
    flags = [
        "--distilled",
        str(tmp_path / "distilled.pt"),
        "--arch",
        "convnet3",
        "--width",
        "0.05",
        "--epochs",
        "50",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.run(pretrain.main, [*flags, "--lr", "1e30", "--log-every", "1"])
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        stop.value.code == 2 and "pre-train, step " in shown and "lower the learning rate" in shown
    )
    assert "loss is not finite" in shown or "gradient is not finite" in shown
    assert (
        not list(tmp_path.rglob("model.pt"))
        and "NaN" not in next(tmp_path.rglob("log.jsonl")).read_text()
    )


def make_kernel(eigenvalues):
    """Make a kernel (m, m) with these eigenvalues, and targets (m, 2)."""
    g, m = torch.Generator().manual_seed(0), len(eigenvalues)
    q = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    k = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return k, torch.randn(m, 2, generator=g, dtype=torch.float64)


def test_solve_and_its_gradients_equal_those_of_a_general_solver():
    k, y = (each.requires_grad_() for each in make_kernel([5.0, 2.0, 1.0, 0.1]))
    damping, weight = torch.tensor(0.3, dtype=torch.float64), torch.arange(8.0).view(4, 2).double()
    fallbacks = []
    ours, theirs = (
        krr.solve(k, damping, y, fallbacks),
        torch.linalg.solve(k + 0.3 * torch.eye(4), y),
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad((each * weight).sum(), (k, y)) for each in (ours, theirs))
    )
    assert not fallbacks


def test_indefinite_kernel_gets_a_larger_ridge_which_is_counted():
    k, y = make_kernel([5.0, 2.0, 1.0, -0.2])
    damping = torch.tensor(0.1, dtype=torch.float64)
    fallbacks = []
    torch.testing.assert_close(
        krr.solve(k, damping, y, fallbacks), torch.linalg.solve(k + 1.0 * torch.eye(4), y)
    )
    assert sum(fallbacks) == len(fallbacks) == 1
    assert krr.solve(k, damping / 10, y).isnan().all()  # then the loss stops the run


def test_larger_ridges_are_logged_and_too_many_stop_the_run(tmp_path):
    def at_share(folder, every):
        run = open_run(folder)
        run.resume(CPU, {})
        run.limits = krr.LIMITS
        for step in run.steps("distil", 300):
            run.log(step, loss=1.0, larger_ridge=torch.tensor(step % every == 0))
        return [
            json.loads(line)["larger_ridge"]
            for line in (folder / "log.jsonl").read_text().splitlines()
        ]

    assert sum(at_share(tmp_path / "seldom", 11)) == 28
    with pytest.raises(
        UserError,
        match=r"distil, step 100 of 300: larger_ridge is 0.2, above 0.1: .* raise --ridge",
    ):
        at_share(tmp_path / "often", 5)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to ...\nmore"), MemoryError()]
)
def test_out_of_memory_error_names_the_flags_to_lower(capsys, error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    shown = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and shown.count("\n") == 1
        and "batch size" in shown
        and "--chunk" in shown
    )


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MB; return its folder and a function that makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def get_error(capsys, main):
    """Run `main`, which must fail, and return its one-line error."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda argv: main(), [])
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line and "it/s]" not in line
    ]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_full_disk_is_an_error_and_keeps_old_files(small_disk, capsys):
    """Write a checkpoint, an array, a log and results to a full disk. Old files stay intact."""
    disk, _ = small_disk
    run, _ = start_run(disk / "run", steps=1)
    results.append(disk, {"digest": "0", "accuracy": 1})
    run.state["big"] = Tensors(x=torch.zeros(400_000))
    full = "No space left on device"
    assert f"checkpoint.pt: {full}" in get_error(capsys, run.checkpoint)
    assert f"a.npy: {full}" in get_error(
        capsys, lambda: files.create_array(disk / "a.npy", np.uint8, (2**21,))
    )
    (disk / "a.npy").unlink()
    assert not list(disk.rglob("*.partial")) and start_run(disk / "run", steps=0)[1] == 1
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(512)):
            pass
    assert f"log.jsonl: {full}" in get_error(
        capsys, lambda: [run.log(i, loss=i) for i in range(9999)]
    )
    assert f"x.json: {full}" in get_error(
        capsys, lambda: files.write_json(disk / "x.json", {"a": "b" * 9999})
    )
    line = {"digest": "1", "accuracy": 1, "more": "x" * 9999}
    assert f"results.jsonl: {full}" in get_error(capsys, lambda: results.append(disk, line))
    assert [each["digest"] for each in results.read(disk / "results.jsonl")] == ["0"]
    (disk / "filler").unlink()
    results.append(disk, line)
    assert [each["digest"] for each in results.read(disk / "results.jsonl")] == ["0", "1"]
    assert start_run(disk / "run", steps=0)[1] == 1


def test_disk_that_fills_during_preparation_is_an_error(small_disk, tmp_path, capsys):
    for i in range(20):
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), i, dtype=np.uint8)).save(tmp_path / "mine" / f"{i}.png")
    disk, _ = small_disk
    main = lambda: load_images(str(tmp_path / "mine"), "train", 224, disk)  # noqa: E731
    assert "No space left on device" in get_error(capsys, main)
    assert not [path for path in disk.rglob("train*") if path.suffix != ".lock"]


def test_read_only_run_root_is_an_error(small_disk, capsys):
    disk, make_read_only = small_disk
    open_run(disk / "done").finish("x", {"a": 1})
    start_run(disk / "run")
    for file in files._locks.values():
        file.close()  # files open for writing prevent a read-only disk
    files._locks.clear()
    make_read_only()
    assert "Read-only file system" in get_error(capsys, lambda: open_run(disk / "run"))
    assert "Read-only file system" in get_error(capsys, lambda: open_run(disk / "new"))
    assert open_run(disk / "done").finished and files.load(disk / "done" / "x.pt", "x")["a"] == 1


@pytest.mark.parametrize("number", [28, 5, 122])  # no space, input/output error, quota
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, capsys, number, call):
    run, x = start_run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args):
        raise OSError(number, os.strerror(number))

    x += 1
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert f"{tmp_path / 'checkpoint.pt'}: {os.strerror(number)}" in get_error(
            capsys, run.checkpoint
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_disk_error_inside_torch_save_keeps_its_message(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 2000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    whole = files._HashingWriter.__init__
    files.save(tmp_path / "x.pt", "x", {"a": 1})
    monkeypatch.setattr(
        files._HashingWriter, "__init__", lambda self, file: whole(self, Full(file))
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*x.pt'"):
        files.save(tmp_path / "x.pt", "x", {"a": torch.zeros(9999)})
    assert files.load(tmp_path / "x.pt", "x")["a"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_run_root_without_permission_is_an_error(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o500)

    def run_as_nobody():
        if os.geteuid() == 0:
            os.setuid(65534)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        cli.run(lambda argv: open_run(tmp_path / "runs" / "run"), [])

    assert run_forked(run_as_nobody) == 2 and not list((tmp_path / "runs").iterdir())


# Prepared images


def test_large_arrays_are_verified_if_changed_or_with_verify(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 9, 3), 50 * i, dtype=np.uint8)).save(
            tmp_path / "mine" / f"{i}.png"
        )
    source = str(tmp_path / "mine")
    load_images(source, "train", 32, tmp_path)
    [path] = tmp_path.rglob("train.npy")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    with pytest.raises(
        UserError, match=r"train.npy: damaged .*; delete .*train.json to recreate it"
    ):
        load_images(source, "train", 32, tmp_path)
    monkeypatch.setattr(files, "ALWAYS_VERIFIED", 0)
    load_images(source, "train", 32, tmp_path)  # unchanged modification time
    words = [source, "--size", "32", "--data-root", str(tmp_path)]
    prepare.main(words)
    with pytest.raises(UserError, match="damaged"):
        prepare.main([*words, "--verify"])
    os.utime(path)
    with pytest.raises(UserError, match="damaged"):
        load_images(source, "train", 32, tmp_path)
    path.with_suffix(".json").unlink()
    assert load_images(source, "train", 32, tmp_path).pixels[2].min() == 100
    prepare.main([*words, "--verify"])
    capsys.readouterr()
