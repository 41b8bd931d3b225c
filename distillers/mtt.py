"""MTT: images on which a few steps of training lead where epochs of training on the real images
have led.

    python -m distillers mtt --source cifar100

Cazenavette, Wang, Torralba, Efros and Zhu, "Dataset Distillation by Matching Training
Trajectories", CVPR 2022, equation 2. Experts, networks trained on the source, have left their
parameters theta*_t after each epoch t. A step draws an expert and an epoch t below --max-start,
goes on from theta*_t by N steps of SGD on the distilled images, at a rate that is learned with
them, and follows the gradient of

    || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2.

Needs labels; starts from the images of `random` under the same seed. The first run on a source
trains the experts into runs/<source>/mtt_experts/<network and settings>/seed<k>/expert.pt: 100 of
them take 4.4 GB for CIFAR-100 and 14 GB for TinyImageNet. Later runs with the same settings of the
experts, whatever their seed, find them there. Images are normalised by the source's mean and
deviation, without ZCA whitening; the last ones are kept, none is chosen by test accuracy.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call

import models
from data.augment import diff_augment
from data.subsets import balanced_subset
from distillers import method
from distillers.labelled import MEASUREMENT_SEED, build_untrained
from distillers.method import Method
from distillers.unroll import backpropagate, descend, flatten_parameters, unflatten_parameters
from utils import files, optim
from utils.device import autocast
from utils.run import Run, Tensors, settings_digest
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network, one with instance norm",
    width="factor on its hidden widths",
    outer_steps="updates of the distilled images",
    outer_lr="SGD learning rate of the images, momentum 0.5",
    rate_lr="SGD learning rate of the rate of the inner steps, momentum 0.5",
    inner_steps="N, steps on the distilled images",
    inner_batch="distilled images in such a step; 0: all",
    match_epochs="M, epochs of an expert that they are to make up for",
    max_start="number of an expert's first epochs that they may start at",
    experts="networks trained on the source",
    expert_lr="SGD learning rate of the experts, and the first one of the inner steps",
    expert_batch="real images in a batch of theirs",
)
# The learned rate stays above this share of its first value, so that it stays positive.
LEAST_RATE = 1e-3
MEASUREMENT_STARTS = 10


def inner_gradient(network, theta, x, y, precision="fp32", create_graph=False):
    """Gradient (p,) of the cross-entropy on x (b, 3, S, S), y (b,) by the parameters, at `theta`
    (p,)."""
    with autocast(x.device, precision):
        predicted = functional_call(network, unflatten_parameters(theta, network), (x,))
    return torch.autograd.grad(
        F.cross_entropy(predicted.to(theta.dtype), y), theta, create_graph=create_graph
    )[0]


def matching_loss(network, start, goal, batches, rate, precision="fp32"):
    """Equation 2 after one inner step on each of `batches`, and its gradients.

    `start` theta*_t and `goal` theta*_{t+M} (p,); `batches` a list of x (b, 3, S, S) and y (b,);
    `rate` (). Returns the loss (), a list of its gradients by each x, and that by the rate.
    """
    rate = rate.detach()

    def gradient(theta, batch, create_graph):
        return inner_gradient(network, theta, *batch, precision, create_graph)

    thetas = descend(gradient, start, batches, rate)
    scale, error = (start - goal).square().sum(), thetas[-1] - goal
    by_batch, by_rate = backpropagate(gradient, thetas, batches, rate, 2 * error / scale)
    return error.square().sum() / scale, [by_x for (by_x,) in by_batch], by_rate


def load_or_train_expert(k, folder, source, args, device):
    """Expert k's parameters after 0, 1, 2, ... epochs: (epochs + 1, p) float32, mapped from its
    file.

    It is trained if the file is not there, for as many epochs as a matching can reach.
    """
    epochs = args.max_start - 1 + args.match_epochs
    names = ("arch", "width", "image_size", "precision", "expert_lr", "expert_batch")
    settings = {name: getattr(args, name) for name in names}
    settings |= dict(epochs=epochs, source=source.name, fingerprint=source.fingerprint)
    folder = (
        folder / f"{models.label(args.arch, args.width)}-{settings_digest(settings)}" / f"seed{k}"
    )
    run = Run(folder, "expert.pt", settings, args.log_every, args.tensorboard)
    if not run.finished:
        randomness = Randomness(k, device)
        network = build_untrained(args, source, len(source.classes), device)
        sgd = optim.optimizer(
            "sgd", network.parameters(), args.expert_lr, weight_decay=0.0, momentum=0.0
        )
        batches = Batches(len(source), args.expert_batch, randomness.cpu)
        trajectory = torch.zeros(epochs + 1, flatten_parameters(network).numel())
        trajectory[0] = flatten_parameters(network)
        kept = Tensors(trajectory=trajectory)
        run.resume(device, dict(network=network, batches=batches, randomness=randomness, kept=kept))
        for step in run.steps(f"expert {k}", epochs * batches.per_epoch):
            index = batches.next()
            with autocast(device, args.precision):
                predicted = network(
                    diff_augment(source.normalised(index, device), randomness.device)
                )
            loss = F.cross_entropy(predicted.float(), source.labels[index].to(device))
            sgd.zero_grad()
            loss.backward()
            run.log(step, loss=loss)
            sgd.step()
            if (step + 1) % batches.per_epoch == 0:
                trajectory[(step + 1) // batches.per_epoch] = flatten_parameters(network)
        run.finish("expert", {"trajectory": trajectory})
    return files.load(run.artefact, "expert", required=("trajectory",), mapped=True)["trajectory"]


class Draws:
    """Random matchings: an expert, an epoch to start at, and inner batches."""

    def __init__(self, experts, y_syn, args, randomness):
        self.experts, self.y_syn, self.args, self.randomness = experts, y_syn, args, randomness
        self.order = Batches(len(y_syn), args.inner_batch or len(y_syn), randomness.cpu)

    def next(self, x_syn):
        """theta*_t, theta*_{t+M} and the batches of `matching_loss`, whose images are augmented
        from `x_syn`."""
        cpu, device = self.randomness.cpu, x_syn.device
        trajectory = self.experts[int(torch.randint(len(self.experts), (), generator=cpu))]
        epoch = int(torch.randint(self.args.max_start, (), generator=cpu))
        start, goal = (trajectory[t].to(device) for t in (epoch, epoch + self.args.match_epochs))
        batches = []
        for _ in range(self.args.inner_steps):
            index = self.order.next().to(device)
            batches.append((diff_augment(x_syn[index], self.randomness.device), self.y_syn[index]))
        return start, goal, batches


def distill(source, chosen, target, args, run, device):
    folder = run.folder.parents[1] / "mtt_experts"
    experts = [load_or_train_expert(k, folder, source, args, device) for k in range(args.experts)]

    randomness = Randomness(args.seed, device)
    x_init, y_syn = source.normalised(chosen, device), source.labels[chosen].to(device)
    x_syn, rate = (
        x_init.clone().requires_grad_(),
        torch.tensor(args.expert_lr, device=device, requires_grad=True),
    )
    network = build_untrained(args, source, len(source.classes), device)
    draws = Draws(experts, y_syn, args, randomness)
    groups = [dict(params=[x_syn]), dict(params=[rate], lr=args.rate_lr)]
    sgd = optim.optimizer("sgd", groups, args.outer_lr, weight_decay=0.0, momentum=0.5)
    learned = Tensors(x_syn=x_syn, rate=rate)
    run.resume(
        device, dict(learned=learned, optimizer=sgd, order=draws.order, randomness=randomness)
    )

    for step in run.steps("distil", args.outer_steps):
        start, goal, batches = draws.next(x_syn)
        loss, by_x, rate.grad = matching_loss(network, start, goal, batches, rate, args.precision)
        x_syn.grad = None
        torch.autograd.backward([x for x, _ in batches], by_x)
        run.log(step, loss=loss, gradient=x_syn.grad.square().mean().sqrt(), rate=rate)
        sgd.step()
        with torch.no_grad():
            rate.clamp_(min=LEAST_RATE * args.expert_lr)
        method.update_picture(
            run, args, step, lambda: method.make_distilled(x_syn, y_syn, "class", source)
        )

    first = torch.tensor(args.expert_lr, device=device)
    before, after = (
        measure_objective(experts, network, x, y_syn, each, args, device)
        for x, each in ((x_init, first), (x_syn.detach(), rate.detach()))
    )
    print(f"distance to the experts: initial images {before:.4f}, distilled images {after:.4f}")
    return method.make_distilled(
        x_syn,
        y_syn,
        "class",
        source,
        objective_initial=before.item(),
        objective_distilled=after.item(),
        learned_rate=rate.item(),
    )


def measure_objective(experts, network, x, y_syn, rate, args, device):
    """The objective of images `x` at `rate`: a mean over draws that are the same at each call."""
    draws = Draws(experts, y_syn, args, Randomness(MEASUREMENT_SEED, device))
    starts = [draws.next(x) for _ in range(MEASUREMENT_STARTS)]
    return (
        sum(matching_loss(network, *start, rate, args.precision)[0] for start in starts)
        / MEASUREMENT_STARTS
    )


METHOD = Method("mtt", distill, HELP, doc=__doc__, choose=balanced_subset)
