"""MTT: images on which a few steps of training lead where epochs on the real images have led.

    python -m distillers mtt --source cifar100

Cazenavette, Wang, Torralba, Efros and Zhu, "Dataset Distillation by Matching Training
Trajectories", CVPR 2022; distillers/matching.py has the loss. Experts and inner steps minimise the
cross-entropy of augmented images.

Needs labels; starts from the images of `random` under the same seed. The first run on a source
trains the experts into runs/<source>/experts/<network and settings>/seed<k>/expert.pt, for no more
epochs than a matching can reach: 100 of them take 4.4 GB for CIFAR-100 and 14 GB for TinyImageNet.
Later runs with the same settings of the experts, whatever their seed, find them there. Images are
normalised by the source's mean and deviation, without ZCA whitening; the last ones are kept, none
is chosen by test accuracy. The set carries the learned rate of the inner steps, which pretrain.py
takes.
"""

from data.subsets import balanced_subset
from distillers import matching
from distillers.experts import Learner
from distillers.matching import Experts
from distillers.method import Method

HELP = matching.HELP | dict(inner_batch="distilled images in such a step; 0: all")


def distill(source, chosen, target, args, run, device):
    learner = Learner(source, source.labels, len(source.classes), args, device, augment=True)
    experts = Experts(run, args, learner, "labels")
    x_init, y_init = source.normalised(chosen, device), source.labels[chosen].to(device)
    return matching.learn(experts, x_init, y_init, "class", args, run, device)


METHOD = Method("mtt", distill, HELP, __doc__, balanced_subset)
