"""Random real images with the target network's features: what KRR-ST starts from (Algorithm 1,
lines 3 and 4).

    python -m distillers random_features --source tinyimagenet

Needs no labels. Under the same seed these are exactly the images and targets that distill.py starts
from, so the difference between the two is what distillation has learned.
"""

from distillers.method import Method, make_distilled


def distill(source, chosen, target, args, run, device):
    x, y = source.normalised(chosen, device), target.features_at(source, chosen)
    return make_distilled(x, y, "feature", source)


METHOD = Method("random_features", distill, {}, doc=__doc__)
