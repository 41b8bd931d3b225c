"""The naive bilevel problem of the paper (equation 1), with unrolled self-supervised training.

    python -m distillers ssl_bilevel --source tinyimagenet

Self-supervised training on the distilled images minimises a self-supervised loss on real images. L
is the Barlow Twins loss (Zbontar et al.) of two random views, divided by the width of the
embeddings. Each outer step draws an untrained network and projector theta_0 and a real mini-batch
X_t. It updates X_s with the gradient of

    L(theta_K; X_t),    theta_{k+1} = theta_k - inner_lr dL(theta_k; X_s)/dtheta,

through the K unrolled steps and through the views of X_s, which are redrawn in each step. Theorem 1
of the paper says that this gradient is biased, and `python -m experiments.bias` measures the bias.
This command allows a comparison with distill.py on the same source.

Needs neither labels nor a target network. Starts from the same images as distill.py. The set has no
targets (kind `none`), so pretrain.py cannot use it. kd.py can use the images. A step costs about
2 K forward and backward passes of a mini-batch of X_s; a third of them are repeated for the second
derivatives.
"""

from itertools import chain

import torch
from torch import nn
from torch.func import functional_call

import models
from data.augment import barlow_twins_view
from data.images import normalise, to_float
from data.loading import Loader, gather
from distillers import method
from distillers.labelled import MEASUREMENT_SEED
from distillers.method import Method
from distillers.unroll import backpropagate, descend, flatten_parameters, unflatten_parameters
from models.barlow_twins import barlow_twins_loss, check_batch_size, projector
from utils import optim
from utils.device import autocast
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network of the inner problem",
    width="factor on the network's hidden widths",
    outer_steps="updates of the distilled images",
    outer_lr="AdamW learning rate of the images, with linear decay",
    outer_batch="b, real images per mini-batch",
    inner_steps="K, training steps on the distilled images",
    inner_lr="SGD learning rate of the inner steps",
    inner_batch="distilled images per inner step; 0: all",
    projector_dim="width of the projector's three layers",
    off_diagonal="lambda, weight of the off-diagonal terms of the loss",
    crop_min="smallest area of a random crop, as a fraction of the image",
    jitter="probability of colour jitter",
    greyscale="probability of greyscale",
    solarise="probability of solarisation in the second view",
    flip="probability of a horizontal flip",
)
MEASUREMENT_STARTS = 10


def two_views(x, source, generator, args):
    """Return two random views of normalised images (b, 3, S, S), differentiably.

    The augmentations are those of the target network's training.
    """
    mean, std = (each.to(x, non_blocking=True)[:, None, None] for each in (source.mean, source.std))
    pixels = x * std + mean
    return [
        normalise(barlow_twins_view(pixels, generator, args, p), source.mean, source.std)
        for p in (0.0, args.solarise)
    ]


def ssl_loss(learner, theta, views, args):
    """Return the Barlow Twins loss () of two views with parameters `theta` (p,).

    `views` are two tensors (b, 3, S, S). The loss is divided by the width of the embeddings.
    """
    with autocast(theta.device, args.precision):
        z1, z2 = (
            functional_call(learner, unflatten_parameters(theta, learner), (x,)) for x in views
        )
    return barlow_twins_loss(z1, z2, args.off_diagonal, 1 / z1.shape[1])


def meta_gradient(learner, start, inner, outer, args):
    """Return equation 1 and its gradients after one training step per inner batch.

    Args:
        learner: network with projector.
        start: its initial parameters (p,).
        inner: list of pairs of views (b, 3, S, S) of distilled images, one per step.
        outer: two views (b, 3, S, S) of real images.
        args: settings.

    Returns:
        The loss () on `outer`. For each inner batch, the gradients with respect to both views.
    """

    def gradient(theta, views, create_graph):
        return torch.autograd.grad(
            ssl_loss(learner, theta, views, args), theta, create_graph=create_graph
        )[0]

    thetas = descend(gradient, start, inner, args.inner_lr)
    theta = thetas[-1].requires_grad_()
    loss = ssl_loss(learner, theta, outer, args)
    by_views, _ = backpropagate(
        gradient, thetas, inner, args.inner_lr, torch.autograd.grad(loss, theta)[0]
    )
    return loss.detach(), by_views


