"""Random real images: what KRR-ST starts from (Algorithm 1, lines 3 and 4), and the first baseline.

    python -m distillers random --source tinyimagenet                          # with the target network's features
    python -m distillers random --source tinyimagenet --target-kind class      # with labels, the same number a class

With features and the same seed these are exactly the images and targets that distill.py starts from, so the
difference between the two is what distillation has learned.
"""

from pathlib import Path

import torch

from data.distilled import Distilled
from data.images import few_labels, load_images
from distillers.target import load_target
from utils import cli
from utils.errors import UserError
from utils.presets import preset
from utils.run import Run, versions


def random_subset(source, m, seed):
    """Indices (m,) of distinct images of an `ImageSet`, uniformly at random; the same for the same seed, whichever
    method asks. Raises UserError when there are fewer than m."""
    if m > len(source):
        raise UserError(f"--num-images {m}: {source.name} has only {len(source)} images")
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:m]


def balanced_subset(source, m, seed):
    """As `random_subset`, with m / classes images of each class. Raises UserError where that is no whole number."""
    if source.labels is None:
        raise UserError(f"--target-kind class: {source.name} has no labels")
    if m % len(source.classes):
        raise UserError(f"--num-images {m}: not a multiple of {source.name}'s {len(source.classes)} classes")
    return few_labels(source, m // len(source.classes), 0.0, torch.Generator().manual_seed(seed))


def main(argv):
    args = parse_args(argv)
    device = cli.device(args)
    source = load_images(args.source, "train", args.image_size, args.data_root)
    home, settings = args.run_root / source.name, cli.settings(args, source=source.name, target=None)
    if args.target_kind == "feature":
        target = load_target(args.target or home / "target" / "seed0" / "target.pt", source, device, args.precision)
        settings["target"] = target.digest
        index = random_subset(source, args.num_images, args.seed)
        targets, method = target.features(source.normalised(index, device)), "random_features"
    else:
        index = balanced_subset(source, args.num_images, args.seed)
        targets, method = source.labels[index], "random"
    run = Run(home / method / f"seed{args.seed}", "distilled.pt", settings)
    if run.finished:
        print(f"{run.artefact} is there already")
        return
    meta = dict(source=source.name, method=method, seed=args.seed, preset=args.preset, settings=run.settings,
                versions=versions())  # fmt: skip
    images = source.normalised(index, "cpu").contiguous()
    run.finish("distilled", Distilled(images, targets, args.target_kind, source.mean, source.std, meta).content())
    print(f"wrote {run.artefact}")


def parse_args(argv):
    parser, name = cli.source_parser(__doc__, argv)
    parser.add_argument("--target-kind", choices=["feature", "class"], default="feature")
    parser.add_argument("--target", type=Path, help="target.pt (default: that of the source, seed 0)")
    num_images = preset(name, "distill")["num_images"]
    parser.add_argument("--num-images", type=cli.positive_int, default=num_images, help=f"default: {num_images}")
    return parser.parse_args(argv)
