"""Real images nearest to the centroids of k-means in the target network's feature space.

    python -m distillers kmeans --source cifar100

k-means finds centroids c_j that minimise sum_i min_j ||g_phi(x_i) - c_j||^2 (k-means++ start,
Lloyd's iterations); the set is the nearest real image of each centroid, each image once. Where the
source has labels: m / classes centroids within each class, with the class as target. Where it has
none, or with --ignore-labels: m centroids over all images, with the target network's features as
targets.

Needs the target network, labels or not: the paper takes this baseline from DC-BENCH (Cui et al.,
2022) "in feature space of the source data set" and neither says which, so the space here is that of
g_phi, which is at hand for every source. Seconds for the digits, minutes for TinyImageNet, on a
CPU; it keeps no checkpoint. It prints the mean squared distance of the source's features to the
nearest chosen image (of their class), for random images and for these.
"""

import torch

from data.subsets import balanced_subset, random_subset
from distillers.method import Method, make_distilled
from utils import progress

# Pairs of an image and a centroid; about 2 s of two CPU cores an iteration at 512 features.
MOST_PAIRS = 10**8
ROWS = 1024  # features compared with all of the chosen at a time


def fit_centroids(features, k, seed):
    """The k-means centroids of `features` (n, d), on the CPU: (k, d).

    All of `features` in each iteration up to `MOST_PAIRS` = n * k; beyond that, mini-batches
    (Sculley, 2010).
    """
    from sklearn.cluster import (  # here, since scikit-learn takes a second to import
        KMeans,
        MiniBatchKMeans,
    )

    if len(features) * k > MOST_PAIRS:
        fit = MiniBatchKMeans(k, batch_size=max(1024, 2 * k), n_init=1, random_state=seed)
    else:
        fit = KMeans(k, n_init=1, random_state=seed)
    return torch.from_numpy(fit.fit(features.numpy()).cluster_centers_).to(features)


def nearest_distinct(features, centres):
    """For each of `centres` (k, d) in turn the nearest row of `features` (n, d) that none before
    took: (k,) int64."""
    free, chosen = torch.ones(len(features), dtype=torch.bool), []
    for centre in centres:
        distance = torch.cdist(centre[None], features, compute_mode="donot_use_mm_for_euclid_dist")[
            0
        ]  # (n,)
        chosen.append(int(torch.where(free, distance, torch.inf).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


def sum_distances(features, chosen):
    """Sum over the rows of `features` (n, d) of the squared distance to the nearest of `chosen` (k,
    d)."""
    return sum(
        torch.cdist(part, chosen).amin(1).square().sum().item() for part in features.split(ROWS)
    )


def choose_random(source, m, seed):
    """Indices (m,) of random real images, balanced where there are labels: only to compare with."""
    return (random_subset if source.labels is None else balanced_subset)(source, m, seed)


def distill(source, chosen, target, args, run, device):
    features = target.features_of(source)  # (n, d)
    labelled = source.labels is not None
    groups = (
        [(source.labels == c).nonzero()[:, 0] for c in range(len(source.classes))]
        if labelled
        else [None]
    )
    k, index, before, after = args.num_images // len(groups), [], 0.0, 0.0
    for members, random in zip(progress.bar(groups, desc="k-means"), chosen.split(k), strict=True):
        here = features[members] if labelled else features  # (n_c, d)
        nearest = nearest_distinct(here, fit_centroids(here, k, args.seed))
        index.append(members[nearest] if labelled else nearest)
        before += sum_distances(here, features[random]) / len(source)
        after += sum_distances(here, here[nearest]) / len(source)
    index = torch.cat(index)
    print(
        f"mean squared distance to the nearest chosen image: random {before:.4f}, k-means "
        f"{after:.4f}"
    )
    targets, kind = (source.labels[index], "class") if labelled else (features[index], "feature")
    measured = dict(objective_initial=before, objective_distilled=after, initial=index.tolist())
    return make_distilled(source.normalised(index, device), targets, kind, source, **measured)


def add_flags(parser):
    parser.add_argument(
        "--ignore-labels", action="store_true", help="treat the source as one without labels"
    )


METHOD = Method("kmeans", distill, {}, doc=__doc__, choose=choose_random, add_flags=add_flags)
