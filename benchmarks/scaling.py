"""Measure how an outer step of distill.py scales with m, b, the image size and the source.

    python -m benchmarks.scaling                             # prints Markdown
    python -m benchmarks.scaling --collect --out scaling.png  # also stores and draws the results

Reports time, memory and the most expensive part of a step. One quantity at a time is varied from
CIFAR-100's setting. Each setting runs in its own process. --width is the width of the networks
(default 0.25, for a CPU). Time is the sum of the parts of the step (benchmarks/step.py). Memory is
the peak of anonymous resident memory, or the peak GPU memory. Sources larger than half a gigabyte
are sparse files of zeros, so that ImageNet's number of images fits on any disk. Linux only.
"""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import torch

from benchmarks import speed
from benchmarks.step import Step, make_inputs, time_parts
from benchmarks.timing import machine_name, peak_memory
from models import label
from utils import cli, files, progress
from utils.device import add_device_flags, resolve_precision, select_device
from utils.plots import COLOURS, DASHES, label_axis, make_panels, save_figure

RESULTS = Path(__file__).with_name("scaling.jsonl")
BASE = dict(num_images=1000, outer_batch=1024, image_size=32, source=10_000, chunk=0)
AXES = dict(
    num_images=(100, 300, 1000, 3000, 10_000),
    outer_batch=(256, 1024, 4096),
    image_size=(32, 64, 96),
    source=(10_000, 100_000, 1_281_167),
    chunk=(0, 400, 100),
)
NAMES = dict(
    num_images="distilled images m",
    outer_batch="real images b",
    image_size="image size in pixels",
    source="images in the source",
    chunk="--chunk",
)


def anonymous_memory():
    """Return the anonymous resident memory in bytes."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))


def shared_flags(args):
    """Return the flags common to all settings, as words of a command line."""
    return ["--width", str(args.width), "--device", args.device, "--precision", args.precision]


def measure(setting, args):
    """Return a result: `setting`, seconds and FLOP of the parts, and memory of a step in GiB."""
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while True:
            most = max(most, anonymous_memory())
            if done.wait(0.01):
                break

    words = shared_flags(args)
    for name in ("num_images", "outer_batch", "image_size", "chunk"):
        words += ["--" + name.replace("_", "-"), str(setting[name])]
    taken, _ = speed.parse_args(words)
    device = select_device(taken)
    source, target = make_inputs(taken, setting["source"], device)
    step = Step(False, source, target, taken, device)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    step()
    done.set()
    watcher.join()
    used = peak_memory(device) if device.type == "cuda" else most / 2**30
    pieces = time_parts(step)
    return setting | dict(
        width=args.width,
        precision=args.precision,
        arch=taken.arch,
        machine=machine_name(device),
        torch=str(torch.__version__),
        memory_gib=used,
        parts=pieces,
    )


def all_settings():
    """Yield (axis, setting) for each row of the tables."""
    for axis, values in AXES.items():
        for value in values:
            yield axis, BASE | {axis: value}


def select_rows(lines, axis):
    """Return the lines that differ from `BASE` in `axis` only, sorted by it."""
    others = {name: value for name, value in BASE.items() if name != axis}
    return sorted(
        (line for line in lines if others.items() <= line.items()), key=lambda line: line[axis]
    )


def summarise(line):
    """Return the seconds of a step, its slowest part, and the fraction of time of that part."""
    total = sum(took for took, _ in line["parts"].values())
    name, (took, _) = max(line["parts"].items(), key=lambda item: item[1][0])
    return total, name, took / total


def format_results(lines):
    """Format the results as a Markdown table of all axes."""
    first = lines[0]
    text = [
        f"{label(first['arch'], first['width'])}, {first['precision']}, {first['machine']}, torch "
        f"{first['torch']}; "
        f"unless stated otherwise, m = {BASE['num_images']:,}, b = {BASE['outer_batch']:,}, "
        f"{BASE['image_size']} px and {BASE['source']:,} images in the source.",
        "",
        "| varied | value | s per step | GiB | slowest part |",
        "|---|---:|---:|---:|---|",
    ]
    for axis in AXES:
        for line in select_rows(lines, axis):
            total, name, share = summarise(line)
            text.append(
                f"| {NAMES[axis]} | {line[axis]:,} | {total:.2f} | {line['memory_gib']:.2f} | "
                f"{name}, {share:.0%} |"
            )
    return "\n".join(text)


def collected_tables():
    """Return the results in `RESULTS` as Markdown."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else ()
    return format_results([json.loads(line) for line in lines]) if lines else "No results yet."


def draw(lines, out):
    """Draw time and memory against each axis, as a PNG file."""
    axes_drawn = [axis for axis in AXES if axis != "chunk"]
    figure, panes = make_panels(len(axes_drawn), most=2)
    numbers = [number for line in lines for number in (summarise(line)[0], line["memory_gib"])]
    low, high = min(numbers) / 1.3, max(numbers) * 1.3  # common to all panels
    ticks = [
        tick for power in range(-3, 5) for tick in (10**power, 3 * 10**power) if low <= tick <= high
    ]
    for pane, axis in zip(panes, axes_drawn, strict=True):
        rows = select_rows(lines, axis)
        x = [line[axis] for line in rows]
        label_axis(pane, x=NAMES[axis], y="seconds, GiB")
        for i, (name, values) in enumerate(
            (
                ("seconds per step", [summarise(line)[0] for line in rows]),
                ("GiB", [line["memory_gib"] for line in rows]),
            )
        ):
            pane.plot(
                x, values, color=COLOURS[4 * i], linestyle=DASHES[i], marker="os"[i], label=name
            )
        pane.set(xscale="log", yscale="log", ylim=(low, high))
        pane.set_xticks(x, [f"{value:,}" for value in x], minor=False)
        pane.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        pane.minorticks_off()
    panes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, out)


def main(argv):
    args = parse_args(argv)
    if args.one:
        print(json.dumps(measure(json.loads(args.one), args)))
        return
    wanted = list({json.dumps(setting): setting for _, setting in all_settings()}.values())
    lines = []
    for setting in progress.progress_bar(wanted, desc="settings"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.scaling",
                "--one",
                json.dumps(setting),
                *shared_flags(args),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode == 0:
            lines.append(json.loads(done.stdout.splitlines()[-1]))
        else:
            print(f"failed with exit code {done.returncode}, left out: {setting}", file=sys.stderr)
    if not lines:
        sys.exit(1)
    print(format_results(lines))
    if args.collect:
        files.write_text(RESULTS, "".join(json.dumps(line) + "\n" for line in lines))
    if args.out:
        draw(lines, args.out)


def parse_args(argv):
    parser = cli.Parser(__doc__)
    add_device_flags(parser)
    parser.add_argument(
        "--width",
        type=cli.non_negative_float,
        default=0.25,
        help="width of the networks (default: 0.25)",
    )
    parser.add_argument(
        "--collect", action="store_true", help=f"store the results in benchmarks/{RESULTS.name}"
    )
    parser.add_argument("--out", type=Path, help="PNG file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
