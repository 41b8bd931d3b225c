"""What surrounds every method: its command line, its run folder, and the file it leaves.

A method is a module with a `METHOD`; `distillers/__main__.py` lists them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from data.distilled import Distilled
from data.images import load_images, normalise
from data.subsets import random_subset
from distillers.target import load_target
from utils import cli, files, ranks
from utils.errors import UserError
from utils.presets import differences, preset
from utils.run import Run, versions


@dataclass(frozen=True)
class Method:
    """A way to make a distilled set.

    `name`: of its run folder. `distill(source, chosen, target, args, run, device)` returns a `Distilled`, whose meta
    may hold what it measured, and `initial` where it started from other images than those chosen: `source` is an
    `ImageSet`, `chosen` (m,) the indices of the real images to start from, `target` a `Target` or None, `run` a `Run`
    to train in. `help`: setting -> description, for the flags. `stage`: of its settings in utils/presets.py.
    `choose(source, m, seed)` returns `chosen`. `needs_target`: whether it uses the target network.
    `add_flags(parser)` adds flags that no preset sets. `several`: whether several processes can share it (torchrun).
    """

    name: str
    distill: Callable
    help: dict
    stage: str
    doc: str
    choose: Callable = random_subset
    needs_target: bool = False
    several: bool = False
    add_flags: Callable = lambda parser: None


def main(method, argv):
    """Run `method` as the command line `argv` says; writes distilled.pt and images.png."""
    args = parse_args(method, argv)
    device = cli.device(args, method.several)
    source = load_images(args.source, "train", args.image_size, args.data_root)
    chosen = method.choose(source, args.num_images, args.seed)
    home, target = args.run_root / source.name, None
    facts = dict(source=source.name, fingerprint=source.fingerprint)
    scale = source.part | differences(cli.preset_name(source.name), method.stage, vars(args))
    if method.needs_target:
        target = load_target(args.target or home / "target" / "seed0" / "target.pt", source, device, args.precision)
        facts["target"] = target.digest
        scale |= target.scale
    if method.several:  # another algorithm for each number of processes
        facts["ranks"] = ranks.count()
        scale |= {"ranks": [ranks.count(), 1]} if ranks.count() > 1 else {}
    folder, settings = home / args.name / f"seed{args.seed}", cli.settings(args, **facts)
    run = Run(folder, "distilled.pt", settings, args.log_every, args.tensorboard)
    if run.finished:
        print(f"{run.artefact} is there already")
        return
    result = method.distill(source, chosen, target, args, run, device)
    result.meta |= dict(source=source.name, method=args.name, seed=args.seed, preset=args.preset, scale=scale,
                        settings=run.settings, versions=versions())  # fmt: skip
    initial = result.meta.setdefault("initial", None if chosen is None else chosen.tolist())
    moved = ""
    if initial is not None:
        distance = result.meta["distance_from_initial"] = distance_from(result, source, torch.tensor(initial))
        moved = f"; images moved by {distance:.4f} of the source's standard deviation (root mean square)"
    save_picture(run.folder / "images.png", result)
    run.finish("distilled", result.content())
    print(f"wrote {run.artefact} and images.png{moved}")


def packed(x_syn, targets, target_kind, source, **measured):
    """Images normalised by the source's statistics, with their targets, as a `Distilled` on the CPU."""
    x_syn, targets = x_syn.detach().cpu().contiguous(), targets.detach().cpu()
    return Distilled(x_syn, targets, target_kind, source.mean, source.std, measured)


def distance_from(distilled, source, initial):
    """How far the images of a `Distilled` have moved from the source's at `initial` (m,), which they started from: the
    root mean square over all images, pixels and colours, in units of the source's standard deviations."""
    start = normalise(source.raw(initial, "cpu"), distilled.mean, distilled.std)  # (m, 3, S, S)
    units = (distilled.std / source.std)[:, None, None]  # 1, but for a set that is not normalised (D7)
    return ((distilled.images - start) * units).square().mean().sqrt().item()


def renew_picture(run, args, step, distilled):
    """Every `args.image_every` steps, renew images.png by the `Distilled` that `distilled()` returns."""
    if args.image_every and (step + 1) % args.image_every == 0:
        save_picture(run.folder / "images.png", distilled())


def save_picture(path, distilled, most=100):
    """A grid of the first `most` images as pixels, ten in a row, each enlarged to 64 screen pixels or more."""
    if not ranks.first():
        return
    pixels = distilled.pixels()[:most]
    enlarged = F.interpolate(pixels, scale_factor=-(-64 // pixels.shape[-1]), mode="nearest")
    with files.aside(path) as partial:
        save_image(enlarged, partial, format="png", nrow=10, padding=2, pad_value=1.0)


def parse_args(method, argv):
    parser, name = cli.source_parser(method.doc, argv)
    parser.add_argument("--name", default=method.name, help="of the run's folder and in tables (default: %(default)s)")
    if method.needs_target:
        parser.add_argument("--target", type=Path, help="target.pt (default: that of the source, seed 0)")
    parser.add_argument(
        "--image-every", type=cli.count, default=0, metavar="STEPS", help="renew images.png (0: at the end)"
    )
    cli.add_settings(parser, preset(name, method.stage), dict(num_images="m, images in the set") | method.help)
    method.add_flags(parser)
    args = parser.parse_args(argv)
    check_name("--name", args.name, reserved=("target", "full"))
    return args


def check_name(flag, name, reserved):
    """Raise UserError where `name` is no plain word or one of `reserved`."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name in reserved:
        but = f", and none of {', '.join(reserved)}" if reserved else ""
        raise UserError(f"{flag} {name}: must be a plain word{but}")
