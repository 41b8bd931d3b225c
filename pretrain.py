"""Stage 2: pre-train a network on a distilled set.

    python pretrain.py --distilled runs/tinyimagenet/krr_st/seed0/distilled.pt --arch vgg11

The recipe follows from the set's kind of targets (feature, soft or class), whichever method made it. Writes
<the set's folder>/<arch>/seed<k>/model.pt, where k is the seed of this pre-training: the paper's three runs are three
pre-trainings of one distilled set. An hour of a CPU at most for 32 px and 1,000 images; seconds for the digits.
"""

from pathlib import Path

import torch.nn.functional as F

import models
from data.augment import diff_augment
from data.distilled import load_distilled
from models import saved
from utils import cli, files, optim
from utils.errors import UserError
from utils.presets import differences, preset
from utils.run import Run
from utils.sampling import Batches, Randomness

LOSSES = {
    "mse": F.mse_loss,  # mean over all entries (D4)
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


def pretrain(network, distilled, args, run, randomness, device):
    """Fit `network` to the distilled images and targets (equation 5)."""
    x_syn, y_syn = distilled.images.to(device), distilled.targets.to(device)
    batches = Batches(len(x_syn), args.batch_size, randomness.cpu)
    total = args.steps or args.epochs * batches.per_epoch
    optimizer = optim.optimizer(args.optimizer, network.parameters(), args.lr, args.weight_decay)
    scheduler = optim.schedule(optimizer, args.schedule, total, args.warmup)
    run.resume(
        device, dict(network=network, optimizer=optimizer, scheduler=scheduler, batches=batches, randomness=randomness)
    )
    network.train()
    for step in run.steps("pre-train", total):
        index = batches.next().to(device)
        x = diff_augment(x_syn[index], randomness.device) if args.augment else x_syn[index]
        with cli.autocast(device, args.precision):
            predicted = network(x)
        loss = LOSSES[args.loss](predicted.float(), y_syn[index])
        optimizer.zero_grad()
        loss.backward()
        run.log(step, loss=loss, gradient=optim.gradient_norm(network.parameters()))
        optimizer.step()
        scheduler.step()


def main(argv):
    args, distilled = parse_args(argv)
    device = cli.device(args)
    size = distilled.images.shape[-1]
    if size < models.SMALLEST_SIZE:
        raise UserError(f"{args.distilled}: images of {size} px; the networks take {models.SMALLEST_SIZE} px or more")
    settings = cli.settings(args, distilled=files.digest(args.distilled))
    folder = args.distilled.parent / models.label(args.arch, args.width) / f"seed{args.seed}"
    run = Run(folder, "model.pt", settings, args.log_every)
    if run.finished:
        print(f"{run.artefact} is there already")
        return
    randomness = Randomness(args.seed, device)
    outputs = distilled.num_outputs
    network = models.build(args.arch, size, outputs, args.width).to(device)
    pretrain(network, distilled, args, run, randomness, device)
    meta = {name: distilled.meta.get(name) for name in ("source", "method", "preset")}
    name = cli.preset_name(meta["source"])
    scale = differences(name, "pretrain", vars(args), distilled.target_kind, args.arch)
    scale = distilled.meta.get("scale", {}) | scale | differences(name, "distill", {"width": args.width})
    meta |= dict(seed=args.seed, distilled=settings["distilled"], distilled_seed=distilled.meta.get("seed"),
                 num_images=len(distilled.images), scale=scale, settings=run.settings)  # fmt: skip
    run.finish("model", saved.content(network, args.arch, args.width, size, outputs, meta))
    print(f"wrote {run.artefact}")


def parse_args(argv):
    parser = cli.parser(__doc__)
    parser.add_argument("--distilled", type=Path, required=True, help="distilled.pt of any method")
    parser.add_argument("--seed", type=cli.count, default=0)
    path = cli.early("distilled", argv)
    distilled = load_distilled(path) if path else None
    name = cli.preset_name(distilled.meta.get("preset") if distilled else None)
    network = {key: preset(name, "distill")[key] for key in ("arch", "width")}
    kind = distilled.target_kind if distilled else "feature"
    if kind == "none":
        raise UserError(f"{path}: images without targets, which nothing can be fitted to; they are for kd.py")
    recipe = preset(name, "pretrain", kind, cli.early("arch", argv, network["arch"]))
    flags = {key: value for key, value in recipe.items() if key in HELP and (key not in ("epochs", "steps") or value)}
    parser.set_defaults(**{key: value for key, value in recipe.items() if key not in flags})  # the kind decides these
    cli.add_settings(parser, network | flags, HELP)
    return parser.parse_args(argv), distilled


if __name__ == "__main__":
    cli.run(main)
