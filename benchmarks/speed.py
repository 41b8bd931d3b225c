"""Measure the speed of an outer step of distill.py against the reference step.

    python -m benchmarks.speed                          # CIFAR-100's setting
    python -m benchmarks.speed --preset tinyimagenet --device cuda
    python -m benchmarks.speed --collect                # add the result to benchmarks/speed.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.speed     # several processes (parallel.py)

distill.py's step and the reference step of distillers/reference.py are timed alternately. Each runs
in its own process, because the handling of freed memory per process is part of the difference
(utils/allocator.py). Quote the ratio of the two, because the speed of a shared machine varies. The
loss and gradients of both are compared with the reference step in float64.

With each pair, the peak of the machine is measured: the best rate of square matrix products, and
the rate of a 3x3 convolution. FLOP are counted by PyTorch. Images are noise (step.py). Prints the
time of each part, the fraction of the peak, and the ratio, as Markdown.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import distill
import models
from benchmarks import parallel
from benchmarks.step import (
    Step,
    count_flop,
    format_median,
    machine_name,
    make_inputs,
    num_source_images,
    peak_memory,
    time_call,
    time_parts,
)
from distillers import method
from utils import cli, distributed, files, progress
from utils.allocator import keep_freed_memory
from utils.device import select_device

RESULTS = Path(__file__).with_name("speed.jsonl")
PEAK_SIZES = (1024, 2048, 4096)
KEY = (
    "preset",
    "arch",
    "width",
    "image_size",
    "num_images",
    "outer_batch",
    "precision",
    "chunk",
    "machine",
    "ranks",
)
CHECKED = 200  # most distilled and real images in the comparison with float64


def peak_rates(device, dtype=torch.float32):
    """Return the best rates in FLOP/s as {"matmul": ..., "convolution": ...}.

    They are those of square products, and of a convolution from 256 to 512 channels on 8 x 8 maps.
    """
    rates = {"matmul": 0.0, "convolution": 0.0}
    enough = 0.2 if device.type == "cpu" else 0.02
    layout = dict(memory_format=torch.channels_last)
    x = torch.randn(512, 256, 8, 8, device=device, dtype=dtype).contiguous(**layout)
    w = torch.randn(512, 256, 3, 3, device=device, dtype=dtype).contiguous(**layout)
    trials = [("convolution", lambda: F.conv2d(x, w, padding=1), 2 * x.numel() * w[:, 0].numel())]
    for n in PEAK_SIZES:
        a = torch.randn(n, n, device=device, dtype=dtype)
        trials.append(("matmul", lambda a=a: a @ a, 2 * n**3))
    with torch.no_grad():
        for name, product, operations in trials:
            once, _ = min(time_call(product, device) for _ in range(2))
            times = max(1, round(enough / once))
            took, _ = time_call(
                lambda product=product, times=times: [product() for _ in range(times)], device
            )
            rates[name] = max(rates[name], operations * times / took)
    return rates


def relative_errors(args, source, target, device):
    """Return the relative errors {"ours": {loss and gradients: error}, "plain": ...} in float32.

    The reference is the plain step in float64, with at most `CHECKED` distilled and real images.
    """
    few = vars(args) | {
        name: min(getattr(args, name), CHECKED) for name in ("num_images", "outer_batch")
    }
    named = {
        name: Step(name != "ours", source, target, argparse.Namespace(**few), device)
        for name in ("ours", "plain", "exact")
    }
    x_real, _ = named["plain"].batch()
    y_real, found = target.features(x_real), {}
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


class ReferenceProcess:
    """The reference step, in the process that `measure` starts."""

    step = None

    @classmethod
    def start(cls, args, folder):
        device = select_device(args)
        keep_freed_memory(False)
        cls.step = Step(
            True, *make_inputs(args, num_source_images(args), device, folder), args, device
        )

    @classmethod
    def count_flop(cls):
        return count_flop(cls.step)

    @classmethod
    def time_call(cls):
        return time_call(cls.step, cls.step.device)[0]


@contextlib.contextmanager
def keeping_freed_memory(device):
    """Handle freed memory as distill.py does on this device; release all of it at the end."""
    keep_freed_memory(device.type == "cpu")
    yield
    keep_freed_memory(False)


def measure(args, device):
    """Return the measurements as a dict of plain values for `markdown`."""
    precisely = argparse.Namespace(**vars(args) | dict(precision="fp32"))
    with tempfile.TemporaryDirectory() as folder:
        source, target = make_inputs(args, num_source_images(args), device, Path(folder))
        ours = Step(False, source, target, args, device)
        keep_freed_memory(
            False
        )  # counting needs more memory than a step, and two processes may exceed it
        operations = count_flop(ours)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with keeping_freed_memory(device):
            ours()
            used = peak_memory(device)
            pieces = time_parts(ours)
            wrong = (
                relative_errors(args, source, target, device) if args.precision == "fp32" else {}
            )
        rounds = []
        with ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=ReferenceProcess.start,
            initargs=(precisely, Path(folder)),
        ) as other:
            plain_operations = other.submit(ReferenceProcess.count_flop).result()
            for _ in progress.bar(range(args.pairs), desc="pairs"):
                with keeping_freed_memory(device):
                    rates = {"float32": peak_rates(device)}
                    if args.precision == "bf16":
                        rates["bfloat16"] = peak_rates(device, torch.bfloat16)
                    took, _ = time_call(ours, device)
                rounds.append(
                    dict(
                        ours=took,
                        plain=other.submit(ReferenceProcess.time_call).result(),
                        peak=rates,
                    )
                )
    names = (
        "arch",
        "width",
        "image_size",
        "num_images",
        "outer_batch",
        "precision",
        "chunk",
        "outer_steps",
        "pool_size",
        "pool_steps",
    )
    return dict(
        preset=args.preset,
        **{name: getattr(args, name) for name in names},
        machine=machine_name(device),
        ranks=1,
        torch=str(torch.__version__),
        parts=pieces,
        memory_gib=used,
        errors=wrong,
        rounds=rounds,
        flop=operations,
        plain_flop=plain_operations,
    )


def markdown(result):
    """Format the result of `measure` as Markdown."""
    kind = "bfloat16" if result["precision"] == "bf16" else "float32"
    rounds = result["rounds"]
    product, convolution = (
        statistics.median(r["peak"][kind][name] for r in rounds)
        for name in ("matmul", "convolution")
    )
    ours, plain = (statistics.median(r[name] for r in rounds) for name in ("ours", "plain"))
    share, of_convolution = (
        format_median(100 * result["flop"] / r["ours"] / r["peak"][kind][name] for r in rounds)
        for name in ("matmul", "convolution")
    )
    rows = [
        f"| {name} | {1e3 * took:,.1f} | {operations / 1e9:,.1f} | {operations / took / 1e9:,.0f} "
        f"| {operations / took / product:.0%} |"
        for name, (took, operations) in result["parts"].items()
    ]
    network = models.label(result["arch"], result["width"])
    setting = f"m = {result['num_images']:,}, b = {result['outer_batch']:,}, "
    setting += f"{result['image_size']} px, {network}"
    setting += f", {result['precision']}" + (
        f", --chunk {result['chunk']}" if result["chunk"] else ""
    )
    lines = [
        f"Preset {result['preset']} ({setting}) on {result['machine']}, torch {result['torch']}.",
        "",
        "| part of the step | ms | GFLOP | GFLOP/s | of the matrix product peak |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        f"Whole step: {ours:.3g} s, {1 / ours:.3g} steps/s, {result['flop'] / 1e12:.2f} TFLOP, "
        f"{share} % of the matrix product peak, {of_convolution} % of the convolution peak. "
        f"Reference step: {plain:.3g} s, {result['plain_flop'] / 1e12:.2f} TFLOP. "
        f"**{format_median(r['plain'] / r['ours'] for r in rounds)} times as fast** "
        f"(median, minimum and maximum of {len(rounds)} pairs). Peak: matrix products "
        f"{product / 1e9:,.0f} GFLOP/s, "
        f"convolution {convolution / 1e9:,.0f}. Memory: {result['memory_gib']:.2f} GiB.",
    ]
    first = result["pool_size"] * result["pool_steps"] / 2
    pool = result["parts"]["training step of the pool member"][0]
    lines[-1] += (
        f" At this speed, {result['outer_steps']:,} steps take "
        f"{result['outer_steps'] * ours / 3600:,.1f} hours, after "
        f"{first * pool / 3600:,.1f} hours for initialising the pool (about {first:,.0f} training "
        "steps)."
    )
    for which, named in result["errors"].items():
        name = {"ours": "distill.py", "plain": "the reference step"}[which]
        lines[-1] += f" Relative error of {name} against float64: "
        lines[-1] += ", ".join(f"{name} {value:.0e}" for name, value in named.items()) + "."
    return "\n".join(lines)


def read_results():
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    )


def collected_tables():
    """Return the tables of all results in `RESULTS` as {name: Markdown}."""
    alone, several = (
        "\n\n".join(show(each) for each in read_results() if (each["ranks"] > 1) == of_several)
        for show, of_several in ((markdown, False), (parallel.markdown, True))
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
    print((parallel.markdown if several else markdown)(result))
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
        "--pairs", type=cli.positive_int, default=5, help="number of timed pairs (default: 5)"
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
