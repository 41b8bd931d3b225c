"""Stage 3: what a pre-trained network is worth on a labelled target data set.

    python finetune.py --weights runs/.../model.pt --target cifar10
    python finetune.py --weights runs/.../model.pt --target cifar10 --protocol linear --labels-per-class 100
    python finetune.py --weights none --arch resnet18 --image-size 64 --target cifar10     # from scratch; a KD teacher

`full` trains the whole network under a new head (the paper's protocol), `linear` fits a linear classifier to the
frozen features until it converges, `knn` classifies by nearest neighbours, `head` trains nothing: it asks the head that
pre-training on a set with class or soft targets has left, where the target is that set's own source. The accuracy on
the test split, of the last iterate, is printed and added to results.jsonl beside the weights; `full` also writes the
network to <folder of the weights>/<target>_full_seed<k>/model.pt. From scratch that folder is
<run root>/scratch/<arch>_<size>px.
"""

import time

import torch
import torch.nn.functional as F

from data import augment
from data.images import load_images, normalise, unit
from data.loading import Loader
from data.subsets import few_labels
from models import saved
from models.sync_batch_norm import synchronised
from utils import cli, evaluate, optim, ranks, results, start
from utils.errors import UserError
from utils.presets import differences, preset
from utils.run import Run
from utils.sampling import Batches, Randomness

HELP = dict(
    lr="SGD learning rate, cosine to 0",
    weight_decay="weight decay",
    batch_size="images in a batch",
    steps="optimiser steps",
    flip="flip training images at random (the random crop stays)",
)


def finetune(network, train, args, run, randomness, device):
    """Train all of `network` with cross-entropy on random crops (and flips) of `train`."""
    batches = Batches(len(train), args.batch_size, randomness.cpu, shared=True)
    sgd = optim.optimizer("sgd", network.parameters(), args.lr, args.weight_decay)
    scheduler = optim.schedule(sgd, "cosine", args.steps)
    run.resume(
        device, dict(network=network, optimizer=sgd, scheduler=scheduler, batches=batches, randomness=randomness)
    )
    loader = Loader([train.pixels, train.labels], batches, device)
    network.train()
    with synchronised(network):
        for step in run.steps("fine-tune", args.steps):
            pixels, labels = loader.next()
            randomness.part()
            x = augment.random_crop(unit(pixels), randomness.device)
            if args.flip:
                x = augment.horizontal_flip(x, randomness.device)
            with cli.autocast(device, args.precision):
                predicted = network(normalise(x, train.mean, train.std))
            sgd.zero_grad()
            loss = ranks.backward(F.cross_entropy(predicted.float(), labels), network.parameters(), batches.share)
            run.log(step, loss=loss, gradient=optim.gradient_norm(network.parameters()))
            sgd.step()
            scheduler.step()


def main(argv):
    args = parse_args(argv)
    device, started = cli.device(args, several=args.protocol == "full"), time.monotonic()
    beginning = start.load(args)
    size = beginning.saved["image_size"]
    train = load_images(args.target, "train", size, args.data_root, labels=True)
    test = load_images(args.target, "test", size, args.data_root, labels=True)
    seen = [train.fingerprint, test.fingerprint]
    settings = start.settings(args, beginning, target=train.name, fingerprints=seen)
    if args.protocol != "full":
        settings = {name: value for name, value in settings.items() if name not in HELP}
    key = results.digest(settings)
    if line := ranks.from_first(lambda: results.find(beginning.folder, key)):
        print(f"{results.show(line)} (was there already)")
        return
    if train.labels is None:
        raise UserError(f"{args.target}: a target needs labels (class folders)")

    randomness = Randomness(beginning.seed, device)
    few = few_labels(train, args.labels_per_class, args.label_fraction, torch.Generator().manual_seed(beginning.seed))
    train = train if len(few) == len(train) else train.subset(few)
    as_it_is = args.protocol == "head"
    if as_it_is and beginning.saved["num_outputs"] != len(train.classes):
        raise UserError(
            f"--protocol head: {args.weights} has {beginning.saved['num_outputs']} outputs, "
            f"{train.name} {len(train.classes)} classes"
        )
    network = saved.rebuild(beginning.saved, None if as_it_is else len(train.classes)).to(device)
    labels = f"_{args.labels_per_class}perclass" if args.labels_per_class else ""
    labels += f"_{args.label_fraction:g}" if args.label_fraction else ""
    name = f"{train.name}_{args.protocol}{labels}_seed{beginning.seed}"
    scale = train.part | test.part
    if as_it_is:
        accuracy = evaluate.accuracy(network, test, device, args.precision)
    elif args.protocol == "full":
        run = Run(beginning.folder / name, "model.pt", settings, args.log_every, args.tensorboard)
        used = {name: value for name, value in settings.items() if name in HELP}
        scale |= differences(cli.preset_name(train.name), "finetune", used)
        network = start.trained(
            beginning, run, network, len(train.classes),
            lambda: finetune(network, train, args, run, randomness, device),
            target=train.name, finetune=run.settings, scale=beginning.scale | scale,
            normalisation=[train.mean.tolist(), train.std.tolist()],
        )  # fmt: skip
        accuracy = evaluate.accuracy(network, test, device, args.precision)
    else:
        protocol = {"linear": evaluate.linear_accuracy, "knn": evaluate.knn_accuracy}[args.protocol]
        accuracy = protocol(network.embed, train, test, device, args.precision)
    line = beginning.result(
        scale, device, started, name=name, target=train.name, protocol=args.protocol, accuracy=round(accuracy, 4),
        labels_per_class=args.labels_per_class, label_fraction=args.label_fraction, digest=key,
    )  # fmt: skip
    results.append(beginning.folder, line)
    print(results.show(line))


def parse_args(argv):
    parser = cli.parser(__doc__)
    start.add_flags(parser, argv)
    parser.add_argument("--protocol", choices=["full", "linear", "knn", "head"], default="full")
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--labels-per-class", type=cli.count, default=0, metavar="N", help="train on N images a class")
    few.add_argument(
        "--label-fraction", type=cli.share, default=0.0, metavar="F", help="train on a share of each class"
    )
    cli.add_settings(parser, preset(cli.preset_name(cli.early("target", argv)), "finetune"), HELP)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
