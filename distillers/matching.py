"""Matching of training trajectories: what mtt and mkdt share.

Experts, networks trained on the source, leave their parameters theta*_t after each epoch t. A step
draws an expert and an epoch t below --max-start, goes on from theta*_t by N steps of plain gradient
descent on the distilled set, at a learned rate, and follows the gradient of

    || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2

(Cazenavette et al., CVPR 2022, equation 2) by the images, by the rate, and by the targets where
these are features.
"""

from itertools import chain

import torch
from torch.func import functional_call

import models
from data.augment import diff_augment
from distillers import experts, method
from distillers.experts import fit_loss
from distillers.labelled import MEASUREMENT_SEED, build_untrained
from distillers.unroll import backpropagate, descend, flatten_parameters, unflatten_parameters
from utils import files, optim
from utils.device import autocast
from utils.run import Run, Tensors, settings_digest
from utils.sampling import Batches, Randomness

HELP = experts.HELP | dict(
    arch="network, one with instance norm",
    width="factor on its hidden widths",
    outer_steps="updates of the distilled set",
    outer_lr="SGD learning rate of the images, momentum 0.5",
    rate_lr="SGD learning rate of the rate of the inner steps, momentum 0.5",
    inner_steps="N, steps on the distilled set",
    inner_batch="distilled images in such a step",
    match_epochs="M, epochs of an expert that they are to make up for",
    max_start="number of an expert's first epochs that they may start at",
    experts="networks trained on the source",
    expert_lr="SGD learning rate of the experts, and the first one of the inner steps",
)
EXPERT = ("arch", "width", "image_size", "precision", *experts.HELP)  # what decides an expert
LEAST_RATE = 1e-3  # of its first value: the learned rate stays above, so it stays positive
MEASUREMENT_STARTS = 10


def inner_gradient(network, theta, x, y, precision="fp32", create_graph=False):
    """Gradient (p,) by the parameters of the loss (`fit_loss`) on x (b, 3, S, S) and y (b, ...), at
    `theta` (p,)."""
    with autocast(x.device, precision):
        predicted = functional_call(network, unflatten_parameters(theta, network), (x,))
    loss = fit_loss(predicted.to(theta.dtype), y)
    return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]


def matching_loss(network, start, goal, batches, rate, precision="fp32"):
    """The loss above after one inner step on each of `batches`, and its gradients.

    `start` theta*_t and `goal` theta*_{t+M} (p,); `batches` a list of x (b, 3, S, S) and
    y (b, ...); `rate` (). Returns the loss (); for each batch a list of its gradients by x and,
    where y holds features, by y; and its gradient by the rate.
    """
    rate = rate.detach()

    def gradient(theta, batch, create_graph):
        return inner_gradient(network, theta, *batch, precision, create_graph)

    thetas = descend(gradient, start, batches, rate)
    scale, error = (start - goal).square().sum(), thetas[-1] - goal
    by_batch, by_rate = backpropagate(gradient, thetas, batches, rate, 2 * error / scale)
    return error.square().sum() / scale, by_batch, by_rate


class Experts:
    """Experts 0 to `args.experts` - 1 on the disk, trained where they are not there yet.

    `trajectories`: for each, its parameters after 0, 1, 2, ... epochs, (epochs + 1, p) float32,
    mapped from its file. `errors` (n,) float64: the experts' mean of `Learner.measure_errors` after
    the first epoch, or None where the targets are classes.

    `learner` trains them; `targets_name` tells its targets from others of the source. They lie
    beside the method's folder of `run`. Raises UserError for a network with batch norm.
    """

    def __init__(self, run, args, learner, targets_name):
        self.args, self.learner = args, learner
        self.network = build_untrained(args, learner.source, learner.num_outputs, learner.device)
        self.epochs = args.max_start - 1 + args.match_epochs  # as many as a matching can reach
        source, kept = learner.source, dict(targets=targets_name, augment=learner.augment)
        kept |= dict(epochs=self.epochs, source=source.name, fingerprint=source.fingerprint)
        self.settings = kept | {name: getattr(args, name) for name in EXPERT}
        label = f"{models.label(args.arch, args.width)}-{settings_digest(self.settings)}"
        self.folder = run.folder.parents[1] / "experts" / label
        contents = [self._content(k) for k in range(args.experts)]
        self.trajectories = [content["trajectory"] for content in contents]
        errors = [content["errors"] for content in contents]
        ranked = len(errors[0]) > 0
        self.errors = sum(each.double() for each in errors) / len(errors) if ranked else None

    def _content(self, k):
        """What expert k's file holds; it is trained if the file is not there."""
        folder, args = self.folder / f"seed{k}", self.args
        run = Run(folder, "expert.pt", self.settings, args.log_every, args.tensorboard)
        if not run.finished:
            self._train(k, run)
        return files.load(run.artefact, "expert", required=("trajectory", "errors"), mapped=True)

    def _train(self, k, run):
        learner = self.learner
        learner.begin(k)
        ranked = learner.targets.is_floating_point()
        trajectory = torch.zeros(self.epochs + 1, flatten_parameters(learner.network).numel())
        trajectory[0] = flatten_parameters(learner.network)
        errors = torch.zeros(len(learner.source) if ranked else 0)
        kept = Tensors(trajectory=trajectory, errors=errors)
        run.resume(learner.device, dict(learner=learner, kept=kept))
        per_epoch = learner.batches.per_epoch
        for step in run.steps(f"expert {k}", self.epochs * per_epoch):
            run.log(step, loss=learner.step())
            epoch, batch = divmod(step + 1, per_epoch)
            if batch == 0:
                trajectory[epoch] = flatten_parameters(learner.network)
            if (epoch, batch) == (1, 0) and ranked:
                errors.copy_(learner.measure_errors())
        run.finish("expert", {"trajectory": trajectory, "errors": errors})


