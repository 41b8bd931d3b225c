"""Matching of training trajectories, as used by mtt and mkdt.

Experts are networks trained on the source. Their parameters theta*_t after each epoch t are stored.
A step draws an expert and an epoch t below --max-start. Starting from theta*_t, it takes N steps of
gradient descent on the distilled set with a learned learning rate. It then minimises

    || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2

(Cazenavette et al., CVPR 2022, equation 2) over the images and the learning rate, and over the
targets if they are features.
"""

from itertools import chain

import torch
from torch.func import functional_call

import models
from data.augment import diff_augment
from data.loading import gather
from distillers import experts, method
from distillers.experts import fit_loss
from distillers.labelled import MEASUREMENT_SEED, build_untrained
from distillers.unroll import backpropagate, descend, flatten_parameters, unflatten_parameters
from utils import files, optim
from utils.device import autocast
from utils.run import Run, Tensors, settings_digest
from utils.sampling import Batches, Randomness

HELP = experts.HELP | dict(
    arch="network, with instance norm",
    width="factor on the network's hidden widths",
    outer_steps="updates of the distilled set",
    outer_lr="SGD learning rate of the images (momentum 0.5)",
    rate_lr="SGD learning rate of the learned learning rate (momentum 0.5)",
    inner_steps="N, training steps on the distilled set",
    inner_batch="distilled images per inner step",
    match_epochs="M, epochs of an expert that N inner steps match",
    max_start="the inner steps start from an epoch of an expert below this",
    experts="number of networks trained on the source",
    expert_lr="SGD learning rate of the experts, and initial value of the learned one",
)
EXPERT = (
    "arch",
    "width",
    "image_size",
    "precision",
    *experts.HELP,
)  # settings that determine an expert
LEAST_RATE = (
    1e-3  # the learned rate stays above this multiple of its initial value, so it is positive
)
MEASUREMENT_STARTS = 10


def inner_gradient(network, theta, x, y, precision="fp32", create_graph=False):
    """Return the gradient (p,) of `fit_loss` with respect to the parameters at `theta` (p,).

    `x` (b, 3, S, S) are images and `y` (b, ...) their targets.
    """
    with autocast(x.device, precision):
        predicted = functional_call(network, unflatten_parameters(theta, network), (x,))
    loss = fit_loss(predicted.to(theta.dtype), y)
    return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]


def matching_loss(network, start, goal, batches, rate, precision="fp32"):
    """Return the loss above after one inner step per batch, and its gradients.

    Args:
        network: network of the experts.
        start: theta*_t (p,).
        goal: theta*_{t+M} (p,).
        batches: list of pairs of images (b, 3, S, S) and targets (b, ...).
        rate: learning rate ().
        precision: "fp32" or "bf16".

    Returns:
        The loss (). For each batch, the list of gradients with respect to the images and, if they
        are features, the targets. The gradient () with respect to the rate.
    """
    rate = rate.detach()

    def gradient(theta, batch, create_graph):
        return inner_gradient(network, theta, *batch, precision, create_graph)

    thetas = descend(gradient, start, batches, rate)
    scale, error = (start - goal).square().sum(), thetas[-1] - goal
    by_batch, by_rate = backpropagate(gradient, thetas, batches, rate, 2 * error / scale)
    return error.square().sum() / scale, by_batch, by_rate


class Experts:
    """Experts 0 to `args.experts` - 1; missing experts are trained and stored.

    The experts are stored next to the method's folder.

    Args:
        run: the `Run` of the method.
        args: settings of the method.
        learner: the `Learner` that trains the experts.
        targets_name: identifies the learner's targets among other targets of the source.

    Attributes:
        trajectories: for each expert, its parameters after 0, 1, 2, ... epochs,
            (epochs + 1, p) float32, memory-mapped.
        errors: mean over experts of `Learner.measure_errors` after the first epoch, (n,) float64;
            None if the targets are classes.

    Raises:
        UserError: the network has batch norm.
    """

    def __init__(self, run, args, learner, targets_name):
        self.args, self.learner = args, learner
        self.network = build_untrained(args, learner.source, learner.num_outputs, learner.device)
        self.epochs = (
            args.max_start - 1 + args.match_epochs
        )  # the last epoch that a matching can reach
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
        """Load the file of expert k; train the expert first if the file does not exist."""
        folder, args = self.folder / f"seed{k}", self.args
        self.folder.mkdir(parents=True, exist_ok=True)
        # Runs with other seeds or numbers of images share the experts.
        with files.wait_for_lock(self.folder / f"seed{k}.lock"):
            run = Run(
                folder,
                "expert.pt",
                self.settings,
                args.log_every,
                args.tensorboard,
                self.learner.device,
            )
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
    """Random draws of an expert, a start epoch, and inner batches from m images."""

    def __init__(self, experts, m, args, randomness):
        self.experts, self.args, self.randomness = experts, args, randomness
        self.order = Batches(m, args.inner_batch or m, randomness.cpu)

    def next(self, x_syn, y_syn):
        """Return theta*_t, theta*_{t+M} and the batches for `matching_loss`."""
        cpu, trajectories = self.randomness.cpu, self.experts.trajectories
        trajectory = trajectories[int(torch.randint(len(trajectories), (), generator=cpu))]
        t = int(torch.randint(self.args.max_start, (), generator=cpu))
        start, goal = (
            trajectory[epoch].to(x_syn.device, non_blocking=True)
            for epoch in (t, t + self.args.match_epochs)
        )
        batches = []
        for _ in range(self.args.inner_steps):
            index = self.order.next()
            x = gather(x_syn, index)
            if self.experts.learner.augment:
                x = diff_augment(x, self.randomness.device)
            batches.append((x, gather(y_syn, index)))
        return start, goal, batches


def learn(experts, x_init, y_init, kind, args, run, device, **meta):
    """Learn a set from initial images and targets.

    Targets of kind feature are also learned, with learning rate `args.target_lr`.

    Args:
        experts: `Experts` to match.
        x_init: initial images (m, 3, S, S).
        y_init: initial targets (m, ...).
        kind: kind of the targets, "class" or "feature".
        args, run, device: as for `Method.distill`.
        meta: further meta of the result.

    Returns:
        A `Distilled` whose meta holds `meta`, the learned rate, and the loss of the initial and the
        distilled set.
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
    sgd = optim.make_optimizer("sgd", groups, args.outer_lr, weight_decay=0.0, momentum=0.5)
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
    """Return the loss of a set at learning rate `rate`, averaged over fixed random draws."""
    draws, total = Draws(experts, len(x), args, Randomness(MEASUREMENT_SEED, x.device)), 0.0

    def gradient(theta, batch, create_graph):
        return inner_gradient(experts.network, theta, *batch, args.precision)

    for _ in range(MEASUREMENT_STARTS):
        start, goal, batches = draws.next(x, y)
        end = descend(gradient, start, batches, rate)[-1]
        total += ((end - goal).square().sum() / (start - goal).square().sum()).item()
    return total / MEASUREMENT_STARTS
