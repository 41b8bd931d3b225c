"""Real images nearest to the k-means centroids in the target network's feature space.

    python -m distillers kmeans --source cifar100

k-means finds centroids c_j that minimise sum_i min_j ||g_phi(x_i) - c_j||^2, with k-means++
initialisation and Lloyd's iterations. The set consists of the real image nearest to each centroid,
without repetition. If the source has labels, there are m / classes centroids for each class, and
the targets are the classes. If it has none, or with --ignore-labels, there are m centroids over all
images, and the targets are the target network's features.

Needs a target network; labels are optional. The paper takes this baseline from DC-BENCH (Cui et
al., 2022), "in feature space of the source data set". Neither says which feature space. Here it is
that of g_phi, which is available for every source. On a CPU the command takes seconds for the
digits and minutes for TinyImageNet. It writes no checkpoints.

The command prints the mean squared distance of the source's features to those of the nearest chosen
image (of the same class), for random images and for the chosen ones.
"""

import torch

from data.subsets import balanced_subset, random_subset
from distillers.method import Method, make_distilled
from utils import progress

# Pairs of an image and a centroid; about 2 s per iteration on two CPU cores at 512 features.
MOST_PAIRS = 10**8
ROWS = 1024  # features compared at a time with all chosen ones


def fit_centroids(features, k, seed):
    """Return the k-means centroids (k, d) of `features` (n, d), computed on the CPU.

    Each iteration uses all features if n * k is at most `MOST_PAIRS`, and a mini-batch otherwise
    (Sculley, 2010).
    """
    from sklearn.cluster import (  # imported here, because it takes a second
        KMeans,
        MiniBatchKMeans,
    )

    if len(features) * k > MOST_PAIRS:
        fit = MiniBatchKMeans(k, batch_size=max(1024, 2 * k), n_init=1, random_state=seed)
    else:
        fit = KMeans(k, n_init=1, random_state=seed)
    return torch.from_numpy(fit.fit(features.numpy()).cluster_centers_).to(features)


def nearest_distinct(features, centres):
    """Return the index of the nearest row of `features` (n, d) for each centre: (k,) int64.

    `centres` (k, d) are processed in order. Rows taken by earlier centres are excluded.
    """
    free, chosen = torch.ones(len(features), dtype=torch.bool), []
    for centre in centres:
        distance = torch.cdist(centre[None], features, compute_mode="donot_use_mm_for_euclid_dist")[
            0
        ]  # (n,)
        chosen.append(int(torch.where(free, distance, torch.inf).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


def sum_distances(features, chosen):
    """Return the sum of squared distances of `features` (n, d) to the nearest `chosen` (k, d)."""
    return sum(
        torch.cdist(part, chosen).amin(1).square().sum().item() for part in features.split(ROWS)
    )


def choose_random(source, m, seed):
    """Return indices (m,) of random real images for comparison, balanced if there are labels."""
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
    for members, random in zip(
        progress.progress_bar(groups, desc="k-means"), chosen.split(k), strict=True
    ):
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
        "--ignore-labels", action="store_true", help="do not use the labels of the source"
    )


METHOD = Method("kmeans", distill, {}, doc=__doc__, choose=choose_random, add_flags=add_flags)
