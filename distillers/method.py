"""Code shared by all methods: command line, run folder and output files.

A method is a module with a `METHOD`. distillers/registry.py lists all methods and their
requirements.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import models
from data.distilled import Distilled
from data.images import load_images, normalise
from data.subsets import random_subset
from distillers import registry
from models.target import default_path, load_target
from utils import cli, distributed, files
from utils.device import resolve_precision, restore_backends, select_device
from utils.errors import UserError
from utils.presets import deviations, preset, preset_name
from utils.run import Run, package_versions


@dataclass(frozen=True)
class Method:
    """A method that makes a distilled set; `registry.METHODS[name]` describes it.

    Args:
        name: key in `registry.METHODS`.
        distill: `distill(source, chosen, target, args, run, device)` returns a `Distilled`.
            `source` is an `ImageSet`, `chosen` (m,) holds the indices of the initial real images,
            `target` is a `Target` or None, and `run` is the `Run` to train in. The meta of the
            result may hold measurements. It must hold `initial` if the method starts from images
            other than `chosen`.
        help: dict of setting to description, for the flags.
        doc: text of --help.
        choose: `choose(source, m, seed)` returns `chosen`.
        add_flags: `add_flags(parser)` adds flags that no preset sets.
        check_flags: `check_flags(args)` raises UserError for invalid flags.
    """

    name: str
    distill: Callable
    help: dict
    doc: str
    choose: Callable = random_subset
    add_flags: Callable = lambda parser: None
    check_flags: Callable = lambda args: None


@restore_backends()
def main(method, argv, prog=None):
    """Run `method` with the command line `argv`; write distilled.pt and images.png."""
    args, entry = parse_args(method, argv, prog), registry.METHODS[method.name]
    method.check_flags(args)
    device = select_device(args, entry.multi_process)
    source = load_images(args.source, "train", args.image_size, args.data_root)
    if getattr(args, "ignore_labels", False):
        source.labels = None
    chosen = method.choose(source, args.num_images, args.seed)
    home, target = args.run_root / source.name, None
    facts = dict(source=source.name, fingerprint=source.fingerprint)
    changed = source.deviations | deviations(preset_name(source.name), entry.stage, vars(args))
    if entry.target_network:
        target = load_target(
            args.target_network or default_path(args.run_root, source.name),
            source,
            device,
            args.precision,
        )
        facts["target_network"] = target.digest
        changed |= target.deviations
    if entry.multi_process:  # the algorithm depends on the number of processes
        facts["ranks"] = distributed.world_size()
        changed |= {"ranks": [distributed.world_size(), 1]} if distributed.world_size() > 1 else {}
    run = Run(
        home / args.name / f"seed{args.seed}",
        "distilled.pt",
        cli.run_settings(args, **facts),
        args.log_every,
        args.tensorboard,
        device,
    )
    if run.finished:
        print(f"{run.artefact} already exists")
        return
    result = method.distill(source, chosen, target, args, run, device)
    result.meta |= dict(
        source=source.name,
        method=args.name,
        seed=args.seed,
        preset=args.preset,
        deviations=changed,
        settings=run.settings,
        versions=package_versions(),
    )
    initial = result.meta.setdefault("initial", None if chosen is None else chosen.tolist())
    moved = ""
    if initial is not None:
        distance = result.meta["distance_from_initial"] = distance_from_initial(
            result, source, torch.tensor(initial)
        )
        moved = f"; RMS distance from the initial images: {distance:.4f} standard deviations"
    save_picture(run.folder / "images.png", result)
    run.finish("distilled", result.content())
    print(f"wrote {run.artefact} and images.png{moved}")


def make_distilled(x_syn, targets, target_kind, source, normalised=True, **measured):
    """Return images (m, 3, S, S) and their targets as a `Distilled` on the CPU.

    Args:
        x_syn: images (m, 3, S, S).
        targets: targets (m, ...) of kind `target_kind`.
        target_kind: one of `data.distilled.TARGET_KINDS`.
        source: the `ImageSet` that the images are distilled from.
        normalised: whether the images are normalised by the source's statistics; if not, they are
            pixels in [0, 1].
        measured: the meta of the result.
    """
    x_syn, targets = x_syn.detach().cpu().contiguous(), targets.detach().cpu()
    mean, std = (source.mean, source.std) if normalised else (torch.zeros(3), torch.ones(3))
    return Distilled(x_syn, targets, target_kind, mean, std, measured)


def distance_from_initial(distilled, source, initial):
    """Return the distance of the images of a `Distilled` from their initial images.

    The distance is the root mean square over all images, pixels and channels, in units of the
    source's standard deviations. `initial` (m,) holds the indices of the initial images in
    `source`.
    """
    start = normalise(source.raw(initial, "cpu"), distilled.mean, distilled.std)  # (m, 3, S, S)
    images = distilled.images[: len(start)]  # excludes rotated views
    units = (distilled.std / source.std)[
        :, None, None
    ]  # 1, except for sets that are not normalised (D7 normalised-init)
    return ((images - start) * units).square().mean().sqrt().item()


def update_picture(run, args, step, distilled):
    """Update images.png every `args.image_every` steps; `distilled()` returns a `Distilled`."""
    if args.image_every and (step + 1) % args.image_every == 0:
        save_picture(run.folder / "images.png", distilled())


def save_picture(path, distilled, most=100):
    """Save a grid of the first `most` images, ten per row, each enlarged to at least 64 pixels."""
    if not distributed.is_main_process():
        return
    pixels = distilled.pixels()[:most]
    enlarged = F.interpolate(pixels, scale_factor=-(-64 // pixels.shape[-1]), mode="nearest")
    with files.atomic_write(path) as partial:
        save_image(enlarged, partial, format="png", nrow=10, padding=2, pad_value=1.0)


def parse_args(method, argv, prog=None):
    parser, name = cli.source_parser(method.doc, argv, prog)
    entry = registry.METHODS[method.name]
    run = parser.groups["run"]
    run.add_argument(
        "--name",
        default=method.name,
        help="name of the run folder and of the row in tables (default: %(default)s)",
    )
    if entry.target_network:
        parser.groups["data"].add_argument(
            "--target-network", type=Path, help="target.pt (default: the source's, seed 0)"
        )
    run.add_argument(
        "--image-every",
        type=cli.non_negative_int,
        default=0,
        metavar="STEPS",
        help="update images.png every STEPS steps (0: only at the end)",
    )
    cli.add_settings(
        parser,
        preset(name, entry.stage),
        dict(num_images="m, number of images in the set") | method.help,
        dict(arch=models.ARCHITECTURES),
    )
    method.add_flags(parser)
    args = parser.parse_args(argv)
    plain = getattr(args, "reference", False)
    args = resolve_precision(args, registry.bf16_is_harmless(method.name) and not plain)
    check_name("--name", args.name, reserved=registry.RESERVED)
    return args


def check_name(flag, name, reserved):
    """Raise UserError if `name` is not a plain word or is one of `reserved`."""
    if not re.fullmatch(r"\w[\w.-]*", name) or registry.base(name) in reserved:
        but = f" other than {', '.join(reserved)}" if reserved else ""
        raise UserError(f"{flag} {name}: must be a plain word{but}")
