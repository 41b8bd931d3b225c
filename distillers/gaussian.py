"""Gaussian noise in place of images: the floor of the paper's distillation of knowledge (Table 4).

    python -m distillers gaussian --source tinyimagenet
    python kd.py --weights none --arch convnet4 --image-size 64 --lr 1e-3 --dataset cifar10 \\
                 --distilled runs/tinyimagenet/gaussian/seed0/distilled.pt --teacher .../model.pt

Every value of the normalised images is a draw from N(0, 1). The set has no targets (kind `none`),
so nothing can be pre-trained on it and kd.py's student starts from scratch; kd.py draws new noise
of the same count at each step, as the released code does, where 1e-3 is the learning rate of this
row. Needs neither labels nor a target network, of the source only its size and statistics; takes no
time.
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
