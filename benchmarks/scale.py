"""A step of distillation on a source of ImageNet's true size: memory of its own and time, beside smaller sources.

    python -m benchmarks.scale
    python -m benchmarks.scale --images 10000 1281167 --width 1.0 --steps 6

Makes sparse files (all pixels zero, which take no room on disk) of 64-pixel images and of their 512-d target features
in a temporary folder, and runs distill.py's own loop on each in a process of its own, with the ImageNet preset's m and
b, networks at --width, and 2 pool members. Prints a Markdown table: median seconds a step, and the largest resident
memory that no file backs (RssAnon), that is beside page cache. Linux only.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

import distill
from data.images import ImageSet
from distillers import method
from utils import cli, progress
from utils.run import Run

SIZE, FEATURES = 64, 512


class MadeTarget:
    """Stands in for a target network: its features of the source are a file, of anything else zeros."""

    def __init__(self, table):
        self.table = table

    def features(self, x):
        return torch.zeros(len(x), FEATURES)

    def features_of(self, images):
        return self.table


def sparse(path, shape, dtype):
    """A tensor of zeros mapped from a sparse .npy file."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def own_memory():
    """Bytes of resident memory that no file backs."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("RssAnon"))


def measure(n, width, steps):
    """Run `steps` steps on n images; returns a dict: seconds a step (median), gigabytes before and at most."""
    most, done = 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.02):
            most = max(most, own_memory())

    with tempfile.TemporaryDirectory() as folder:
        args = method.parse_args(distill.METHOD, [
            "--preset", "imagenet", "--width", str(width), "--outer-steps", str(steps), "--log-every", "1",
            "--pool-size", "2", "--pool-steps", "30",
        ])  # fmt: skip
        pixels = sparse(Path(folder, "pixels.npy"), (n, SIZE, SIZE, 3), np.uint8)
        target = MadeTarget(sparse(Path(folder, "features.npy"), (n, FEATURES), np.float32))
        source = ImageSet("made", pixels, None, [], torch.full((3,), 0.5), torch.full((3,), 0.25), "made")
        run = Run(Path(folder, "run"), "distilled.pt", {}, log_every=1)
        before = own_memory()
        threading.Thread(target=watch, daemon=True).start()
        chosen = distill.random_subset(source, args.num_images, 0)
        distill.distill(source, chosen, target, args, run, torch.device("cpu"))
        done.set()
        log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in log if line["phase"] == "distil"]
    return {
        "images": n,
        "seconds": statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "before": before / 2**30,
        "most": most / 2**30,
    }


def main(argv):
    args = parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.width, args.steps)))
        return
    print(f"width {args.width:g}, {args.steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| images | pixels + features on disk, GiB | seconds a step (median) | own memory at most, GiB |")
    print("|---:|---:|---:|---:|", flush=True)
    for n in progress.bar(args.images):
        words = [sys.executable, "-m", "benchmarks.scale", "--one", str(n), "--width", str(args.width),
                 "--steps", str(args.steps)]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        line = json.loads(done.stdout.splitlines()[-1])
        disk = n * (SIZE * SIZE * 3 + FEATURES * 4) / 2**30
        print(f"| {n:,} | {disk:.1f} | {line['seconds']:.2f} | {line['most']:.2f} |", flush=True)


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.prog = "python -m benchmarks.scale"
    parser.add_argument("--images", type=cli.positive_int, nargs="+", default=[10_000, 100_000, 1_281_167])
    parser.add_argument("--width", type=cli.amount, default=0.25, help="of the networks (default: 0.25)")
    parser.add_argument("--steps", type=cli.positive_int, default=10)
    parser.add_argument("--one", type=int, help="measure one source in this process")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
