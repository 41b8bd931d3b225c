"""Selection of images: a few labelled ones for training, or the initial images of a method."""

import math

import torch

from utils.errors import UserError

MOST = 5_000  # most images whose covariance `gaussian_images` uses


def few_labels(images, per_class, fraction, generator):
    """Draw images of each class.

    Args:
        images: labelled `ImageSet`.
        per_class: number of images per class, or 0.
        fraction: fraction of the images of each class, or 0. If both are 0, all images are used.
        generator: CPU generator.

    Returns:
        Sorted indices (k,) int64.

    Raises:
        UserError: if a class has fewer than `per_class` images.
    """
    if not per_class and not fraction:
        return torch.arange(len(images))
    chosen = []
    for label, name in enumerate(images.classes):
        members = (images.labels == label).nonzero()[:, 0]
        share = round(fraction * len(members), 6)  # 0.07 * 100 is above 7
        wanted = per_class or math.ceil(share)
        if wanted > len(members):
            raise UserError(
                f"{images.name}: class {name} has {len(members)} images, fewer than {wanted}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


def random_subset(source, m, seed):
    """Draw m distinct images uniformly; equal seeds give equal images for all methods.

    Args:
        source: `ImageSet`.
        m: number of images.
        seed: random seed.

    Returns:
        Indices (m,) int64.

    Raises:
        UserError: if the source has fewer than m images.
    """
    if m > len(source):
        raise UserError(f"--num-images {m}: {source.name} has only {len(source)} images")
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:m]


def used_subset(source, count, seed):
    """Draw the images of the source that a run uses, starting with those of `random_subset`.

    Args:
        source: `ImageSet`.
        count: number of images; 0 for all images, in order.
        seed: random seed.

    Returns:
        Indices (count,) int64.

    Raises:
        UserError: if the source has fewer than `count` images.
    """
    if not count:
        return torch.arange(len(source))
    if count > len(source):
        raise UserError(f"--source-images {count}: {source.name} has only {len(source)} images")
    return random_subset(source, count, seed)


def gaussian_images(source, used, m, generator):
    """Draw m images from the normal distribution with the mean and covariance of a source.

    An image is the mean plus a sum over at most `MOST` random images i of the source,
    w_i (x_i - mean) / sqrt(n), with weights w_i from N(0, 1). It shows none of them.

    Args:
        source: `ImageSet`.
        used: indices (n,) of the images that may be used.
        m: number of images.
        generator: CPU generator.

    Returns:
        Normalised images (m, 3, S, S) float32 on the CPU.
    """
    chosen = used[torch.randperm(len(used), generator=generator)[:MOST]]
    x = source.normalised(chosen, torch.device("cpu"))  # (n, 3, S, S)
    mean = x.mean(0)
    weights = torch.randn(m, len(x), generator=generator) / len(x) ** 0.5
    return mean + torch.einsum("mn,nchw->mchw", weights, x - mean)


def measurement_subset(source, m):
    """Draw m images for measuring an objective; all images if there are fewer.

    The seed is -1, which no run uses, so the draw is independent of a run's initial images.

    Args:
        source: sequence of images, or of their indices.
        m: number of images.

    Returns:
        Positions (k,) int64 in `source`.
    """
    generator = torch.Generator().manual_seed(-1)
    return torch.randperm(len(source), generator=generator)[:m]


def measured_subsets(source, used, m):
    """Draw images for measuring an objective on the source, and on images that a run does not use.

    Args:
        source: `ImageSet`.
        used: indices (n,) of the images that the run uses.
        m: number of images to draw from each part.

    Returns:
        {"source images": indices (k,) int64}, with "other images" if there are any.
    """
    unused = torch.ones(len(source), dtype=torch.bool)
    unused[used] = False
    parts = {"source images": used, "other images": unused.nonzero()[:, 0]}
    return {name: part[measurement_subset(part, m)] for name, part in parts.items() if len(part)}


def balanced_subset(source, m, seed):
    """Draw as `random_subset`, with m / c images of each of the c classes, in order of the classes.

    Raises:
        UserError: if m is not a multiple of c, or if the source has no labels.
    """
    if source.labels is None:
        raise UserError(f"{source.name} has no labels, which this method needs")
    if m % len(source.classes):
        raise UserError(
            f"--num-images {m}: not a multiple of {source.name}'s {len(source.classes)} classes"
        )
    chosen = few_labels(source, m // len(source.classes), 0.0, torch.Generator().manual_seed(seed))
    return chosen[source.labels[chosen].argsort(stable=True)]
