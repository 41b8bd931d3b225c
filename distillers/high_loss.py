"""Real images whose target features are fitted worst by networks after one epoch.

    python -m distillers high_loss --source cifar100

Joshi, Ni and Mirzasoleiman, "Dataset Distillation via Knowledge Distillation: Towards Efficient
Self-Supervised Pre-Training of Deep Networks", ICLR 2025. MKDT starts from these images. --experts
networks f are fitted to the target features z_i of all source images x_i. They are trained by SGD
on the mean squared error for one epoch, without augmentation. The set consists of the m images with
the largest error || f(x_i) - z_i ||^2 / d_y, averaged over the networks and sorted from the
largest. Their targets are z_i.

Needs a target network and no labels. The networks are not stored. Seed s trains the networks
s * experts to (s + 1) * experts - 1, so that different seeds share no network. With seed 0 and the
same settings, this is the set that mkdt starts from. The command prints the error of the chosen
images and that of random images.
"""

import torch

from data.subsets import random_subset
from distillers import experts
from distillers.experts import Learner
from distillers.method import Method, make_distilled
from utils.run import Tensors

HELP = experts.HELP | dict(
    arch="network that is fitted to the features",
    width="factor on the network's hidden widths",
    experts="number of networks over which the error is averaged",
)


def select_hardest(errors, m):
    """Return the indices (m,) of the m largest `errors` (n,), largest first; ties in order."""
    return errors.argsort(descending=True, stable=True)[:m]


def distill(source, chosen, target, args, run, device):
    features = target.features_of(source)  # (n, d_y)
    learner = Learner(source, features, features.shape[1], args, device)
    errors = torch.zeros(len(source), dtype=torch.float64)  # sum over the experts so far
    run.resume(device, dict(learner=learner, errors=Tensors(errors=errors)))
    per_epoch = learner.batches.per_epoch
    for step in run.steps("experts", args.experts * per_epoch):
        k, batch = divmod(step, per_epoch)
        if batch == 0:
            learner.begin(args.seed * args.experts + k)
        run.log(step, loss=learner.step())
        if batch == per_epoch - 1:
            errors += learner.measure_errors()
    errors /= args.experts
    index = select_hardest(errors, args.num_images)
    random, highest = errors[chosen].mean().item(), errors[index].mean().item()
    print(
        f"mean squared error after one epoch: random images {random:.4f}, "
        f"chosen images {highest:.4f}"
    )
    x, meta = source.normalised(index, device), dict(initial=index.tolist())
    return make_distilled(x, features[index], "feature", source, **meta)


METHOD = Method("high_loss", distill, HELP, __doc__, random_subset)
