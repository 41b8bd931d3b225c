"""Measure the speed of an outer step of distill.py against the reference step.

    python -m benchmarks.speed                          # CIFAR-100's setting
    python -m benchmarks.speed --preset tinyimagenet --device cuda
    python -m benchmarks.speed --collect                # add the result to benchmarks/speed.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.speed     # several processes (parallel.py)

distill.py's step and the plain step of distillers/reference.py, in float32, are timed in turn. Each
runs in its own process, because the handling of freed memory per process is part of the difference
(utils/allocator.py). Before each timing, the process takes untimed steps, so that its memory is in
place and a GPU's clocks have risen; afterwards it releases the memory (timing.py). On a GPU, at
least 20 steps are timed between two events. Quote the ratio of the two, because the speed of a
shared machine varies. The loss and gradients of both are compared with the plain step in float64.

With each pair, the limit of the device is measured: the best rate of a matrix product or of a
convolution in the precision of the fast step, whichever is higher. FLOP are counted by PyTorch.
Images are noise (step.py). Prints the time of each part, the share of the limit, and the ratio, as
Markdown.
"""

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import distill
import models
from benchmarks import parallel
from benchmarks.step import SETTINGS, make_step, time_parts, without_values
from benchmarks.timing import (
    count_flop,
    find_limit,
    format_median,
    machine_name,
    peak_memory,
    peak_rates,
    time_call,
)
from distillers import method
from utils import cli, distributed, files, progress
from utils.allocator import keep_freed_memory
from utils.device import select_device

RESULTS = Path(__file__).with_name("speed.jsonl")
KEY = ("preset", *SETTINGS, "machine", "ranks")
LENGTHS = ("outer_steps", "pool_size", "pool_steps")  # from which the time of a run follows
CHECKED = 200  # most distilled and real images in the comparison with float64


def relative_errors(args, device):
    """Return the relative errors {"ours": {loss and gradients: error}, "plain": ...} in float32.

    The truth is the plain step in float64, with at most `CHECKED` distilled and real images.
    """
    few = vars(args) | {
        name: min(getattr(args, name), CHECKED) for name in ("num_images", "outer_batch")
    }
    named = {
        name: make_step(name != "ours", argparse.Namespace(**few), device)
        for name in ("ours", "plain", "exact")
    }
    (x_real, y_real), found = named["plain"].batch(), {}
    for name, step in named.items():
        step.member.network.load_state_dict(named["ours"].member.network.state_dict())
        kind = torch.float64 if name == "exact" else torch.float32
        step.member.network.to(kind)
        step.x_syn, step.y_syn = (
            t.detach().to(kind).requires_grad_() for t in (step.x_syn, step.y_syn)
        )
        loss = step.loss(x_real.to(kind), y_real.to(kind))
        loss.backward(inputs=[step.x_syn, step.y_syn])
        found[name] = [each.detach().double() for each in (loss, step.x_syn.grad, step.y_syn.grad)]
    names = ("loss", "gradient of X_s", "gradient of Y_s")
    return {
        which: {
            name: float((a - b).norm() / b.norm())
            for name, a, b in zip(names, found[which], found["exact"], strict=True)
        }
        for which in ("ours", "plain")
    }


class Worker:
    """A process with one step, the fast or the plain one.

    Args:
        plain: whether it is the plain step.
        args: parsed flags.
    """

    def __init__(self, plain, args):
        if plain:
            args = argparse.Namespace(**vars(args) | dict(precision="fp32"))
        self.executor = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _Step.start, (plain, args)
        )

    def __call__(self, name):
        """Return the result of a method of `_Step`."""
        return self.executor.submit(getattr(_Step, name)).result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.executor.shutdown()


class _Step:
    """The step of the current process, which a `Worker` started."""

    @classmethod
    def start(cls, plain, args):
        cls.device = select_device(args)
        cls.keep = not plain and cls.device.type == "cpu"
        cls.step = make_step(plain, args, cls.device)

    @classmethod
    def time(cls):
        """Return the seconds of a step, the number of timed steps, and the peak memory in GiB."""
        keep_freed_memory(cls.keep)
        seconds, steps = time_call(cls.step, cls.device)
        memory = peak_memory(cls.device)
        cls.release()
        return dict(seconds=seconds, steps=steps, memory=memory)

    @classmethod
    def release(cls):
        """Return freed memory to the system."""
        keep_freed_memory(False)
        if cls.device.type == "cuda":
            torch.cuda.empty_cache()

    @classmethod
    def peak(cls):
        return peak_rates(cls.device, cls.step.args.precision)

    @classmethod
    def parts(cls):
        keep_freed_memory(cls.keep)
        return time_parts(cls.step)

    @classmethod
    def flop(cls):
        return count_flop(without_values(cls.step))

    @classmethod
    def errors(cls):
        return relative_errors(cls.step.args, cls.device)


def measure(args, device):
    """Return the measurements as a dict of plain values for `format_result`."""
    with Worker(False, args) as fast, Worker(True, args) as plain:
        rounds = [
            dict(ours=fast("time"), peak=fast("peak"), plain=plain("time"))
            for _ in progress.progress_bar(range(args.pairs), desc="pairs")
        ]
        return dict(
            preset=args.preset,
            **{name: getattr(args, name) for name in (*SETTINGS, *LENGTHS)},
            machine=machine_name(device),
            ranks=1,
            torch=str(torch.__version__),
            rounds=rounds,
            flop=fast("flop"),
            plain_flop=plain("flop"),
            parts=fast("parts"),
            errors=fast("errors") if args.precision == "fp32" else {},
        )


