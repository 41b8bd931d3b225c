"""Experts: networks trained on the source.

mtt and mkdt match their parameters, and high_loss ranks images by their errors. Expert k is trained
with seed k, so with the same settings it is the same network for all methods. mtt and mkdt use the
first experts for every seed of a run. high_loss uses others for each seed.
"""

import torch
import torch.nn.functional as F

import models
from data.augment import diff_augment
from data.images import normalise, to_float
from data.loading import Loader
from evaluation.probes import BATCH, evaluation_mode
from utils import optim
from utils.device import autocast
from utils.sampling import Batches, Randomness

HELP = dict(
    expert_lr="SGD learning rate of the experts",
    expert_momentum="momentum of the experts",
    expert_weight_decay="weight decay of the experts",
    expert_batch="real images per batch of the experts",
)


def fit_loss(predicted, y):
    """Return the mean squared error for features `y` (b, d_y), cross-entropy for classes (b,)."""
    return F.mse_loss(predicted, y) if y.is_floating_point() else F.cross_entropy(predicted, y)


class Learner:
    """Trains experts: networks fitted to `targets` of the images of `source`.

    Args:
        source: an `ImageSet`.
        targets: features (n, d_y) or classes (n,).
        num_outputs: number of outputs of the network.
        args: has `arch`, `width`, `precision` and the settings in `HELP`.
        device: where to train.
        augment: use differentiable augmentation.
    """

    def __init__(self, source, targets, num_outputs, args, device, augment=False):
        self.source, self.targets, self.num_outputs = source, targets, num_outputs
        self.args, self.device, self.augment = args, device, augment
        self.loader = Loader([source.pixels, targets], None, device)
        self.begin(0)

    def begin(self, k):
        """Initialise expert k: weights, optimiser and order of the images."""
        args, source = self.args, self.source
        self.randomness = Randomness(k, self.device)
        network = models.build(args.arch, source.image_size, self.num_outputs, args.width)
        self.network = network.to(self.device, non_blocking=True).train()
        rates = (args.expert_lr, args.expert_weight_decay, args.expert_momentum)
        self.optimizer = optim.make_optimizer("sgd", self.network.parameters(), *rates)
        self.batches = Batches(len(source), args.expert_batch, self.randomness.cpu)
        self.loader.batches = self.batches

    def step(self):
        """Take the next step; return the loss () before the step."""
        pixels, y = self.loader.next()
        x = normalise(to_float(pixels), self.source.mean, self.source.std)
        if self.augment:
            x = diff_augment(x, self.randomness.device)
        with autocast(self.device, self.args.precision):
            predicted = self.network(x)
        loss = fit_loss(predicted.float(), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def measure_errors(self):
        """Return the mean squared error of each image's predicted features in eval mode: (n,)."""
        found = torch.empty(len(self.source))
        with evaluation_mode(self.network), autocast(self.device, self.args.precision):
            for index in torch.arange(len(self.source)).split(BATCH):
                predicted = self.network(self.source.normalised(index, self.device)).float()
                error = predicted - self.targets[index].to(self.device)
                found[index] = error.square().mean(1).cpu()
        return found

    def _parts(self):
        names = ("network", "optimizer", "batches", "randomness")
        return {name: getattr(self, name) for name in names}

    def state_dict(self):
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state):
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
