"""Runs in several processes: same results as in one, a single writer, clean stop and resume."""

import hashlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import distill
import finetune
import kd
import pretrain
import pretrain_target
from benchmarks import speed
from data.distilled import load_distilled
from distillers import __main__ as distillers
from distillers.pool import Member
from models.barlow_twins import barlow_twins_loss
from models.sync_batch_norm import synchronise_batch_norm
from tests.conftest import DISTILL, ROOT, TARGET, run_command
from tests.ranks import run_ranks
from utils import cli, distributed, files, run
from utils.sampling import Batches, Randomness

DIM, ROWS = 6, 10


def run_initialised(function, *args):
    """Run `function(*args)` between `initialise` and `shutdown`, in one of several processes."""
    distributed.initialise("cpu")
    try:
        return function(*args)
    finally:
        distributed.shutdown()


def make_twins():
    """Return two views (10, 3, 4, 4) and a network with both kinds of batch norm (float64)."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, DIM),
        nn.BatchNorm1d(DIM),
        nn.ReLU(),
        nn.Linear(DIM, DIM),
    ).double()
    return [
        torch.randn(ROWS, 3, 4, 4, generator=g, dtype=torch.float64) * 2 + 1 for _ in range(2)
    ], network


def compute_twins_step(rank=0, count=1):
    """Compute a Barlow Twins step on this rank's part of the views.

    Returns the loss, the gradients, the buffers, the mean output in eval mode (which needs no other
    rank), and whether all modules have their own `forward` again.
    """
    views, network = make_twins()
    weights = list(network.parameters())
    with synchronise_batch_norm(network):
        z1, z2 = (network(view.tensor_split(count)[rank]) for view in views)
        loss = distributed.backward(barlow_twins_loss(z1, z2, 0.1, 0.5), weights)
        own = network.eval()(views[0][: rank + 1]).mean().item()
    whole = not any("forward" in vars(module) for module in network.modules())
    return loss.item(), [each.grad for each in weights], list(network.buffers()), own, whole


def _compute_own_step():
    return run_initialised(lambda: compute_twins_step(distributed.rank(), distributed.world_size()))


def test_four_processes_compute_equal_sets_and_measure_their_speed(home, data_root, tmp_path):
    words = [*DISTIL, "--pool-size", "4", "--data-root", data_root, "--run-root", home]
    found, codes = run_ranks(4, tmp_path / "a", run_main, distill.main, words)
    assert codes == [0] * 4, read_outputs(tmp_path / "a", 4)
    assert len(found[0]) == 2 and found.count(found[0]) == 4
    words = [
        "--width",
        "0.05",
        "--num-images",
        "10",
        "--outer-batch",
        "12",
        "--pairs",
        "2",
        "--device",
        "cpu",
    ]
    _, codes = run_ranks(4, tmp_path / "b", run_main, speed.main, words)
    out, *others = read_outputs(tmp_path / "b", 4)
    assert codes == [0] * 4 and not any(others[:3]), read_outputs(tmp_path / "b", 4)
    assert "4 processes" in out and "| 4 processes, with exchange |" in out
    # 10 images of 3 x 32 x 32 and 10 targets of 512, four bytes each. In a ring of two processes,
    # each sends all of them.
    assert "exchanges 0.1 MB for the images and 0.0 MB" in out
    sent = 4 * 10 * (3 * 32 * 32 + 512) + 4
    assert f"| 2 | {sent / 1e6:.1f} | {1e3 * sent / 25e9:.3g} ms (" in out


@pytest.mark.parametrize("count", [2, 4])
def test_barlow_twins_in_several_processes_equals_one_process(count, tmp_path):
    loss, gradients, buffers, _, _ = compute_twins_step()
    found, codes = run_ranks(count, tmp_path, _compute_own_step)
    assert codes == [0] * count, (tmp_path / "err0").read_text()
    for rank, (theirs, their_gradients, their_buffers, own, whole) in enumerate(found):
        assert theirs == pytest.approx(loss, rel=1e-6) and whole
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-6, atol=1e-9)
        for ours, other in zip(buffers, their_buffers, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-7, atol=1e-9)
        views, network = make_twins()
        for buffer, value in zip(network.buffers(), their_buffers, strict=True):
            buffer.copy_(value)
        assert own == pytest.approx(network.eval()(views[0][: rank + 1]).mean().item())


def _average_gradient():
    def work():
        weight = torch.tensor([1.0, 2.0], requires_grad=True)
        batches = Batches(7, 7, torch.Generator().manual_seed(0), shared=True)
        index = batches.next()
        loss = distributed.backward(
            (weight[0] * index.float() ** 2 + weight[1]).mean(), [weight], batches.loss_weight
        )
        start = torch.full((2, 2), float(distributed.rank())).t()
        distributed.broadcast([start])
        top = distributed.all_reduce_max(10 - distributed.rank())
        return index.tolist(), loss.item(), weight.grad.tolist(), start.tolist(), top

    return run_initialised(work)


def test_uneven_parts_of_a_batch_are_weighted_by_their_size(tmp_path):
    found, codes = run_ranks(3, tmp_path, _average_gradient)
    assert codes == [0] * 3, (tmp_path / "err0").read_text()
    squares = sum(k * k for k in range(7)) / 7
    assert sorted(k for index, *_ in found for k in index) == [*range(7)]
    assert sorted(len(index) for index, *_ in found) == [2, 2, 3]
    for _, loss, gradient, start, top in found:
        assert loss == pytest.approx(squares + 2) and gradient == pytest.approx([squares, 1])
        assert start == [[0, 0], [0, 0]] and top == 10


def test_batch_smaller_than_the_number_of_processes_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    Batches(11, 4, torch.Generator(), drop_last=True, shared=True)
    with pytest.raises(run.UserError, match="3 images is too small for 4"):
        Batches(11, 4, torch.Generator(), shared=True)


def test_random_draws_differ_between_ranks_and_are_reproducible(monkeypatch):
    def draws(rank):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        randomness = Randomness(0, torch.device("cpu"))
        randomness.reseed_for_rank()
        return [torch.rand(3, generator=each) for each in (randomness.device, randomness.cpu)] + [
            torch.rand(3)
        ]

    first, second = draws(0), draws(1)
    assert not torch.equal(first[0], second[0]) and all(map(torch.equal, first[1:], second[1:]))
    assert all(map(torch.equal, draws(1), second))


# Commands


def insert_action(phase, number, action):
    """Call `action()` after `number` steps of `phase`, and write a checkpoint after each step."""
    steps = run.Run.steps
    run.CHECKPOINT_SECONDS, run.CHECKPOINT_SHARE, run.SYNC_SECONDS = 0, 1e9, 0

    def stepping(self, name, total):
        for step in steps(self, name, total):
            if (name, step) == (phase, number):
                action()
            yield step

    run.Run.steps = stepping


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def run_main(main, words, event=None, of_rank=None):
    """Run a command in this process and return digests of the set that it computes.

    `event` = (phase, step, action) happens in rank `of_rank`.
    """
    digests = []
    finish = run.Run.finish

    def finishing(self, kind, content):
        if kind == "distilled":
            digests.append(hashlib.sha256(content["images"].numpy().tobytes()).hexdigest())
            digests.append(hashlib.sha256(content["targets"].numpy().tobytes()).hexdigest())
        try:
            finish(self, kind, content)
        except SystemExit as end:
            assert end.code == 0 and not distributed.is_main_process()

    run.Run.finish = finishing
    if event:
        insert_action(*event[:2], event[2] if distributed.rank() == of_rank else lambda: None)
    cli.run(main, [*map(str, words)])
    return digests


def read_outputs(folder, count):
    return [
        (folder / f"{name}{rank}").read_text() for name in ("out", "err") for rank in range(count)
    ]


DISTIL = [
    "--source",
    "digits",
    *DISTILL,
    "--outer-steps",
    "20",
    "--pool-steps",
    "5",
    "--log-every",
    "1",
]


@pytest.fixture
def home(runs, tmp_path):
    """Copy the toy target network to a new run root."""
    target = tmp_path / "runs" / "digits" / "target" / "seed0"
    target.mkdir(parents=True)
    for name in ("target.pt", "config.json"):
        (target / name).write_bytes((runs / "target" / "seed0" / name).read_bytes())
    return tmp_path / "runs"


def test_ranks_compute_equal_sets_and_a_killed_run_resumes_to_the_same_set(
    home, data_root, tmp_path
):
    words = [*DISTIL, "--data-root", data_root, "--run-root"]
    found, codes = run_ranks(2, tmp_path / "a", run_main, distill.main, [*words, home])
    assert codes == [0, 0], read_outputs(tmp_path / "a", 2)
    assert len(found[0]) == 2 and found[0] == found[1]
    whole = home / "digits" / "krr_st" / "seed0"
    log = [line for line in run.read_log(whole) if line["phase"] == "distil"]
    assert [line["step"] for line in log] == [*range(1, 21)]  # written by one process
    out, other_out, err, other_err = read_outputs(tmp_path / "a", 2)
    assert "wrote" in out and "distil" in err and not other_out and not other_err
    expected = files.load(whole / "distilled.pt", "distilled")
    assert expected["meta"]["deviations"]["ranks"] == [2, 1]
    assert expected["meta"]["settings"]["ranks"] == 2
    alone = tmp_path / "alone"
    (alone / "digits").mkdir(parents=True)
    (alone / "digits" / "target").symlink_to(home / "digits" / "target")
    for which, event in (
        (0, ("initialise pool", 1, kill)),
        (1, ("distil", 7, kill)),
        (1, ("distil", 12, stop)),
    ):
        found, codes = run_ranks(
            2, tmp_path / "b", run_main, distill.main, [*words, alone], event, which
        )
        text = read_outputs(tmp_path / "b", 2)
        if event[2] is kill:
            assert codes[which] == -signal.SIGKILL and codes[1 - which] == 2
            assert "another process of this job cannot be reached" in text[3 - which], text
        else:
            assert (
                codes == [130, 130]
                and "stopped after step 13 of 20 (distil)" in text[2]
                and not text[3]
            )
    assert "ranks: 2 stored, 1 now" in run_command("distill.py", *words, alone, check=False).stderr
    found, codes = run_ranks(2, tmp_path / "c", run_main, distill.main, [*words, alone])
    assert codes == [0, 0] and found[0] == found[1]
    resumed = files.load(alone / "digits" / "krr_st" / "seed0" / "distilled.pt", "distilled")
    for name in ("images", "targets"):
        assert torch.equal(resumed[name], expected[name])
    assert resumed["meta"] == expected["meta"]


def _record_steps(words):
    """Run distill.py; return the inputs and gradients of each step, and the number of other
    exchanges."""
    seen, outer_loss, average, most, talks = (
        [],
        distill.STEP.loss,
        distributed.all_reduce_mean,
        distributed.all_reduce_max,
        [],
    )
    run.SYNC_SECONDS = 1e9

    def recording(member, x_real, y_real, x_syn, y_syn, args, fallbacks=None):
        tensors = [each.detach().clone() for each in (x_real, y_real, x_syn, y_syn)]
        weights = {name: value.clone() for name, value in member.network.state_dict().items()}
        seen.append([weights, tensors])
        return outer_loss(member, x_real, y_real, x_syn, y_syn, args)

    def averaging(tensors):
        average(tensors)
        if len(tensors) == 3:
            seen[-1].append([each.clone() for each in tensors])

    def talking(value):
        talks.append(value)
        return most(value)

    distill.STEP = distill.STEP._replace(loss=recording)
    distributed.all_reduce_mean, distributed.all_reduce_max = averaging, talking
    run_main(distill.main, words)
    return [each for each in seen if len(each) == 3], len(talks)


def test_gradient_is_the_mean_over_ranks_with_own_members_and_batches(home, data_root, tmp_path):
    words = [*DISTIL, "--pool-size", "4", "--outer-steps", "6", "--steps-equal-samples"]
    words += ["--data-root", data_root, "--run-root", home]
    found, codes = run_ranks(2, tmp_path / "a", _record_steps, words)
    assert codes == [0, 0], read_outputs(tmp_path / "a", 2)
    found, talks = zip(*found, strict=True)
    assert talks == (
        5,
        5,
    )  # length of the pool training, then first and last step of both loops
    assert len(found[0]) == len(found[1]) == 3  # as many samples as 6 steps of one process
    args = SimpleNamespace(ridge=1e-6, ridge_per_image=False, bias_column=True, chunk=0)
    for one, two in zip(*found, strict=True):
        assert not torch.equal(one[1][0], two[1][0]) and all(
            map(torch.equal, one[1][2:], two[1][2:])
        )
        assert not torch.equal(one[0]["fc.weight"], two[0]["fc.weight"])
        single = []
        for weights, (x_real, y_real, x_syn, y_syn), _ in (one, two):
            member = Member("convnet3", 32, y_syn.shape[1], 0.125, torch.device("cpu"), 0.1, 1e-3)
            member.network.load_state_dict(weights)
            x, y = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
            loss = distill.outer_loss(member, x_real, y_real, x, y, args)
            loss.backward(inputs=[x, y])
            single.append([x.grad, y.grad, loss.detach()])
        for ours, a, b in zip(one[2], *single, strict=True):
            torch.testing.assert_close(
                ours, (a + b) / 2, rtol=1e-3, atol=1e-3 * float(ours.abs().max())
            )
        assert all(map(torch.equal, one[2], two[2]))


def test_pretraining_in_two_processes_equals_one_and_resumes_with_another_number(
    distilled, data_root, tmp_path
):
    words = [
        "--epochs",
        "4",
        "--width",
        "0.125",
        "--batch-size",
        "7",
        "--lr",
        "1e-3",
        "--no-augment",
        "--distilled",
    ]
    places = {}
    for name in ("one", "two", "mixed"):
        places[name] = tmp_path / name / "distilled.pt"
        places[name].parent.mkdir()
        places[name].write_bytes(distilled.read_bytes())
    pretrain.main([*words, str(places["one"])])
    _, codes = run_ranks(2, tmp_path / "a", run_main, pretrain.main, [*words, places["two"]])
    assert codes == [0, 0], read_outputs(tmp_path / "a", 2)
    event = ("pre-train", 5, stop)
    _, codes = run_ranks(
        2, tmp_path / "b", run_main, pretrain.main, [*words, places["mixed"]], event, 0
    )
    assert codes == [130, 130]
    _, codes = run_ranks(
        3,
        tmp_path / "c",
        run_main,
        pretrain.main,
        [*words, places["mixed"]],
        ("pre-train", 9, stop),
        2,
    )
    assert codes == [130] * 3, read_outputs(tmp_path / "c", 3)
    pretrain.main([*words, str(places["mixed"])])
    model = "convnet3-x0.125/seed0/model.pt"
    one, *others = (
        files.load(place.parent / model, "model")["network"] for place in places.values()
    )
    for other in others:
        assert not torch.equal(one["fc.weight"], torch.zeros_like(one["fc.weight"]))
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_other_stages_write_their_result_once(weights, distilled, data_root, tmp_path):
    roots = ["--data-root", data_root, "--run-root", tmp_path]
    (tmp_path / "model.pt").write_bytes(weights.read_bytes())
    teacher = tmp_path / "scratch/convnet3-x0.125_32px/digits_full_seed0/model.pt"
    for number, (main, words) in enumerate(
        (
            (pretrain_target.main, ["--source", "digits", *TARGET]),
            (
                finetune.main,
                ["--weights", "none", "--width", "0.125", "--dataset", "digits", "--steps", "2"],
            ),
            (
                kd.main,
                [
                    "--weights",
                    tmp_path / "model.pt",
                    "--distilled",
                    distilled,
                    "--dataset",
                    "digits",
                    "--teacher",
                    teacher,
                    "--epochs",
                    "2",
                ],
            ),
            (
                kd.main,
                [
                    "--weights",
                    tmp_path / "model.pt",
                    "--distilled",
                    distilled,
                    "--dataset",
                    "digits",
                    "--teacher",
                    teacher,
                    "--epochs",
                    "2",
                ],
            ),
        )
    ):
        _, codes = run_ranks(2, tmp_path / str(number), run_main, main, [*words, *roots])
        assert codes == [0, 0], read_outputs(tmp_path / str(number), 2)
    assert "already in results.jsonl" in (tmp_path / "3" / "out0").read_text()
    assert files.load(tmp_path / "digits/target/seed0/target.pt", "target")["quality"]["knn"] > 20
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert len((teacher.parent.parent / "results.jsonl").read_text().splitlines()) == 1


def test_torchrun_with_one_process_equals_a_run_without_it(home, data_root, distilled, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    words = [
        "distill.py",
        "--source",
        "digits",
        *DISTILL,
        "--data-root",
        str(data_root),
        "--run-root",
        str(home),
    ]
    done = subprocess.run(
        [*launch, "1", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    alone, ordinary = (
        load_distilled(home / "digits" / "krr_st" / "seed0" / "distilled.pt"),
        load_distilled(distilled),
    )
    assert torch.equal(alone.images, ordinary.images) and torch.equal(
        alone.targets, ordinary.targets
    )
    assert {**alone.meta, "settings": 0} == {**ordinary.meta, "settings": 0}
    words += ["--pool-size", "3", "--name", "x"]
    done = subprocess.run(
        [*launch, "2", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode != 0
        and "--pool-size 3: must be a multiple of the number of processes, 2" in done.stderr
    )


def test_bad_command_line_is_reported_once_and_other_commands_exit_with_an_error(
    monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as end:
            cli.run(distill.main, ["--no-such-flag"])
        assert end.value.code == 2 and (
            "unrecognized arguments: --no-such-flag" in capsys.readouterr().err
        ) == (not rank)
    for main, words in (
        (distillers.main, ["dm", "--source", "digits"]),
        (finetune.main, ["--weights", "none", "--dataset", "digits", "--protocol", "knn"]),
    ):
        with pytest.raises(SystemExit):
            cli.run(main, words)
        assert "(rank 1): error: runs in one process, not under torchrun" in capsys.readouterr().err


def test_first_rank_shows_progress_bar_unless_disabled():
    code = "from utils import progress; list(progress.progress_bar(range(3), desc='steps'))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | more,
            capture_output=True,
            text=True,
        ).stderr
        for more in ({}, {"TQDM_DISABLE": "1"}, {"RANK": "1", "WORLD_SIZE": "2"})
    ]
    assert "steps: 100%" in shown[0] and shown[1:] == ["", ""]