class Draws:
    """Random draws for outer steps: an untrained learner, views of distilled and real images."""

    def __init__(self, source, args, randomness, device):
        self.source, self.args, self.randomness, self.device = source, args, randomness, device
        self.order = Batches(
            args.num_images, args.inner_batch or args.num_images, randomness.cpu, drop_last=True
        )
        self.real = Batches(len(source), args.outer_batch, randomness.cpu, drop_last=True)
        check_batch_size(min(self.order.batch_size, self.real.batch_size), source)
        self.loader = Loader([source.pixels], self.real, device)

    def next(self, x_syn):
        """Return the learner, `start`, `inner` and `outer` for `meta_gradient`.

        `inner` holds views of `x_syn` (m, 3, S, S).
        """
        args, generator = self.args, self.randomness.device
        network = models.build(args.arch, self.source.image_size, 0, args.width)
        learner = nn.Sequential(network, projector(network.feature_dim, args.projector_dim))
        learner = learner.to(self.device, non_blocking=True)
        inner = [
            two_views(gather(x_syn, self.order.next()), self.source, generator, args)
            for _ in range(args.inner_steps)
        ]
        x_real = normalise(to_float(*self.loader.next()), self.source.mean, self.source.std)
        return (
            learner,
            flatten_parameters(learner),
            inner,
            two_views(x_real, self.source, generator, args),
        )


def distill(source, chosen, target, args, run, device):
    randomness = Randomness(args.seed, device)
    x_init = source.normalised(chosen, device)
    x_syn = x_init.clone().requires_grad_()
    draws = Draws(source, args, randomness, device)
    adamw = optim.make_optimizer("adamw", [x_syn], args.outer_lr, weight_decay=0.0)
    scheduler = optim.make_schedule(adamw, "linear", args.outer_steps)
    state = dict(
        optimizer=adamw,
        scheduler=scheduler,
        order=draws.order,
        real=draws.real,
        randomness=randomness,
    )
    run.resume(device, state | dict(learned=Tensors(x_syn=x_syn)))

    for step in run.steps("distil", args.outer_steps):
        learner, start, inner, outer = draws.next(x_syn)
        loss, by_views = meta_gradient(learner, start, inner, outer, args)
        adamw.zero_grad()
        torch.autograd.backward([*chain(*inner)], [*chain(*by_views)])
        run.log(
            step,
            loss=loss,
            gradient=x_syn.grad.square().mean().sqrt(),
            lr=scheduler.get_last_lr()[0],
        )
        adamw.step()
        scheduler.step()
        method.update_picture(run, args, step, lambda: make_distilled(x_syn, source))

    before, after = (measure_objective(x, source, args, device) for x in (x_init, x_syn.detach()))
    print(
        f"loss on real images after training: initial images {before:.4f}, distilled images "
        f"{after:.4f}"
    )
    return make_distilled(x_syn, source, objective_initial=before, objective_distilled=after)


def make_distilled(x_syn, source, **measured):
    return method.make_distilled(x_syn, torch.empty(len(x_syn), 0), "none", source, **measured)


def measure_objective(x, source, args, device):
    """Return the objective of images `x` (m, 3, S, S), averaged over fixed random draws."""
    draws, total = Draws(source, args, Randomness(MEASUREMENT_SEED, device), device), 0.0
    for _ in range(MEASUREMENT_STARTS):
        learner, start, inner, outer = draws.next(x)

        def gradient(theta, views, create_graph, learner=learner):
            return torch.autograd.grad(ssl_loss(learner, theta, views, args), theta)[0]

        total += ssl_loss(
            learner, descend(gradient, start, inner, args.inner_lr)[-1], outer, args
        ).item()
    return total / MEASUREMENT_STARTS


METHOD = Method("ssl_bilevel", distill, HELP, doc=__doc__)
