"""Stage 3: evaluate a pre-trained network on a labelled data set.

    python finetune.py --weights runs/.../model.pt --dataset cifar10
    python finetune.py --weights runs/.../model.pt --dataset cifar10 --protocol linear \\
        --label-fraction 0.01 0.1 1
    python finetune.py --weights none --arch resnet18 --image-size 64 --dataset cifar10

The second command prints a line for each fraction of the labels. The features of a frozen network
are computed once. The last command trains from scratch. It also trains a teacher for kd.py.

Protocols:
  full    trains the whole network with a new head (the paper's protocol)
  linear  fits a linear classifier on the frozen features to convergence
  knn     classifies by nearest neighbours in feature space
  head    trains nothing and uses the head from pre-training, which must have been on class or soft
          targets of the same data set
  r2      trains nothing; R^2, in percent, with which the head from pre-training predicts the target
          network's features of the source's test images (--dataset is the source)

Prints the test accuracy of the last iterate and appends it to results.jsonl in the folder of the
weights. `full` also writes the network to <folder of the weights>/<dataset>_full_seed<k>/model.pt.
With --weights none, that folder is <run root>/scratch/<arch>_<size>px.
"""

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import augment
from data.images import load_images, normalise, to_float
from data.loading import Loader
from data.subsets import few_labels
from distillers import registry
from evaluation import probes, results, starting_weights
from models import saved
from models.sync_batch_norm import synchronise_batch_norm
from models.target import default_path, load_target
from utils import cli, distributed, optim
from utils.device import autocast, resolve_precision, restore_backends, select_device
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

PROBES = {"linear": probes.linear_accuracy_of, "knn": probes.knn_accuracy_of}


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
    sgd = optim.make_optimizer("sgd", network.parameters(), args.lr, args.weight_decay)
    scheduler = optim.make_schedule(sgd, "cosine", args.steps)
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
    with synchronise_batch_norm(network):
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
    """Return (labels per class, fraction of the labels) for each evaluation; (0, 0) means all."""
    shares = [(0, 0.0 if share == 1 else share) for share in args.label_fraction]
    return [(count, 0.0) for count in args.labels_per_class] or shares or [(0, 0.0)]


class Evaluation:
    """One evaluation, which gives one line of results.

    The accuracy of a probe is the mean over `args.label_draws` draws of the labels.

    Args:
        args: parsed flags.
        start: `StartingWeights`.
        train, test: labelled `ImageSet`s.
        per_class: number of labels per class, or 0.
        share: fraction of the labels, or 0. If both are 0, all labels are used.
        target: `Target` of the source, for the protocol r2.
    """

    def __init__(self, args, start, train, test, per_class, share, target=None):
        self.args, self.start, self.train, self.test = args, start, train, test
        self.target = target
        self.labels = dict(labels_per_class=per_class, label_fraction=share)
        if args.label_draws > 1:
            self.labels["label_draws"] = args.label_draws
        fingerprints = [train.fingerprint, test.fingerprint]
        settings = starting_weights.run_settings(
            args, start, dataset=train.name, fingerprints=fingerprints
        )
        unused = {"target_network"} | ({*HELP} if args.protocol != "full" else set())
        settings = {name: value for name, value in settings.items() if name not in unused}
        self.settings = settings | self.labels
        if target:
            self.settings["target_network"] = target.digest
        self.key = settings_digest(self.settings)
        suffix = f"_{per_class}perclass" if per_class else ""
        suffix += f"_{share:g}" if share else ""
        suffix += f"_{args.label_draws}draws" if args.label_draws > 1 else ""
        self.name = f"{train.name}_{args.protocol}{suffix}_seed{start.seed}"
        precision = deviations(preset_name(train.name), "finetune", dict(precision=args.precision))
        self.changed = train.deviations | test.deviations | precision

    def draw_labels(self):
        """Return the indices of the labelled images, for each draw."""
        generator = torch.Generator().manual_seed(self.start.seed)
        few = self.labels["labels_per_class"], self.labels["label_fraction"]
        return [few_labels(self.train, *few, generator) for _ in range(self.args.label_draws)]

    def fine_tune(self, device):
        """Train the whole network and return its accuracy in percent."""
        randomness, chosen = Randomness(self.start.seed, device), self.draw_labels()[0]
        train = self.train if len(chosen) == len(self.train) else self.train.subset(chosen)
        network = saved.rebuild(self.start.saved, len(train.classes)).to(device)
        folder, args = self.start.folder / self.name, self.args
        run = Run(folder, "model.pt", self.settings, args.log_every, args.tensorboard, device)
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
        """Return the accuracy, in percent, of the head from pre-training."""
        outputs, classes = self.start.saved["num_outputs"], len(self.train.classes)
        if outputs != classes:
            raise UserError(
                f"--protocol head: {self.args.weights} has {outputs} outputs, "
                f"{self.train.name} {classes} classes"
            )
        network = saved.rebuild(self.start.saved).to(device)
        return probes.accuracy(network, self.test, device, self.args.precision)

    def r2(self, device):
        """Return R^2, in percent, of the target's features that the head predicts."""
        meta, outputs = self.start.saved["meta"], self.start.saved["num_outputs"]
        target = self.target.digest, self.target.feature_dim
        if (meta.get("target_network"), outputs) != target:
            raise UserError(
                f"--protocol r2: {self.args.weights} was not pre-trained on the features of "
                f"{self.target.path}"
            )
        network = saved.rebuild(self.start.saved).to(device)
        mean, std = (torch.tensor(each) for each in meta["normalisation"])
        predicted = probes.compute_outputs(
            network, self.test, device, self.args.precision, mean, std
        )
        features = self.target.test_features(self.train, self.test, self.args.data_root)
        return probes.r2_percent(predicted, features.to(device))


