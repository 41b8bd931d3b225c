"""MKDT: trajectory matching of networks that are fitted to the target network's features.

    python -m distillers mkdt --source cifar100

Joshi, Ni and Mirzasoleiman, "Dataset Distillation via Knowledge Distillation: Towards Efficient
Self-Supervised Pre-Training of Deep Networks", ICLR 2025. distillers/matching.py has the loss.
Experts are fitted to the target features of all source images, and the inner steps to the distilled
targets. Both use the mean squared error and no augmentation. MKDT learns the images, the targets
and the learning rate of the inner steps. It starts from the images that `high_loss` selects with
seed 0 and from their target features.

Needs a target network and no labels. The first run on a source trains the experts and stores them
in runs/<source>/experts/<network and settings>/seed<k>/expert.pt. Later runs with the same expert
settings reuse them, also with other seeds. The experts are trained for only as many epochs as a
matching can reach.

The set stores the learned learning rate, and pretrain.py uses it. Each step draws one of all
experts, as in the paper. The authors' released code uses a single expert.
"""

from data.subsets import random_subset
from distillers import matching
from distillers.experts import Learner
from distillers.high_loss import select_hardest
from distillers.matching import Experts
from distillers.method import Method

HELP = matching.HELP | dict(target_lr="SGD learning rate of the targets (momentum 0.5)")


def distill(source, chosen, target, args, run, device):
    features = target.features_of(source)  # (n, d_y)
    learner = Learner(source, features, features.shape[1], args, device)
    experts = Experts(run, args, learner, target.digest)
    index = select_hardest(experts.errors, args.num_images)
    x_init, y_init = source.normalised(index, device), features[index].to(device)
    meta = dict(initial=index.tolist())
    return matching.learn(experts, x_init, y_init, "feature", args, run, device, **meta)


METHOD = Method("mkdt", distill, HELP, __doc__, random_subset)
