"""Stage 3: what a pre-trained network is worth on a labelled data set.

    python finetune.py --weights runs/.../model.pt --dataset cifar10
    python finetune.py --weights runs/.../model.pt --dataset cifar10 --protocol linear \\
        --label-fraction 0.01 0.1 1
    python finetune.py --weights none --arch resnet18 --image-size 64 --dataset cifar10

The second command prints a line for each share of the labels; the features of a frozen network are
computed once. The last trains from scratch, which also makes the teacher of kd.py.

`full` trains the whole network under a new head (the paper's protocol), `linear` fits a linear
classifier to the frozen features until it converges, `knn` classifies by nearest neighbours, `head`
trains nothing: it asks the head that pre-training on a set with class or soft targets has left,
where the data set is that set's own source. The accuracy on the test split, of the last iterate, is
printed and added to results.jsonl beside the weights; `full` also writes the network to <folder of
the weights>/<dataset>_full_seed<k>/model.pt. From scratch that folder is <run
root>/scratch/<arch>_<size>px.
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
    lr="SGD learning rate, cosine to 0",
    weight_decay="weight decay",
    batch_size="images in a batch",
    steps="optimiser steps",
    flip="flip training images at random (the random crop stays)",
)

PROBES = {"linear": probes.linear_accuracy_of, "knn": probes.knn_accuracy_of}


def finetune(network, train, args, run, randomness, device):
    """Train all of `network` with cross-entropy on random crops (and flips) of `train`."""
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


def label_choices(args):
    """[(labels a class, share of the labels)] for each evaluation; 0 stands for all."""
    shares = [(0, 0.0 if share == 1 else share) for share in args.label_fraction]
    return [(count, 0.0) for count in args.labels_per_class] or shares or [(0, 0.0)]


class Evaluation:
    """One line of results: `per_class` labels of each class or a `share` of them, or all (0, 0)."""

    def __init__(self, args, start, train, test, per_class, share):
        self.args, self.start, self.train, self.test = args, start, train, test
        self.labels = dict(labels_per_class=per_class, label_fraction=share)
        fingerprints = [train.fingerprint, test.fingerprint]
        settings = starting_weights.run_settings(
            args, start, dataset=train.name, fingerprints=fingerprints
        )
        if args.protocol != "full":
            settings = {name: value for name, value in settings.items() if name not in HELP}
        self.settings = settings | self.labels
        self.key = settings_digest(self.settings)
        suffix = f"_{per_class}perclass" if per_class else ""
        suffix += f"_{share:g}" if share else ""
        self.name = f"{train.name}_{args.protocol}{suffix}_seed{start.seed}"
        self.changed = train.deviations | test.deviations

    def choose(self):
        """Indices of the labelled images."""
        generator = torch.Generator().manual_seed(self.start.seed)
        return few_labels(self.train, *self.labels.values(), generator)

    def fine_tune(self, device):
        """Accuracy of the network after training all of it."""
        randomness, chosen = Randomness(self.start.seed, device), self.choose()
        train = self.train if len(chosen) == len(self.train) else self.train.subset(chosen)
        network = saved.rebuild(self.start.saved, len(train.classes)).to(device)
        folder, args = self.start.folder / self.name, self.args
        run = Run(folder, "model.pt", self.settings, args.log_every, args.tensorboard)
        used = {name: value for name, value in self.settings.items() if name in HELP}
        self.changed |= deviations(preset_name(train.name), "finetune", used)
        network = starting_weights.train_or_load(
            self.start,
            run,
            network,
            len(train.classes),
            lambda: finetune(network, train, self.args, run, randomness, device),
            dataset=train.name,
            finetune=run.settings,
            deviations=self.start.deviations | self.changed,
            normalisation=[train.mean.tolist(), train.std.tolist()],
        )
        return probes.accuracy(network, self.test, device, self.args.precision)

    def head_accuracy(self, device):
        """Accuracy of the head that pre-training has left."""
        outputs, classes = self.start.saved["num_outputs"], len(self.train.classes)
        if outputs != classes:
            raise UserError(
                f"--protocol head: {self.args.weights} has {outputs} outputs, "
                f"{self.train.name} {classes} classes"
            )
        network = saved.rebuild(self.start.saved).to(device)
        return probes.accuracy(network, self.test, device, self.args.precision)


def probe(evaluations, start, train, test, args, device):
    """Accuracies of a probe for each of `evaluations`; the features are computed once for all."""
    network = saved.rebuild(start.saved).to(device)
    chosen = [each.choose() for each in evaluations]
    needed = torch.cat(chosen).unique()  # in order
    mean, std, num_classes = train.mean, train.std, len(train.classes)
    features, tests = (
        probes.outputs(network.embed, images, device, args.precision, mean, std)
        for images in (train if len(needed) == len(train) else train.subset(needed), test)
    )
    labels, test_labels = train.labels[needed].to(device), test.labels.to(device)
    accuracy = PROBES[args.protocol]
    for index in chosen:
        here = torch.searchsorted(needed, index).to(device)
        yield accuracy(features[here], labels[here], tests, test_labels, num_classes)


def main(argv):
    args = parse_args(argv)
    device, started = select_device(args, multi_process=args.protocol == "full"), time.monotonic()
    start = starting_weights.load(args)
    size = start.saved["image_size"]
    train = load_images(args.dataset, "train", size, args.data_root, labels=True)
    test = load_images(args.dataset, "test", size, args.data_root, labels=True)
    missing = []
    for labels in label_choices(args):
        evaluation = Evaluation(args, start, train, test, *labels)
        key = evaluation.key
        if line := distributed.run_on_main(lambda key=key: results.find(start.folder, key)):
            print(f"{results.format_line(line)} (was there already)")
        else:
            missing.append(evaluation)
    if not missing:
        return
    if train.labels is None:
        raise UserError(f"{args.dataset}: a data set to fine-tune on needs labels (class folders)")

    if args.protocol in PROBES:
        accuracies = probe(missing, start, train, test, args, device)
    elif args.protocol == "head":
        accuracies = (each.head_accuracy(device) for each in missing)
    else:
        accuracies = (each.fine_tune(device) for each in missing)
    for evaluation, accuracy in zip(missing, accuracies, strict=True):
        line = start.result_line(
            evaluation.changed,
            device,
            started,
            name=evaluation.name,
            dataset=train.name,
            protocol=args.protocol,
            accuracy=round(accuracy, 4),
            **evaluation.labels,
            digest=evaluation.key,
        )
        results.append(start.folder, line)
        print(results.format_line(line))
        started = time.monotonic()


def parse_args(argv):
    parser = cli.stage_parser(__doc__)
    starting_weights.add_flags(parser, argv)
    parser.groups["method"].add_argument(
        "--protocol",
        choices=["full", "linear", "knn", "head"],
        default="full",
        help="what is trained, see above (default: full)",
    )
    few = parser.groups["data"].add_mutually_exclusive_group()
    few.add_argument(
        "--labels-per-class",
        nargs="+",
        type=cli.positive_int,
        default=[],
        metavar="N",
        help="train on N images a class; for several N, evaluate for each",
    )
    few.add_argument(
        "--label-fraction",
        nargs="+",
        type=cli.fraction,
        default=[],
        metavar="F",
        help="train on a share of each class; for several F, evaluate for each",
    )
    cli.add_settings(parser, preset(preset_name(cli.peek_flag("dataset", argv)), "finetune"), HELP)
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
