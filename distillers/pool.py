"""The model pool of Algorithm 1: networks that differ in their number of training steps."""

import copy
import warnings

import torch
import torch.nn.functional as F

import models
from data.loading import gather
from models.frozen import Frozen, Skeleton
from utils import distributed, optim
from utils.device import autocast


class Passes:
    """The forward passes of all networks of one architecture, possibly compiled (torch.compile).

    Compiled networks share one module and differ in the tensors that are passed to it, so each pass
    is compiled once for all members of a pool and for each size of a batch.

    Args:
        network: a `Network` of the architecture, which is not changed.
        compiled: compile the passes.
    """

    def __init__(self, network, compiled=False):
        self.skeleton = Skeleton(network, compiled)
        self._train = None
        if compiled:
            # Ridge regression needs full float32 (utils/device.py).
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            module = copy.deepcopy(network).train().to("meta")
            self._train = torch.compile(
                lambda tensors, x: torch.func.functional_call(module, tensors, (x,)), dynamic=False
            )

    def train(self, network, x):
        """Return the outputs (b, num_outputs) of `network` in train mode for x (b, 3, S, S)."""
        if self._train is None:
            return network.train()(x)
        return self._train(dict([*network.named_parameters(), *network.named_buffers()]), x)


class Member:
    """A pool member (omega, W, t): a network, its optimiser, and its number of training steps.

    `steps` counts the training steps since the last initialisation. `passes` are the `Passes` of
    another member of the same architecture; by default new ones are made, as `compiled` says.
    """

    def __init__(
        self,
        arch,
        image_size,
        num_outputs,
        width,
        device,
        lr,
        weight_decay,
        precision="fp32",
        optimizer="sgd",
        memory_format=torch.channels_last,
        compiled=False,
        passes=None,
    ):
        self._build = lambda: models.build(arch, image_size, num_outputs, width).to(
            device, memory_format=memory_format, non_blocking=True
        )
        self._optimizer = lambda network: optim.make_optimizer(
            optimizer, network.parameters(), lr, weight_decay
        )
        self.device, self.precision = device, precision
        self.passes, self.compiled = passes, compiled
        self.reset()

    def reset(self, keep_count=False):
        """Reinitialise the weights, the optimiser and the step count (line 15).

        `keep_count` does not reset the step count (D5 pool-reset).
        """
        self.network = self._build()
        self.passes = self.passes or Passes(self.network, self.compiled)
        self.frozen = Frozen(self.network, self.passes.skeleton)
        self.optimizer = self._optimizer(self.network)
        if not keep_count:
            self.steps = 0

    def train_step(self, x_syn, y_syn):
        """Take one step on the mean squared error of all given images (lines 12 and 13).

        `x_syn` (m, 3, S, S) are images and `y_syn` (m, d_y) their targets.
        """
        self.steps += 1
        with autocast(self.device, self.precision):
            predicted = self.passes.train(self.network, x_syn)
        loss = F.mse_loss(predicted.float(), y_syn)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def embed(self, x, chunk=0):
        """Return the features f_omega(x) (b, d_h) of images x (b, 3, S, S) in eval mode.

        They are differentiable in x but not in the weights (`Frozen`).
        """
        with autocast(self.device, self.precision):
            return self.frozen(x, chunk).float()

    def state_dict(self):
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state):
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


class Pool:
    """A pool of `size` members.

    Before distillation starts, each member is trained for its initial number of steps in `ages`,
    between 1 and T-1.
    """

    def __init__(self, size, max_steps, generator, **network):
        first = Member(**network)
        others = (Member(**network, passes=first.passes) for _ in range(size - 1))
        self.members = [first, *others]
        self.max_steps = max_steps
        self.ages = torch.randint(1, max(2, max_steps), (size,), generator=generator).tolist()

    def first_below_initial_age(self):
        """Return the first member with fewer steps than its initial age, or None."""
        return next(
            (each for each, age in zip(self.members, self.ages, strict=True) if each.steps < age),
            None,
        )

    def draw(self, generator):
        """Draw a member uniformly at random (line 8)."""
        return self.members[int(torch.randint(len(self.members), (), generator=generator))]

    def advance(self, member, x_syn, y_syn, keep_count=False):
        """Train a member for one step, or reinitialise it after T steps (lines 11 to 16)."""
        if member.steps < self.max_steps:
            member.train_step(x_syn, y_syn)
        else:
            member.reset(keep_count)

    @torch.no_grad()
    def mean_losses(self, loss, *sets):
        """Return the mean of `loss(member, x, y)` over all members of all ranks, for each set.

        `sets` are pairs (x, y). Returns a list of floats.
        """
        means = [torch.stack([loss(each, x, y) for each in self.members]).mean() for x, y in sets]
        distributed.all_reduce_mean(means)
        return [each.item() for each in means]

    def state_dict(self):
        return {"ages": self.ages, "members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state):
        self.ages = state["ages"]
        for member, each in zip(self.members, state["members"], strict=True):
            member.load_state_dict(each)


def draw_subset(x, y, count, generator):
    """Draw images x (m, 3, S, S) and their targets y (m, d) for a training step of a member.

    Returns `count` of them, in random order, without gradients; all of them, in order, if `count`
    is 0 or at least m.
    """
    x, y = x.detach(), y.detach()
    if not 0 < count < len(x):
        return x, y
    index = torch.randperm(len(x), generator=generator)[:count]
    return gather(x, index), gather(y, index)
