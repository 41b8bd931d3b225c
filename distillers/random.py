"""Random real images with their labels, the same number of each class: the simplest baseline.

    python -m distillers random --source cifar100

Needs labels. With the same seed, dsa, dm, mtt, frepo and kip start from these images.
"""

from data.subsets import balanced_subset
from distillers.method import Method, make_distilled


def distill(source, chosen, target, args, run, device):
    return make_distilled(source.normalised(chosen, device), source.labels[chosen], "class", source)


METHOD = Method("random", distill, {}, doc=__doc__, choose=balanced_subset)
