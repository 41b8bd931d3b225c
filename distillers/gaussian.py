"""Gaussian noise instead of images: the lower baseline for knowledge distillation (Table 4).

    python -m distillers gaussian --source tinyimagenet
    python kd.py --weights none --arch convnet4 --image-size 64 --lr 1e-3 --dataset cifar10 \\
                 --distilled runs/tinyimagenet/gaussian/seed0/distilled.pt --teacher .../model.pt

Each value of the normalised images is drawn from N(0, 1). The set has no targets (kind `none`), so
a network cannot be pre-trained on it, and the student of kd.py starts from random weights. kd.py
draws the same number of new noise images at each step, as in the released code. The learning rate
of this row in the released code is 1e-3.

Needs neither labels nor a target network. Only the image size and the statistics of the source are
used.
"""

import torch

from distillers.method import Method, make_distilled
from utils.sampling import Randomness


def distill(source, chosen, target, args, run, device):
    shape = (args.num_images, 3, source.image_size, source.image_size)
    x = torch.randn(shape, generator=Randomness(args.seed, device).cpu)
    return make_distilled(x, torch.empty(len(x), 0), "none", source, fresh_noise=True)


def choose_nothing(source, m, seed):
    return None


METHOD = Method("gaussian", distill, {}, doc=__doc__, choose=choose_nothing)