class Draws:
    """Random matchings: an expert, an epoch to start at, and inner batches of m images."""

    def __init__(self, experts, m, args, randomness):
        self.experts, self.args, self.randomness = experts, args, randomness
        self.order = Batches(m, args.inner_batch or m, randomness.cpu)

    def next(self, x_syn, y_syn):
        """theta*_t, theta*_{t+M} and the batches of `matching_loss`."""
        cpu, trajectories = self.randomness.cpu, self.experts.trajectories
        trajectory = trajectories[int(torch.randint(len(trajectories), (), generator=cpu))]
        t = int(torch.randint(self.args.max_start, (), generator=cpu))
        start = trajectory[t].to(x_syn.device)
        goal = trajectory[t + self.args.match_epochs].to(x_syn.device)
        batches = []
        for _ in range(self.args.inner_steps):
            index = self.order.next().to(x_syn.device)
            x = x_syn[index]
            if self.experts.learner.augment:
                x = diff_augment(x, self.randomness.device)
            batches.append((x, y_syn[index]))
        return start, goal, batches


def learn(experts, x_init, y_init, kind, args, run, device, **meta):
    """The set learned from images `x_init` (m, 3, S, S) and targets `y_init` (m, ...) of `kind`, as
    a `Distilled` whose meta holds `meta`, the learned rate and the loss before and after.

    Targets of kind feature are learned too, at the rate `args.target_lr`.
    """
    randomness, source = Randomness(args.seed, device), experts.learner.source
    x_syn = x_init.clone().requires_grad_()
    y_syn = y_init.clone().requires_grad_(kind == "feature")
    rate = torch.tensor(args.expert_lr, device=device, requires_grad=True)
    learned = dict(x_syn=x_syn, rate=rate)
    groups = [dict(params=[x_syn]), dict(params=[rate], lr=args.rate_lr)]
    if kind == "feature":
        learned["y_syn"] = y_syn
        groups.append(dict(params=[y_syn], lr=args.target_lr))
    draws = Draws(experts, len(x_init), args, randomness)
    sgd = optim.optimizer("sgd", groups, args.outer_lr, weight_decay=0.0, momentum=0.5)
    parts = dict(optimizer=sgd, order=draws.order, randomness=randomness)
    run.resume(device, parts | dict(learned=Tensors(**learned)))

    def to_set(**measured):
        return method.make_distilled(x_syn, y_syn, kind, source, **meta, **measured)

    for step in run.steps("distil", args.outer_steps):
        start, goal, batches = draws.next(x_syn, y_syn)
        sgd.zero_grad()
        loss, gradients, rate.grad = matching_loss(
            experts.network, start, goal, batches, rate, args.precision
        )
        rows = [part for part in chain(*batches) if part.requires_grad]
        torch.autograd.backward(rows, [*chain(*gradients)])
        run.log(step, loss=loss, gradient=x_syn.grad.square().mean().sqrt(), rate=rate)
        sgd.step()
        with torch.no_grad():
            rate.clamp_(min=LEAST_RATE * args.expert_lr)
        method.update_picture(run, args, step, to_set)

    first = torch.tensor(args.expert_lr, device=device)
    before = measure_objective(experts, x_init, y_init, first, args)
    after = measure_objective(experts, x_syn.detach(), y_syn.detach(), rate.detach(), args)
    print(f"distance to the experts: initial set {before:.4f}, distilled set {after:.4f}")
    return to_set(objective_initial=before, objective_distilled=after, learned_rate=rate.item())


def measure_objective(experts, x, y, rate, args):
    """The loss of a set at `rate`, as a mean over draws that are the same at every call."""
    draws, total = Draws(experts, len(x), args, Randomness(MEASUREMENT_SEED, x.device)), 0.0

    def gradient(theta, batch, create_graph):
        return inner_gradient(experts.network, theta, *batch, args.precision)

    for _ in range(MEASUREMENT_STARTS):
        start, goal, batches = draws.next(x, y)
        end = descend(gradient, start, batches, rate)[-1]
        total += ((end - goal).square().sum() / (start - goal).square().sum()).item()
    return total / MEASUREMENT_STARTS
