"""Stage 0: the target network g_phi.

Trains a network on the unlabelled source with Barlow Twins, or computes features with an encoder.

    python pretrain_target.py --source tinyimagenet
    python pretrain_target.py --source imagenette --weights resnet50.pth    # a backbone for --arch
    python pretrain_target.py --source photos --encoder timm:vit_small_patch14_dinov2.lvd142m
    python pretrain_target.py --source photos --features features.npy

Writes runs/<source>/target/seed0/target.pt. By default, the file holds a network of --arch. The
paper's setting (1,000 epochs of ResNet18) takes hours to days on one GPU. The digits preset takes
two minutes on two CPU cores. With --encoder or --features, the features of all images of the source
are written to features.npy in the same folder (docs/encoders.md).

If the source has labels, a linear probe and a nearest-neighbour classifier compare the target
features with the features of an untrained student network. The labels serve this check only;
training does not use them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import models
from data.augment import barlow_twins_view
from data.images import load_images, normalise, to_float
from data.loading import Loader
from data.originals import Originals
from distillers import registry
from distillers.method import check_name
from evaluation import probes, quality
from models.barlow_twins import barlow_twins_loss, check_batch_size, projector
from models.encoders import FORMS, load_encoder
from models.features import FeatureTable, compute_features, read_features, reduce_features
from models.saved import load_matching, load_weights
from models.sync_batch_norm import synchronise_batch_norm
from utils import cli, distributed, files, optim
from utils.device import autocast, resolve_precision, restore_backends, select_device
from utils.errors import UserError
from utils.presets import deviations, preset, preset_name
from utils.run import Run
from utils.sampling import Batches, Randomness

COMPONENTS = 256  # number of principal components kept of an encoder's features (--pca)
HELP = dict(
    arch="architecture of the target network",
    width="factor on the network's hidden widths",
    epochs="passes over the source",
    batch_size="images per batch",
    lr="LARS learning rate for a batch of 256",
    weight_decay="weight decay",
    warmup_epochs="number of epochs of linear warm-up",
    projector_dim="width of the projector's three layers",
    off_diagonal="lambda, weight of the off-diagonal terms of the loss",
    loss_scale="factor on the loss",
    crop_min="smallest fraction of the image's area that a crop keeps",
    jitter="probability of colour jitter",
    greyscale="probability of greyscale",
    solarise="probability of solarisation in the second view",
    flip="probability of a horizontal flip",
    weights="file with a state dict to load instead of training; its keys may start with "
    "backbone., encoder., module. or model. 'hub' downloads the ImageNet ResNet50 of "
    "facebookresearch/barlowtwins; '' trains a network. With --encoder: weights file to use "
    "instead of a download by torchvision or timm",
)
REDUCTION = ("pca", "unit_scale")  # settings of targets that are features of an encoder or a file


def train(network, source, args, run, device):
    """Train `network` in place with Barlow Twins for `args.epochs` epochs.

    Args:
        network: `Network` without a head.
        source: `ImageSet` of the training images.
        args: parsed flags.
        run: `Run` that logs and saves checkpoints.
        device: torch device.
    """
    head = projector(network.feature_dim, args.projector_dim).to(device)
    randomness = Randomness(args.seed, device)
    batches = Batches(len(source), args.batch_size, randomness.cpu, drop_last=True, shared=True)
    weights = [*network.parameters(), *head.parameters()]
    lars = optim.make_optimizer(
        "lars", weights, args.lr * batches.batch_size / 256, args.weight_decay
    )
    total = args.epochs * batches.per_epoch
    scheduler = optim.make_schedule(lars, "cosine", total, args.warmup_epochs * batches.per_epoch)
    run.resume(
        device,
        dict(
            network=network,
            head=head,
            batches=batches,
            optimizer=lars,
            scheduler=scheduler,
            randomness=randomness,
        ),
    )
    loader = Loader([source.pixels], batches, device)
    network.train()
    with synchronise_batch_norm(network, head):
        for step in run.steps("train target", total):
            x = to_float(*loader.next())  # (b, 3, S, S)
            randomness.reseed_for_rank()
            views = [
                barlow_twins_view(x, randomness.device, args, solarise)
                for solarise in (0.0, args.solarise)
            ]
            with autocast(device, args.precision):
                z1, z2 = (
                    head(network.embed(normalise(view, source.mean, source.std))) for view in views
                )
            lars.zero_grad()
            loss = distributed.backward(
                barlow_twins_loss(z1, z2, args.off_diagonal, args.loss_scale), weights
            )
            run.log(step, loss=loss, gradient=optim.gradient_norm(weights))
            lars.step()
            scheduler.step()


def load_backbone(network, weights):
    """Load a state dict into `network.features`, without the weights of its heads.

    Args:
        network: `Network` to load into.
        weights: path of the file, which is read as data only; or 'hub', which downloads and runs
            the code of facebookresearch/barlowtwins.

    Raises:
        UserError: if the download fails or the weights do not fit.
    """
    if weights != "hub":
        load_matching(network.features, weights)
        return
    try:
        state = torch.hub.load(
            "facebookresearch/barlowtwins:main", "resnet50", trust_repo=True
        ).state_dict()
    except OSError as error:
        raise UserError(
            f"cannot download facebookresearch/barlowtwins from torch.hub ({error}); pass the "
            "state dict of its resnet50 with --weights FILE, or train a network: --weights '' "
            "--arch resnet18_target"
        ) from error
    state = {name: v for name, v in state.items() if not name.startswith("fc.")}
    load_weights(
        network.features, state, "the network; pass --arch resnet50_target", "--weights hub"
    )


def make_network_target(source, args, device):
    """Write a target network of --arch, trained with Barlow Twins or loaded from --weights."""
    if not args.weights:
        check_batch_size(min(len(source), args.batch_size), source)
    settings = cli.run_settings(args, source=source.name, fingerprint=source.fingerprint)
    ignored = {"encoder", "features", "encoder_size", *REDUCTION}
    settings = {name: value for name, value in settings.items() if name not in ignored}
    run = open_run(source, args, settings, device)
    torch.manual_seed(args.seed)
    network = models.build(args.arch, args.image_size, 0, args.width).to(device)
    if args.weights:
        load_backbone(network, args.weights)
    else:
        train(network, source, args, run, device)
    content = dict(
        arch=args.arch,
        width=args.width,
        image_size=args.image_size,
        network={name: value.cpu() for name, value in network.state_dict().items()},
        deviations=source.deviations | deviations(preset_name(source.name), "target", vars(args)),
    )

    def features(index):
        return probes.compute_outputs(network, source.subset(index), device, args.precision)

    finish(run, source, args, device, content, network.feature_dim, features)


def make_feature_target(source, args, device):
    """Write the features of the source that an encoder computes or that a file holds."""
    names = ("pca", "unit_scale", "precision", "image_size", "seed")
    flags = {name: getattr(args, name) for name in names}
    if args.features:
        encoder, name = None, f"features {args.features.name}"
        flags["features"] = files.digest(args.features) if args.features.is_file() else None
        array = read_features(args.features, len(source))
    else:
        encoder = load_encoder(args.encoder, device, args.weights, args.encoder_size)
        name = f"encoder {encoder.facts['name']}"
        flags["encoder"] = encoder.facts
    facts = dict(source=source.name, fingerprint=source.fingerprint)
    run = open_run(source, args, flags | facts, device)
    encoded = run.folder / "encoded.npy"
    if encoder:
        originals = Originals(source, "train", encoder.image_size, args.data_root)
        compute_features(
            encoder, originals, FeatureTable(encoded, len(source)), run, device, args.precision
        )
        encoder.facts["from_raw"] = originals.from_raw
        array = np.load(encoded, mmap_mode="r")
    path = run.folder / "features.npy"
    reduction, stored = reduce_features(array, path, args.pca, args.unit_scale)
    table = torch.from_numpy(np.load(path, mmap_mode="r+"))
    print(
        f"{len(table):,} features of {stored['encoder_dim']} dimensions, "
        f"{100 * stored['zeros']:.1f} % zeros; "
        f"kept {table.shape[1]} dimensions, {100 * stored['variance_kept']:.1f} % of the variance; "
        f"root mean square {stored['rms']:.3g}, {'divided by it' if args.unit_scale else 'kept'}"
    )
    changed = {"target.encoder": [name, "Barlow Twins"], "target.pca": [table.shape[1], 0]}
    changed |= {"target.unit_scale": [True, False]} if args.unit_scale else {}
    content = stored | dict(
        features=files.compute_checksums(path),
        encoder=encoder
        and encoder.facts
        | dict(what=args.encoder, file=str(args.weights), outputs=encoder.outputs),
        reduction=reduction,
        name=name,
        deviations=source.deviations | changed,
    )
    finish(
        run, source, args, device, content, table.shape[1], lambda index: table[index].to(device)
    )
    encoded.unlink(missing_ok=True)


def open_run(source, args, settings, device):
    """Return the `Run` of this target. Exits with code 0 if the run has finished already."""
    folder = args.run_root / source.name / args.name / f"seed{args.seed}"
    run = Run(folder, "target.pt", settings, args.log_every, args.tensorboard, device)
    if run.finished:
        print(f"{run.artefact} already exists")
        raise SystemExit(0)
    return run


def finish(run, source, args, device, content, feature_dim, features):
    """Check the target features against the source's labels, then write target.pt.

    Args:
        content: dict of the file, without the facts that all targets share.
        feature_dim: d_y.
        features: function of indices (k,) that returns the target features (k, d_y).
    """
    student = preset(args.preset, "distill")
    checked = quality.measure_quality(source, features, student["arch"], student["width"], device)
    quality.print_quality(checked)
    facts = dict(feature_dim=feature_dim, source=source.name, fingerprint=source.fingerprint)
    facts |= dict(mean=source.mean, std=source.std, settings=run.settings, quality=checked)
    run.finish("target", content | facts)
    print(f"wrote {run.artefact}")


@restore_backends()
def main(argv):
    args = parse_args(argv)
    device = select_device(args, multi_process=not (args.encoder or args.features))
    source = load_images(args.source, "train", args.image_size, args.data_root)
    make = make_feature_target if args.encoder or args.features else make_network_target
    make(source, args, device)


def parse_args(argv):
    parser, name = cli.source_parser(__doc__, argv)
    parser.groups["run"].add_argument(
        "--name", default="target", help="name of the run's folder (default: %(default)s)"
    )
    cli.add_settings(parser, preset(name, "target"), HELP, dict(arch=models.ARCHITECTURES))
    elsewhere = parser.add_argument_group("pre-trained target")
    which = elsewhere.add_mutually_exclusive_group()
    which.add_argument(
        "--encoder",
        metavar="WHAT",
        help=f"network whose features are the targets: {FORMS}. hub: and FILE.py: run code from "
        "outside this project",
    )
    which.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help=".npy or .safetensors file with features (n, d), in the order that `python -m "
        "data.prepare --list` prints",
    )
    elsewhere.add_argument(
        "--encoder-size",
        type=cli.non_negative_int,
        default=0,
        metavar="PIXELS",
        help="height and width of the encoder's input (default: the encoder's own)",
    )
    elsewhere.add_argument(
        "--pca",
        type=cli.non_negative_int,
        default=COMPONENTS,
        metavar="D",
        help="number of principal components to keep; 0 keeps all dimensions (default: "
        "%(default)s)",
    )
    elsewhere.add_argument(
        "--unit-scale",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide the features by their root mean square (default: on)",
    )
    if cli.peek_flag("encoder", argv) or cli.peek_flag("features", argv):
        parser.set_defaults(weights="")  # a preset's weights are for --arch
    args = resolve_precision(parser.parse_args(argv))
    check_name("--name", args.name, reserved=("full", "scratch", *registry.SETS))
    if args.encoder_size and not args.encoder:
        parser.error("--encoder-size requires --encoder")
    if args.encoder or args.features:
        trained = {*HELP} - {"weights"}
        cli.refuse_flags(parser, argv, trained, "has no effect with --encoder or --features")
    else:
        cli.refuse_flags(parser, argv, REDUCTION, "requires --encoder or --features")
    if args.features and args.weights:
        parser.error("--weights cannot be combined with --features")
    return args


if __name__ == "__main__":
    cli.run(main)
