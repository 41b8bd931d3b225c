"""Stage 3: evaluate a pre-trained network on a labelled data set.

    python finetune.py --weights runs/.../model.pt --dataset cifar10
    python finetune.py --weights runs/.../model.pt --dataset cifar10 --protocol linear
    python finetune.py --weights none --arch resnet18 --image-size 64 --dataset cifar10

The last command trains from scratch. It also trains a teacher for kd.py.

Protocols:
  full    trains the whole network with a new head (the paper's protocol)
  linear  fits a linear classifier on the frozen features to convergence
  knn     classifies by nearest neighbours in feature space
  head    trains nothing and uses the head from pre-training, which must have been on class or soft
          targets of the same data set

Prints the test accuracy of the last iterate and appends it to results.jsonl in the folder of the
weights. `full` also writes the network to <folder of the weights>/<dataset>_full_seed<k>/model.pt.
With --weights none, that folder is <run root>/scratch/<arch>_<size>px.
"""

import time

import torch
import torch.nn.functional as F

from data import augment
from data.images import load_images, normalise, to_float
from data.loading import Loader
from data.subsets import few_labels
from evaluation import probes, results, starting_weights
from models import saved
from models.sync_batch_norm import synchronised
from utils import cli, distributed, optim
from utils.device import autocast, resolve_precision, select_device
from utils.errors import UserError
from utils.presets import deviations, preset, preset_name
from utils.run import Run, settings_digest
from utils.sampling import Batches, Randomness

HELP = dict(
    lr="SGD learning rate, decayed to 0 with a cosine schedule",
    weight_decay="weight decay",
    batch_size="images per batch",
    steps="number of optimiser steps",
    flip="randomly flip the training images, after the random crop",
)


def finetune(network, train, args, run, randomness, device):
    """Train `network` in place with cross-entropy on augmented images.

    Args:
        network: `Network` with a head for the classes of `train`.
        train: labelled `ImageSet`.
        args: parsed flags.
        run: `Run` that logs and saves checkpoints.
        randomness: `Randomness` of the run.
        device: torch device.
    """
    batches = Batches(len(train), args.batch_size, randomness.cpu, shared=True)
    sgd = optim.optimizer("sgd", network.parameters(), args.lr, args.weight_decay)
    scheduler = optim.schedule(sgd, "cosine", args.steps)
    run.resume(
        device,
        dict(
            network=network,
            optimizer=sgd,
            scheduler=scheduler,
            batches=batches,
            randomness=randomness,
        ),
    )
    loader = Loader([train.pixels, train.labels], batches, device)
    network.train()
    with synchronised(network):
        for step in run.steps("fine-tune", args.steps):
            pixels, labels = loader.next()
            randomness.reseed_for_rank()
            x = augment.random_crop(to_float(pixels), randomness.device)
            if args.flip:
                x = augment.horizontal_flip(x, randomness.device)
            with autocast(device, args.precision):
                predicted = network(normalise(x, train.mean, train.std))
            sgd.zero_grad()
            loss = distributed.backward(
                F.cross_entropy(predicted.float(), labels),
                network.parameters(),
                batches.loss_weight,
            )
            run.log(step, loss=loss, gradient=optim.gradient_norm(network.parameters()))
            sgd.step()
            scheduler.step()


def main(argv):
    args = parse_args(argv)
    device, started = select_device(args, multi_process=args.protocol == "full"), time.monotonic()
    start = starting_weights.load(args)
    size = start.saved["image_size"]
    train = load_images(args.dataset, "train", size, args.data_root, labels=True)
    test = load_images(args.dataset, "test", size, args.data_root, labels=True)
    fingerprints = [train.fingerprint, test.fingerprint]
    settings = starting_weights.run_settings(
        args, start, dataset=train.name, fingerprints=fingerprints
    )
    if args.protocol != "full":
        settings = {name: value for name, value in settings.items() if name not in HELP}
    key = settings_digest(settings)
    if line := distributed.run_on_main(lambda: results.find(start.folder, key)):
        print(f"{results.format_line(line)} (already in results.jsonl)")
        return
    if train.labels is None:
        raise UserError(f"{args.dataset}: fine-tuning needs labels (class folders)")

    randomness = Randomness(start.seed, device)
    chosen = few_labels(
        train, args.labels_per_class, args.label_fraction, torch.Generator().manual_seed(start.seed)
    )
    train = train if len(chosen) == len(train) else train.subset(chosen)
    keep_head = args.protocol == "head"
    if keep_head and start.saved["num_outputs"] != len(train.classes):
        raise UserError(
            f"--protocol head: {args.weights} has {start.saved['num_outputs']} outputs, "
            f"{train.name} {len(train.classes)} classes"
        )
    network = saved.rebuild(start.saved, None if keep_head else len(train.classes)).to(device)
    labels = f"_{args.labels_per_class}perclass" if args.labels_per_class else ""
    labels += f"_{args.label_fraction:g}" if args.label_fraction else ""
    name = f"{train.name}_{args.protocol}{labels}_seed{start.seed}"
    changed = train.deviations | test.deviations
    if keep_head:
        accuracy = probes.accuracy(network, test, device, args.precision)
    elif args.protocol == "full":
        run = Run(start.folder / name, "model.pt", settings, args.log_every)
        used = {name: value for name, value in settings.items() if name in HELP}
        changed |= deviations(preset_name(train.name), "finetune", used)
        network = starting_weights.train_or_load(
            start,
            run,
            network,
            len(train.classes),
            lambda: finetune(network, train, args, run, randomness, device),
            dataset=train.name,
            finetune=run.settings,
            deviations=start.deviations | changed,
        )
        accuracy = probes.accuracy(network, test, device, args.precision)
    else:
        protocol = {"linear": probes.linear_accuracy, "knn": probes.knn_accuracy}[args.protocol]
        accuracy = protocol(network.embed, train, test, device, args.precision)
    line = start.result_line(
        changed,
        device,
        started,
        name=name,
        dataset=train.name,
        protocol=args.protocol,
        accuracy=round(accuracy, 4),
        labels_per_class=args.labels_per_class,
        label_fraction=args.label_fraction,
        digest=key,
    )
    results.append(start.folder, line)
    print(results.format_line(line))


def parse_args(argv):
    parser = cli.stage_parser(__doc__)
    starting_weights.add_flags(parser, argv)
    parser.groups["method"].add_argument(
        "--protocol",
        choices=["full", "linear", "knn", "head"],
        default="full",
        help="evaluation protocol, see above (default: full)",
    )
    few = parser.groups["data"].add_mutually_exclusive_group()
    few.add_argument(
        "--labels-per-class",
        type=cli.non_negative_int,
        default=0,
        metavar="N",
        help="train on N images per class",
    )
    few.add_argument(
        "--label-fraction",
        type=cli.fraction,
        default=0.0,
        metavar="F",
        help="train on this fraction of each class, 0 to 1",
    )
    cli.add_settings(parser, preset(preset_name(cli.peek_flag("dataset", argv)), "finetune"), HELP)
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
