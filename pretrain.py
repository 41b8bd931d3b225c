"""Stage 2: pre-train a network on a distilled set, or on all images of a source.

    python pretrain.py --distilled runs/tinyimagenet/krr_st/seed0/distilled.pt --arch vgg11
    python pretrain.py --distilled hf:USER/NAME              # or the folder of an exported set
    python pretrain.py --source tinyimagenet --arch vgg11    # the oracle: all images

The kind of the set's targets (feature, soft or class) selects the recipe, whichever method made the
set. An exported set contains its own recipe. Sets of mtt and mkdt contain a learned learning rate,
which replaces the recipe's; --ignore-learned-rate keeps the recipe's.

Writes <folder of the set>/<arch>/seed<k>/model.pt, where k is the seed of the pre-training. For an
exported set, the folder is <run root>/<source>/<name of the set>/seed<k of the set>. The
paper's three runs are three pre-trainings on one distilled set.

With --source, the network is fitted to the target features of all images of the source. It uses the
recipe for features, and takes as many optimiser steps as for a distilled set of the preset's size,
so that only the images differ. --steps changes their number. Writes
<run root>/<source>/full/seed0/<arch>/seed<k>/model.pt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from data.augment import diff_augment
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled, results_folder
from data.images import load_images, normalise, to_float
from data.loading import Loader
from distillers import registry
from distillers.method import check_name
from models import saved
from models.sync_batch_norm import synchronise_batch_norm
from models.target import default_path, load_target
from utils import cli, distributed, files, optim
from utils.device import autocast, resolve_precision, restore_backends, select_device
from utils.errors import UserError
from utils.presets import PRESETS, SMALLEST_IMAGE_SIZE, deviations, image_size, preset, preset_name
from utils.run import Run
from utils.sampling import Batches, Randomness

LOSSES = {
    "mse": F.mse_loss,  # mean over all entries (D4 mean-loss)
    "half_squared": lambda predicted, target: 0.5 * (predicted - target).square().sum(1).mean(),
    "cross_entropy": F.cross_entropy,
}
HELP = dict(
    arch="architecture to pre-train",
    width="factor on the network's hidden widths",
    lr="learning rate",
    weight_decay="weight decay",
    batch_size="images per batch",
    epochs="number of passes over the distilled set",
    steps="number of optimiser steps",
    augment="differentiable augmentation of the images",
)
SOURCE_FLAGS = ("target_network", "preset", "image_size", "name")  # require --source


@dataclass
class TrainingData:
    """Images and targets that a network is fitted to.

    Attributes:
        images: (n, ...) images as stored.
        targets: (n, ...) their targets.
        preprocess: function from a batch of `images` to the network's input (b, 3, S, S).
        size: S, image height and width in pixels.
        outputs: number of outputs of the network.
        kind: kind of the targets, which selects the recipe; "source" for all images of a source.
        folder: folder that the runs are written to.
        identity: settings that identify the data, for config.json.
        meta: facts about the data, for model.pt.
        deviations: deviations of earlier stages from their presets.
        num_images: as in `Distilled`.
        learned_rate: learning rate that the set contains, or None.
    """

    images: torch.Tensor
    targets: torch.Tensor
    preprocess: Callable
    size: int
    outputs: int
    kind: str
    folder: Path
    identity: dict
    meta: dict
    deviations: dict
    num_images: int
    learned_rate: float | None = None


def data_from_distilled(distilled, args, device):
    """Return the `TrainingData` of a `Distilled`.

    Raises:
        UserError: if the images are too small for the networks.
    """
    size, digest = distilled.images.shape[-1], files.digest(args.distilled)
    if size < SMALLEST_IMAGE_SIZE:
        raise UserError(
            f"{args.distilled}: images of {size} px; the networks need at least "
            f"{SMALLEST_IMAGE_SIZE} px"
        )
    meta = {name: distilled.meta.get(name) for name in ("source", "method", "preset")}
    meta |= dict(distilled=digest, distilled_seed=distilled.meta.get("seed"))
    meta["normalisation"] = [distilled.mean.tolist(), distilled.std.tolist()]
    meta["target_network"] = distilled.meta.get("settings", {}).get("target_network")
    x_syn, y_syn = distilled.images.to(device), distilled.targets.to(device)
    return TrainingData(
        x_syn,
        y_syn,
        lambda x: x,
        size,
        distilled.num_outputs,
        distilled.target_kind,
        results_folder(args.distilled, distilled, args.run_root),
        dict(distilled=digest),
        meta,
        distilled.meta.get("deviations", {}),
        distilled.num_images,
        distilled.meta.get("learned_rate"),
    )


def data_from_source(args, device):
    """Return the `TrainingData` of all images X_t of a source and their features g_phi(X_t)."""
    source = load_images(args.source, "train", args.image_size, args.data_root)
    home = args.run_root / source.name
    target = load_target(
        args.target_network or default_path(args.run_root, source.name),
        source,
        device,
        args.precision,
    )

    def preprocess(pixels):
        # Contiguous like a distilled set, so that equal images give bit-identical results.
        return normalise(to_float(pixels), source.mean, source.std).contiguous()

    identity = dict(
        source=source.name, fingerprint=source.fingerprint, target_network=target.digest
    )
    meta = dict(source=source.name, method=args.name, preset=args.preset)
    meta["normalisation"] = [source.mean.tolist(), source.std.tolist()]
    meta["target_network"] = target.digest
    return TrainingData(
        source.pixels,
        target.features_of(source),
        preprocess,
        source.image_size,
        target.feature_dim,
        "source",
        home / args.name / "seed0",
        identity,
        meta,
        source.deviations | target.deviations,
        len(source),
    )


def pretrain(network, data, args, run, randomness, device):
    """Train `network` in place on the images and targets of `data` (equation 5).

    Args:
        network: `Network` to train.
        data: `TrainingData`.
        args: parsed flags, with the recipe.
        run: `Run` that logs and saves checkpoints.
        randomness: `Randomness` of the run.
        device: torch device.
    """
    batches = Batches(len(data.images), args.batch_size, randomness.cpu, shared=True)
    total = args.steps or args.epochs * batches.per_epoch
    optimizer = optim.make_optimizer(
        args.optimizer, network.parameters(), args.lr, args.weight_decay
    )
    scheduler = optim.make_schedule(optimizer, args.schedule, total, args.warmup)
    run.resume(
        device,
        dict(
            network=network,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=batches,
            randomness=randomness,
        ),
    )
    loader = Loader([data.images, data.targets], batches, device)
    network.train()
    with synchronise_batch_norm(network):
        for step in run.steps("pre-train", total):
            images, y = loader.next()
            randomness.reseed_for_rank()
            x = data.preprocess(images)
            if args.augment:
                x = diff_augment(x, randomness.device)
            with autocast(device, args.precision):
                predicted = network(x)
            optimizer.zero_grad()
            loss = distributed.backward(
                LOSSES[args.loss](predicted.float(), y), network.parameters(), batches.loss_weight
            )
            run.log(step, loss=loss, gradient=optim.gradient_norm(network.parameters()))
            optimizer.step()
            scheduler.step()


@restore_backends()
def main(argv):
    args, distilled = parse_args(argv)
    device = select_device(args, multi_process=True)
    data = (
        data_from_distilled(distilled, args, device)
        if distilled
        else data_from_source(args, device)
    )
    folder = data.folder / models.label(args.arch, args.width) / f"seed{args.seed}"
    settings = cli.run_settings(args, **data.identity)
    run = Run(folder, "model.pt", settings, args.log_every, args.tensorboard, device)
    if run.finished:
        print(f"{run.artefact} already exists")
        return
    if args.lr == data.learned_rate:
        print(f"learning rate {args.lr:g}, learned with the set")
    randomness = Randomness(args.seed, device)
    network = models.build(args.arch, data.size, data.outputs, args.width).to(device)
    pretrain(network, data, args, run, randomness, device)
    name = preset_name(data.meta["source"])
    own = deviations(name, "pretrain", vars(args), data.kind, args.arch)
    if args.lr == data.learned_rate:
        own.pop("pretrain.lr", None)  # part of the method
    changed = data.deviations | own
    changed |= deviations(name, "distill", {"width": args.width})
    meta = data.meta | dict(
        seed=args.seed, num_images=data.num_images, deviations=changed, settings=run.settings
    )
    run.finish(
        "model", saved.make_content(network, args.arch, args.width, data.size, data.outputs, meta)
    )
    print(f"wrote {run.artefact}")


def read_recipe(distilled, path, usual):
    """Return the settings `usual`, updated with the recipe of an exported set.

    Raises:
        UserError: if a value of the recipe is invalid.
    """
    own = distilled.meta.get("recipe", {}) if distilled else {}
    chosen = {name: own.get(name, value) for name, value in usual.items()}
    for name, value in chosen.items():
        number = isinstance(value, (int, float))  # the only string is arch
        least = 1 if name == "batch_size" else 0
        fits = least <= value < math.inf if number else value in models.ARCHITECTURES
        if type(value) is not type(usual[name]) or not fits:
            raise UserError(f"{path}: invalid recipe: {name} {str(value)[:40]}")
    if not (chosen.get("epochs") or chosen.get("steps")):
        raise UserError(f"{path}: invalid recipe: neither epochs nor steps")
    return chosen


def parse_args(argv):
    parser = cli.stage_parser(__doc__)
    data = parser.groups["data"]
    what = data.add_mutually_exclusive_group(required=True)
    what.add_argument("--distilled", type=distilled_file, metavar="SET", help=DISTILLED_HELP)
    what.add_argument("--source", help="data set or folder; all of its images are used")
    data.add_argument(
        "--target-network",
        type=Path,
        help="with --source: target.pt (default: the source's target of seed 0)",
    )
    parser.groups["method"].add_argument(
        "--preset",
        choices=[*PRESETS],
        help="with --source: name of the preset (default: that of the source)",
    )
    data.add_argument(
        "--image-size",
        type=cli.pixels,
        help="with --source: height and width in pixels (default: that of the preset)",
    )
    parser.groups["method"].add_argument(
        "--ignore-learned-rate",
        action="store_true",
        help="use the recipe's learning rate instead of the one learned with the set",
    )
    parser.groups["run"].add_argument(
        "--name", help="with --source: name of the run's folder and in tables (default: full)"
    )
    cli.add_seed(parser)
    path, source = cli.peek_flag("distilled", argv), cli.peek_flag("source", argv)
    distilled = load_distilled(path) if path else None
    name = preset_name(
        distilled.meta.get("preset") if distilled else cli.peek_flag("preset", argv, source)
    )
    network = {key: preset(name, "distill")[key] for key in ("arch", "width")}
    kind = "source" if source else distilled.target_kind if distilled else "feature"
    if kind == "none":
        raise UserError(
            f"{path}: images without targets, which cannot be used for pre-training; use them with "
            "kd.py"
        )
    recipe = preset(name, "pretrain", kind, cli.peek_flag("arch", argv, network["arch"]))
    flags = {
        key: value
        for key, value in recipe.items()
        if key in HELP and (key not in ("epochs", "steps") or value)
    }
    learned = distilled.meta.get("learned_rate") if distilled else None
    if learned and "--ignore-learned-rate" not in argv:
        flags["lr"] = learned
    # The kind of targets fixes the settings without a flag.
    parser.set_defaults(**{key: value for key, value in recipe.items() if key not in flags})
    settings = read_recipe(distilled, path, network | flags)
    if learned:
        settings["lr"] = flags["lr"]
    cli.add_settings(parser, settings, HELP, dict(arch=models.ARCHITECTURES))
    if source:
        parser.set_defaults(preset=name, image_size=image_size(name), name="full")
    # Not the oracle: its training on all images was measured in float32 only.
    harmless = bool(distilled) and registry.bf16_is_harmless(distilled.meta.get("method"))
    args = resolve_precision(parser.parse_args(argv), harmless)
    if args.source:
        check_name("--name", args.name, reserved=("target", "scratch", *registry.SETS))
    for flag in () if args.source else SOURCE_FLAGS:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} requires --source")
        delattr(args, flag)  # known from the set, so not a setting of the run
    del args.ignore_learned_rate  # already applied to --lr
    return args, distilled


if __name__ == "__main__":
    cli.run(main)