def format_result(result):
    """Format the result of `measure` as Markdown."""
    rounds, precision = result["rounds"], result["precision"]
    most = statistics.median(find_limit(each["peak"]) for each in rounds)
    rates = (
        f"{name} {statistics.median(each['peak'][name] for each in rounds) / 1e9:,.0f}"
        for name in rounds[0]["peak"]
    )
    times = {name: [each[name]["seconds"] for each in rounds] for name in ("ours", "plain")}
    ours = statistics.median(times["ours"])
    unit, factor = ("s", 1) if ours > 0.5 else ("ms", 1e3)
    texts = {name: format_median(factor * each for each in took) for name, took in times.items()}
    counts = {
        name: " or ".join(map(str, sorted({each[name]["steps"] for each in rounds})))
        for name in times
    }
    share = format_median(
        (
            100 * result["flop"] / each["ours"]["seconds"] / find_limit(each["peak"])
            for each in rounds
        ),
        0,
    )
    ratio = format_median(each["plain"]["seconds"] / each["ours"]["seconds"] for each in rounds)
    memory = {name: rounds[0][name]["memory"] for name in times}
    rows = [
        f"| {name} | {1e3 * took:,.1f} | {operations / 1e9:,.1f} | {operations / took / 1e9:,.0f} "
        f"| {operations / took / most:.0%} |"
        for name, (took, operations) in result["parts"].items()
    ]
    network = models.label(result["arch"], result["width"])
    setting = f"m = {result['num_images']:,}, b = {result['outer_batch']:,}, "
    setting += f"{result['image_size']} px, {network}"
    setting += f", --chunk {result['chunk']}" if result["chunk"] else ""
    setting += ", --compile off" if result["compile"] == "off" else ""
    where = f"{precision} on {result['machine']}, torch {result['torch']}"
    first = result["pool_size"] * result["pool_steps"] / 2
    pool = result["parts"]["training step of the pool member"][0]
    lines = [
        f"Preset {result['preset']} ({setting}), {where}. Pairs: {len(rounds)}; times are the mean "
        f"of {counts['ours']} fast steps and of {counts['plain']} plain steps. Values are medians, "
        "with the range.",
        "",
        "| part of the step | ms | GFLOP | GFLOP/s | of the limit |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        f"- {result['preset']}, {where}, n = {len(rounds)} pairs: **{ratio} times as fast as the "
        f"plain step in fp32**, {share} % of the limit",
        f"- fast step: {texts['ours']} {unit}, {result['flop'] / 1e12:.2f} TFLOP, "
        f"{memory['ours']:.2f} GiB; plain step: {texts['plain']} {unit}, "
        f"{result['plain_flop'] / 1e12:.2f} TFLOP, {memory['plain']:.2f} GiB",
        f"- limit in {precision}: {most / 1e9:,.0f} GFLOP/s, the median over the pairs of the "
        f"higher rate (medians: {', '.join(rates)})",
        f"- at this speed, {result['outer_steps']:,} steps take "
        f"{result['outer_steps'] * ours / 3600:,.1f} hours, after "
        f"{first * pool / 3600:,.1f} hours for initialising the pool (about {first:,.0f} training "
        "steps)",
    ]
    for which, named in result["errors"].items():
        name = {"ours": "the fast step", "plain": "the plain step"}[which]
        lines.append(
            f"- relative error of {name} against float64: "
            + ", ".join(f"{name} {value:.0e}" for name, value in named.items())
        )
    return "\n".join(lines)


def read_results():
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    )


def collected_tables():
    """Return the tables of all results in `RESULTS` as {name: Markdown}."""
    alone, several = (
        "\n\n".join(show(each) for each in read_results() if (each["ranks"] > 1) == of_several)
        for show, of_several in ((format_result, False), (parallel.format_result, True))
    )
    return {
        name: text or "No results yet." for name, text in (("speed", alone), ("parallel", several))
    }


def key(result):
    """Return the key of a result; results of the same experiment have the same key."""
    return [str(result.get(name)) for name in KEY]


def main(argv):
    args, collect = parse_args(argv)
    device = select_device(args, multi_process=True)
    several = distributed.world_size() > 1
    result = json.loads(json.dumps((parallel.measure if several else measure)(args, device)))
    print((parallel.format_result if several else format_result)(result))
    if collect and distributed.is_main_process():
        kept = [each for each in read_results() if key(each) != key(result)] + [result]
        files.write_text(
            RESULTS, "".join(json.dumps(each) + "\n" for each in sorted(kept, key=key))
        )


def parse_args(argv):
    """Parse the flags of distill.py and of this benchmark."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--preset", default="cifar100", help="preset to time (default: cifar100)")
    parser.add_argument(
        "--pairs", type=cli.positive_int, default=3, help="number of timed pairs (default: 3)"
    )
    parser.add_argument(
        "--collect", action="store_true", help=f"store the result in benchmarks/{RESULTS.name}"
    )
    mine, others = parser.parse_known_args(argv)
    args = method.parse_args(distill.METHOD, ["--preset", mine.preset, *others])
    args.pairs = mine.pairs
    return args, mine.collect


if __name__ == "__main__":
    cli.run(main)
