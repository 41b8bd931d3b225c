"""MKDT: images and target features on which a few steps of training lead where epochs of fitting
the target network on the real images have led.

    python -m distillers mkdt --source cifar100

Joshi, Ni and Mirzasoleiman, "Dataset Distillation via Knowledge Distillation: Towards Efficient
Self-Supervised Pre-Training of Deep Networks", ICLR 2025; distillers/matching.py has the loss.
Experts are fitted to the target network's features of all source images, by mean squared error and
without augmentation; so are the inner steps to the distilled targets. Images, targets and the rate
of the inner steps are learned. They start from the images that `high_loss` picks under seed 0 and
the target network's features of these.

Needs the target network, no labels. The first run on a source trains the experts into
runs/<source>/experts/<network and settings>/seed<k>/expert.pt, for no more epochs than a matching
can reach. Later runs with the same settings of the experts, whatever their seed, find them there.
The set carries the learned rate, which pretrain.py takes. Each step draws one of all experts, as
the paper says; the authors' released code stays with one.
"""

from data.subsets import random_subset
from distillers import matching
from distillers.experts import Learner
from distillers.high_loss import select_hardest
from distillers.matching import Experts
from distillers.method import Method

HELP = matching.HELP | dict(target_lr="SGD learning rate of the targets, momentum 0.5")


def distill(source, chosen, target, args, run, device):
    features = target.features_of(source)  # (n, d_y)
    learner = Learner(source, features, features.shape[1], args, device)
    experts = Experts(run, args, learner, target.digest)
    index = select_hardest(experts.errors, args.num_images)
    x_init, y_init = source.normalised(index, device), features[index].to(device)
    meta = dict(initial=index.tolist())
    return matching.learn(experts, x_init, y_init, "feature", args, run, device, **meta)


METHOD = Method("mkdt", distill, HELP, __doc__, random_subset)
