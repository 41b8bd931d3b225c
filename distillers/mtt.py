"""MTT: matching of training trajectories on distilled and real images.

    python -m distillers mtt --source cifar100

Cazenavette, Wang, Torralba, Efros and Zhu, "Dataset Distillation by Matching Training
Trajectories", CVPR 2022. A few training steps on the distilled images lead to the parameters that
epochs on the real images lead to. distillers/matching.py has the loss. Experts and inner steps
minimise the cross-entropy of augmented images.

Needs labels. Starts from the images of `random` with the same seed. The first run on a source
trains the experts and stores them in
runs/<source>/experts/<network and settings>/seed<k>/expert.pt. Later runs with the same expert
settings reuse them, also with other seeds. The experts are trained for only as many epochs as a
matching can reach. 100 experts take 4.4 GB for CIFAR-100 and 14 GB for TinyImageNet.

Images are normalised by the source's mean and standard deviation, without ZCA whitening. The set
holds the images of the last step; no step is selected by test accuracy. It stores the learned
learning rate of the inner steps, and pretrain.py uses it.
"""

from data.subsets import balanced_subset
from distillers import matching
from distillers.experts import Learner
from distillers.matching import Experts
from distillers.method import Method

HELP = matching.HELP | dict(inner_batch="distilled images per inner step; 0: all")


def distill(source, chosen, target, args, run, device):
    learner = Learner(source, source.labels, len(source.classes), args, device, augment=True)
    experts = Experts(run, args, learner, "labels")
    x_init, y_init = source.normalised(chosen, device), source.labels[chosen].to(device)
    return matching.learn(experts, x_init, y_init, "class", args, run, device)


METHOD = Method("mtt", distill, HELP, __doc__, balanced_subset)
