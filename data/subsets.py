"""Which images of a set: a few labelled ones to train on, or the m real images that a method starts
from."""

import math

import torch

from utils.errors import UserError


def few_labels(images, per_class, fraction, generator):
    """Indices of the labelled images to train on: `per_class` of each class, or a `fraction` of
    each, or all (0, 0).

    Raises UserError when a class has fewer than `per_class` images.
    """
    if not per_class and not fraction:
        return torch.arange(len(images))
    chosen = []
    for label, name in enumerate(images.classes):
        members = (images.labels == label).nonzero()[:, 0]
        wanted = per_class or math.ceil(fraction * len(members))
        if wanted > len(members):
            raise UserError(
                f"{images.name}: class {name} has {len(members)} images, fewer than {wanted}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


def random_subset(source, m, seed):
    """Indices (m,) of distinct images of an `ImageSet`, uniformly at random; the same for the same
    seed, whichever method asks. Raises UserError when there are fewer than m."""
    if m > len(source):
        raise UserError(f"--num-images {m}: {source.name} has only {len(source)} images")
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:m]


def held_out_subset(source, m):
    """Indices of m random images, or of all if there are fewer, to measure an objective with.

    Their seed, -1, is that of no run, so a run starts from other images.
    """
    return random_subset(source, min(m, len(source)), seed=-1)


def balanced_subset(source, m, seed):
    """As `random_subset`, with m / classes images of each class, in the order of the classes.
    Raises UserError where that is no whole number or where there are no labels."""
    if source.labels is None:
        raise UserError(f"{source.name} has no labels, which this method needs")
    if m % len(source.classes):
        raise UserError(
            f"--num-images {m}: not a multiple of {source.name}'s {len(source.classes)} classes"
        )
    chosen = few_labels(source, m // len(source.classes), 0.0, torch.Generator().manual_seed(seed))
    return chosen[source.labels[chosen].argsort(stable=True)]
