"""A distillation at full size in pieces of a few minutes.

    python -m benchmarks.distillation --minutes 4              # rerun it to resume
    python -m benchmarks.distillation --source cifar100 --data-root datasets

Runs distill.py with CIFAR-100's preset, after pretrain_target.py if the source has no target yet.
Without --source, the source is a folder of 50,000 synthetic images. After --minutes, the current
run writes a checkpoint and stops. Prints the step that the run has reached and the time of a step.
The exit code is 0 if the distillation has finished, and 130 if the same command must be rerun to
resume. Unknown flags go to distill.py.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.io import write_png

from benchmarks.timing import machine_name
from data.prepare import folder_name
from distillers import low_rank
from models.target import default_path
from utils import cli
from utils.device import add_device_flag, resolve_device
from utils.presets import PRESETS, image_size
from utils.run import read_log

ROOT = Path(__file__).parent.parent
COARSE = 4  # height and width of the random colours that a synthetic image blends


def make_images(folder, count, size):
    """Write `count` synthetic images, PNG files of `size` pixels, to `folder` unless it exists.

    An image is a grid of random colours, enlarged bicubically, plus noise.
    """
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, 1000):
        n = min(1000, count - first)
        colours = torch.rand(n, 3, COARSE, COARSE, generator=generator)
        images = F.interpolate(colours, size, mode="bicubic")
        images += 0.05 * torch.randn(images.shape, generator=generator)
        for i, image in enumerate((255 * images).clamp(0, 255).byte(), first):
            write_png(image, str(partial / f"{i}.png"))
    os.replace(partial, folder)


def run_until(deadline, words):
    """Run `python <words>` and stop it by SIGINT at `deadline` (time.monotonic).

    Returns the exit code.
    """
    if time.monotonic() >= deadline:
        return 130
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    try:
        return process.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return process.wait()


def describe(lines, since):
    """Return the position of a distillation as text, from its log.

    Args:
        lines: lines of the log.
        since: number of lines before this piece.
    """
    lines, piece = (
        [line for line in part if line["phase"] == "distil"] for part in (lines, lines[since:])
    )
    if not lines:
        return "the distillation has not logged a step yet"
    step, total = lines[-1]["step"], lines[-1]["of"]
    text = f"step {step:,} of {total:,}, outer loss {lines[0]['loss']:.4f} at step "
    text += f"{lines[0]['step']:,}, {lines[-1]['loss']:.4f} now"
    if len(piece) < 2:
        return text
    steps, seconds = (piece[-1][name] - piece[0][name] for name in ("step", "seconds"))
    left = (total - step) * seconds / steps / 3600
    return f"{text}; {1e3 * seconds / steps:,.2f} ms a step (n = {steps:,}), {left:,.2f} hours left"


def main(argv):
    args, others = parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    device = torch.device(resolve_device(args.device))
    source = args.source
    if not source:
        source = str(args.run_root / f"synthetic{args.images}-{args.image_size}px")
        make_images(Path(source), args.images, args.image_size)
    shared = ["--source", source, "--preset", args.preset, "--image-size", str(args.image_size)]
    shared += ["--data-root", str(args.data_root), "--run-root", str(args.run_root)]
    shared += ["--device", args.device]
    home = args.run_root / folder_name(source, args.data_root)
    usual = low_rank.NAME if low_rank.is_selected(others) else "krr_st"
    name = cli.peek_flag("name", others, usual)
    code, folder = 0, home / name / f"seed{cli.peek_flag('seed', others, '0')}"
    if not default_path(args.run_root, home.name).is_file():
        epochs = ["--epochs", str(args.target_epochs), "--warmup-epochs", "1"]
        code = run_until(deadline, ["pretrain_target.py", *shared, *epochs])
    since = len(read_log(folder))
    if code == 0:
        code = run_until(deadline, ["distill.py", *shared, *others])
    print(
        f"preset {args.preset}, source {Path(source).name}, {machine_name(device)}, torch "
        f"{torch.__version__}: {describe(read_log(folder), since)}"
    )
    if code == 130:
        print("not finished; rerun the same command to resume")
    sys.exit(code)


def parse_args(argv):
    """Return the parsed flags and the unknown ones."""
    parser = cli.folder_parser(__doc__)
    add_device_flag(parser)
    data, run = parser.groups["data"], parser.groups["run"]
    data.add_argument("--source", help="data set or folder (default: synthetic images)")
    data.add_argument(
        "--images",
        type=cli.positive_int,
        default=50_000,
        metavar="N",
        help="number of synthetic images (default: 50000, as CIFAR-100)",
    )
    parser.groups["method"].add_argument(
        "--preset", choices=[*PRESETS], default="cifar100", help="preset (default: cifar100)"
    )
    parser.groups["method"].add_argument(
        "--target-epochs",
        type=cli.positive_int,
        default=20,
        metavar="N",
        help="passes over the source in training the target (default: 20)",
    )
    run.add_argument(
        "--minutes", type=cli.non_negative_float, default=4, help="length of a piece (default: 4)"
    )
    parser.set_defaults(run_root=Path("runs/gpu"))
    args, others = parser.parse_known_args(argv)
    args.image_size = image_size(args.preset)
    return args, others


if __name__ == "__main__":
    cli.run(main)
