"""Stage 2: pre-train a network on a distilled set, or on all of its source.

    python pretrain.py --distilled runs/tinyimagenet/krr_st/seed0/distilled.pt --arch vgg11
    python pretrain.py --distilled hf:USER/NAME              # or the folder of an exported set
    python pretrain.py --source tinyimagenet --arch vgg11    # the oracle: all images

The recipe follows from the set's kind of targets (feature, soft or class), whichever method made
it. A set of mtt or mkdt carries a learned learning rate, which replaces the recipe's;
--ignore-learned-rate keeps the recipe's. Writes <the set's folder>/<arch>/seed<k>/model.pt, where k
is the seed of this pre-training: the paper's three runs are three pre-trainings of one distilled
set. An exported set brings its recipe along, and its networks go to <run root>/<source>/<name of
the set>/seed<k>/<arch>/seed<k>. An hour of a CPU at most for 32 px and 1,000 images; seconds for
the digits.

With --source the network is fitted to the target network's features of every image of the source,
by the recipe for features and with as many optimiser steps as a distilled set of the preset's size
gets, so that the two differ in their images alone (--steps for more). That goes to <run
root>/<source>/full/seed0/<arch>/seed<k>/model.pt.
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
from models.sync_batch_norm import synchronised
from models.target import load_target
from utils import cli, distributed, files, optim
from utils.device import autocast, resolve_precision, select_device
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
    arch="network to pre-train",
    width="factor on its hidden widths",
    lr="learning rate",
    weight_decay="weight decay",
    batch_size="images in a batch",
    epochs="passes over the distilled set",
    steps="optimiser steps",
    augment="differentiable augmentation of the images",
)
SOURCE_FLAGS = ("target_network", "preset", "image_size", "name")  # flags that go with --source


@dataclass
class TrainingData:
    """What a network is fitted to: `images` and `targets` (n, ...), and `preprocess`, which makes a
    batch of the images what the network sees. `kind` is that of the recipe, `folder` the folder
    that the runs go to, `identity` what else decides the result, `meta` and `deviations` what the
    network's file says of it, `num_images` that of `Distilled`, `learned_rate` the one that the set
    carries."""

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
    """The `TrainingData` of a `Distilled`. Raises UserError where its images are too small for any
    network."""
    size, digest = distilled.images.shape[-1], files.digest(args.distilled)
    if size < SMALLEST_IMAGE_SIZE:
        raise UserError(
            f"{args.distilled}: images of {size} px; the networks take {SMALLEST_IMAGE_SIZE} px or "
            "more"
        )
    meta = {name: distilled.meta.get(name) for name in ("source", "method", "preset")}
    meta |= dict(distilled=digest, distilled_seed=distilled.meta.get("seed"))
    meta["normalisation"] = [distilled.mean.tolist(), distilled.std.tolist()]
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
    """The `TrainingData` of all images of a source, X_t, with the target network's features of
    them, g_phi(X_t)."""
    source = load_images(args.source, "train", args.image_size, args.data_root)
    home = args.run_root / source.name
    target = load_target(
        args.target_network or home / "target" / "seed0" / "target.pt",
        source,
        device,
        args.precision,
    )

    def preprocess(
        pixels,
    ):  # in the memory format of a distilled set: the same images give the same bits
        return normalise(to_float(pixels), source.mean, source.std).contiguous()

    identity = dict(
        source=source.name, fingerprint=source.fingerprint, target_network=target.digest
    )
    meta = dict(source=source.name, method=args.name, preset=args.preset)
    meta["normalisation"] = [source.mean.tolist(), source.std.tolist()]
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
    """Fit `network` to the images and targets of `data` (equation 5)."""
    batches = Batches(len(data.images), args.batch_size, randomness.cpu, shared=True)
    total = args.steps or args.epochs * batches.per_epoch
    optimizer = optim.optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scheduler = optim.schedule(optimizer, args.schedule, total, args.warmup)
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
    with synchronised(network):
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
    run = Run(folder, "model.pt", settings, args.log_every, args.tensorboard)
    if run.finished:
        print(f"{run.artefact} is there already")
        return
    if args.lr == data.learned_rate:
        print(f"learning rate {args.lr:g}, learned with the set")
    randomness = Randomness(args.seed, device)
    network = models.build(args.arch, data.size, data.outputs, args.width).to(device)
    pretrain(network, data, args, run, randomness, device)
    name = preset_name(data.meta["source"])
    own = deviations(name, "pretrain", vars(args), data.kind, args.arch)
    if args.lr == data.learned_rate:
        own.pop("pretrain.lr", None)  # the method prescribes it
    changed = data.deviations | own
    changed |= deviations(name, "distill", {"width": args.width})
    meta = data.meta | dict(
        seed=args.seed, num_images=data.num_images, deviations=changed, settings=run.settings
    )
    run.finish(
        "model", saved.content(network, args.arch, args.width, data.size, data.outputs, meta)
    )
    print(f"wrote {run.artefact}")


def own_recipe(distilled, path, usual):
    """The settings `usual`, with the values that an exported set brings.

    Raises UserError for a value that is none.
    """
    own = distilled.meta.get("recipe", {}) if distilled else {}
    chosen = {name: own.get(name, value) for name, value in usual.items()}
    for name, value in chosen.items():
        number = isinstance(value, (int, float))  # the one setting that is a text is the arch
        fits = 0 <= value < math.inf if number else value in models.ARCHITECTURES
        if type(value) is not type(usual[name]) or not fits:
            raise UserError(f"{path}: a recipe with {name} {str(value)[:40]}")
    return chosen


def parse_args(argv):
    parser = cli.stage_parser(__doc__)
    data = parser.groups["data"]
    what = data.add_mutually_exclusive_group(required=True)
    what.add_argument("--distilled", type=distilled_file, metavar="SET", help=DISTILLED_HELP)
    what.add_argument(
        "--source", help="data set or folder of images, all of which are used instead"
    )
    data.add_argument(
        "--target-network",
        type=Path,
        help="with --source: target.pt (default: that of the source, seed 0)",
    )
    parser.groups["method"].add_argument(
        "--preset", choices=[*PRESETS], help="with --source: settings (default: the source's own)"
    )
    data.add_argument(
        "--image-size",
        type=cli.pixels,
        help="with --source: pixels of a side (default: the preset's)",
    )
    parser.groups["method"].add_argument(
        "--ignore-learned-rate",
        action="store_true",
        help="take the recipe's learning rate, not the one learned with the set",
    )
    parser.groups["run"].add_argument(
        "--name", help="with --source: of the run's folder and in tables (default: full)"
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
            f"{path}: images without targets, which nothing can be fitted to; they are for kd.py"
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
    parser.set_defaults(
        **{key: value for key, value in recipe.items() if key not in flags}
    )  # the kind decides these
    settings = own_recipe(distilled, path, network | flags)
    if learned:
        settings["lr"] = flags["lr"]
    cli.add_settings(parser, settings, HELP, dict(arch=models.ARCHITECTURES))
    if source:
        parser.set_defaults(preset=name, image_size=image_size(name), name="full")
    args = resolve_precision(parser.parse_args(argv))
    if args.source:
        check_name("--name", args.name, reserved=("target", "scratch", *registry.SETS))
    for flag in () if args.source else SOURCE_FLAGS:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} goes with --source")
        delattr(args, flag)  # the set says it, and it is none of the run's settings
    del args.ignore_learned_rate  # --lr says it
    return args, distilled


if __name__ == "__main__":
    cli.run(main)
