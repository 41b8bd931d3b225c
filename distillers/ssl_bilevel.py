"""The naive bilevel problem that the paper sets out from (equation 1): images on which
self-supervised training leads to a low self-supervised loss on real images.

    python -m distillers ssl_bilevel --source tinyimagenet

With L Zbontar et al.'s Barlow Twins loss of two random views, divided by the embeddings' width,
each outer step draws an untrained network and projector theta_0 and a real mini-batch, and follows
the gradient by X_s of

    L(theta_K; X_t),    theta_{k+1} = theta_k - inner_lr dL(theta_k; X_s)/dtheta,

through the K unrolled steps and the views of X_s, each drawn anew. The paper's Theorem 1 says that
such a gradient is biased; `python -m experiments.bias` measures that. Here it can be seen next to
distill.py under one source and log.

Needs neither labels nor a target network; starts from the images that distill.py starts from. Its
set has no targets (kind `none`): pretrain.py has nothing to fit, kd.py can use the images. A step
costs about 2 K passes forward and back of a mini-batch of X_s, a third of them a second time for
the second derivatives.
"""

from itertools import chain

import torch
from torch import nn
from torch.func import functional_call

import models
from data.augment import barlow_twins_view
from data.images import normalise, to_float
from data.loading import Loader
from distillers import method
from distillers.labelled import MEASUREMENT_SEED
from distillers.method import Method
from distillers.unroll import backpropagate, descend, flatten_parameters, unflatten_parameters
from models.barlow_twins import barlow_twins_loss, projector
from utils import optim
from utils.device import autocast
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network that is trained in the inner problem",
    width="factor on its hidden widths",
    outer_steps="updates of the distilled images",
    outer_lr="AdamW learning rate of the images, decayed linearly",
    outer_batch="b, real images in a mini-batch",
    inner_steps="K, steps on the distilled images",
    inner_lr="SGD learning rate of these steps",
    inner_batch="distilled images in such a step; 0: all",
    projector_dim="width of the projector's three layers",
    off_diagonal="weight lambda of the loss's off-diagonal terms",
    crop_min="smallest share of the image that a crop keeps",
    jitter="probability of colour jitter",
    greyscale="probability of greyscale",
    solarise="probability of solarisation in the second view",
    flip="probability of a horizontal flip",
)
MEASUREMENT_STARTS = 10


def two_views(x, source, generator, args):
    """Two random views of normalised images (b, 3, S, S), as the target network is trained with;
    differentiable."""
    mean, std = (each.to(x)[:, None, None] for each in (source.mean, source.std))
    pixels = x * std + mean
    return [
        normalise(barlow_twins_view(pixels, generator, args, p), source.mean, source.std)
        for p in (0.0, args.solarise)
    ]


def ssl_loss(learner, theta, views, args):
    """Barlow Twins of `views`, two (b, 3, S, S), with parameters `theta` (p,), divided by the
    embedding's width."""
    with autocast(theta.device, args.precision):
        z1, z2 = (
            functional_call(learner, unflatten_parameters(theta, learner), (x,)) for x in views
        )
    return barlow_twins_loss(z1, z2, args.off_diagonal, 1 / z1.shape[1])


def meta_gradient(learner, start, inner, outer, args):
    """Equation 1 after one step on each of `inner` from `start` (p,): the loss () on `outer`, and
    for each of `inner` its gradients by both views.

    `inner`: a list of two views (b, 3, S, S) of distilled images each; `outer`: two views of real
    ones.
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
    """Random outer steps: an untrained learner, views of distilled and of real images."""

    def __init__(self, source, args, randomness, device):
        self.source, self.args, self.randomness, self.device = source, args, randomness, device
        self.order = Batches(
            args.num_images, args.inner_batch or args.num_images, randomness.cpu, drop_last=True
        )
        self.real = Batches(len(source), args.outer_batch, randomness.cpu, drop_last=True)
        self.loader = Loader([source.pixels], self.real, device)

    def next(self, x_syn):
        """Learner, `start`, `inner` and `outer` of `meta_gradient`; the inner views are augmented
        from `x_syn`."""
        args, generator = self.args, self.randomness.device
        network = models.build(args.arch, self.source.image_size, 0, args.width)
        learner = nn.Sequential(network, projector(network.feature_dim, args.projector_dim)).to(
            self.device
        )
        inner = [
            two_views(x_syn[self.order.next().to(self.device)], self.source, generator, args)
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
    adamw = optim.optimizer("adamw", [x_syn], args.outer_lr, weight_decay=0.0)
    scheduler = optim.schedule(adamw, "linear", args.outer_steps)
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
    """The objective of images `x`, as a mean over draws that are the same at every call."""
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