def probe(evaluations, start, train, test, args, device):
    """Yield the accuracy, in percent, of a probe for each evaluation.

    The features are computed once for all evaluations and draws of labels.
    """
    network = saved.rebuild(start.saved).to(device)
    chosen = [each.draw_labels() for each in evaluations]
    needed = torch.cat([index for draws in chosen for index in draws]).unique()  # in order
    mean, std, num_classes = train.mean, train.std, len(train.classes)
    features, tests = (
        probes.compute_outputs(network.embed, images, device, args.precision, mean, std)
        for images in (train if len(needed) == len(train) else train.subset(needed), test)
    )
    labels, test_labels = train.labels[needed].to(device), test.labels.to(device)
    accuracy = PROBES[args.protocol]
    for draws in chosen:
        accuracies = []
        for index in draws:
            rows = torch.searchsorted(needed, index).to(device)
            accuracies.append(
                accuracy(features[rows], labels[rows], tests, test_labels, num_classes)
            )
        yield statistics.fmean(accuracies)


@restore_backends()
def main(argv):
    args = parse_args(argv)
    start, started = starting_weights.load(args), time.monotonic()
    harmless = registry.bf16_is_harmless(start.saved["meta"].get("method"))
    resolve_precision(args, args.protocol == "full" and harmless)
    device = select_device(args, multi_process=args.protocol == "full")
    size = start.saved["image_size"]
    train = load_images(args.dataset, "train", size, args.data_root, labels=True)
    test = load_images(args.dataset, "test", size, args.data_root, labels=True)
    missing, target = [], None
    if args.protocol == "r2":
        path = args.target_network or default_path(args.run_root, train.name)
        target = load_target(path, train, device, args.precision)
    for labels in label_choices(args):
        evaluation = Evaluation(args, start, train, test, *labels, target)
        key = evaluation.key
        if line := distributed.run_on_main(lambda key=key: results.find(start.folder, key)):
            print(f"{results.format_line(line)} (already in results.jsonl)")
        else:
            missing.append(evaluation)
    if not missing:
        return

    if args.protocol in PROBES:
        accuracies = probe(missing, start, train, test, args, device)
    elif args.protocol == "head":
        accuracies = (each.head_accuracy(device) for each in missing)
    elif args.protocol == "r2":
        accuracies = (each.r2(device) for each in missing)
    else:
        accuracies = (each.fine_tune(device) for each in missing)
    for evaluation, accuracy in zip(missing, accuracies, strict=True):
        line = start.result_line(
            evaluation.changed,
            device,
            args.precision,
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
        choices=["full", "linear", "knn", "head", "r2"],
        default="full",
        help="evaluation protocol, see above (default: full)",
    )
    parser.groups["data"].add_argument(
        "--target-network",
        type=Path,
        help="with --protocol r2: target.pt (default: that of the data set, seed 0)",
    )
    few = parser.groups["data"].add_mutually_exclusive_group()
    few.add_argument(
        "--labels-per-class",
        nargs="+",
        type=cli.positive_int,
        default=[],
        metavar="N",
        help="train on N images per class; several values give one evaluation each",
    )
    few.add_argument(
        "--label-fraction",
        nargs="+",
        type=cli.fraction,
        default=[],
        metavar="F",
        help="train on this fraction of each class; several values give one evaluation each",
    )
    parser.groups["data"].add_argument(
        "--label-draws",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="linear and knn with few labels: mean accuracy of N random choices of the labels "
        "(default: 1)",
    )
    cli.add_settings(parser, preset(preset_name(cli.peek_flag("dataset", argv)), "finetune"), HELP)
    args = parser.parse_args(argv)
    if args.protocol in ("head", "r2") and (args.labels_per_class or args.label_fraction):
        parser.error(f"--protocol {args.protocol} trains on no labels")
    if args.protocol != "full":
        cli.refuse_flags(parser, argv, HELP, f"has no effect with --protocol {args.protocol}")
    if 0 in args.label_fraction:
        parser.error("--label-fraction 0: must be above 0")
    if args.protocol == "full" and len(label_choices(args)) > 1 and distributed.world_size() > 1:
        parser.error("with several processes, give one number of labels per command")
    few = args.labels_per_class or args.label_fraction
    if args.label_draws > 1 and not (few and args.protocol in PROBES):
        parser.error("--label-draws requires a probe with --labels-per-class or --label-fraction")
    if args.target_network and args.protocol != "r2":
        parser.error("--target-network requires --protocol r2")
    return args


if __name__ == "__main__":
    cli.run(main)
