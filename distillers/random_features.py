"""Random real images with the target network's features (Algorithm 1, lines 3 and 4).

    python -m distillers random_features --source tinyimagenet

Needs no labels. With the same seed, distill.py starts from exactly these images and targets. The
difference between the two sets is what distillation has learned.
"""

from distillers.method import Method, make_distilled


def distill(source, chosen, target, args, run, device):
    x, y = source.normalised(chosen, device), target.features_at(source, chosen)
    return make_distilled(x, y, "feature", source)


METHOD = Method("random_features", distill, {}, doc=__doc__)
