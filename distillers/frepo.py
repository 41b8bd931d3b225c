"""FRePo: ridge regression on the features of a pool of networks predicts the real labels.

    python -m distillers frepo --source cifar100

Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression", NeurIPS 2022.
KRR-ST takes its ridge head and its pool from FRePo. In FRePo the targets are labels. With features
f of a network from the pool, k_rs = f(X_t) f(X_s)^T, k_ss = f(X_s) f(X_s)^T and C classes, each
step minimises

    mean_i 1/2 || y_i - [k_rs (k_ss + lambda I)^-1 Y_s]_i ||^2
        - mean_j min(top1(y_j) - top2(y_j), 1/C)

over the images X_s (m, 3, S, S) and labels Y_s (m, C). Here i runs over b real images with centred
one-hot labels y_i (1 - 1/C and -1/C), and lambda = 1e-6 trace(k_ss) / m. The second term keeps the
two largest entries of each learned label y_j apart. X_s is initialised with real images, and Y_s
with their centred one-hot labels divided by sqrt(C / 10). The networks of the pool differ in their
number of training steps. The drawn network then takes one Adam step on (X_s, Y_s), or is
reinitialised after 100 steps.

Needs labels and no target network. A step costs as much as one of distill.py. It differs from the
published recipe:
- The networks are those of KRR-ST. They have batch norm after each convolution, and the objective
  uses its running statistics.
- The images are not ZCA-whitened, as in the KRR-ST authors' rerun.
- No image is mirrored or augmented.
"""

import math

import torch

from data.images import normalise, to_float
from data.loading import Loader
from data.subsets import balanced_subset, measurement_subset
from distillers import method
from distillers.krr import LIMITS, centred_one_hot, ridge_predict
from distillers.method import Method, make_distilled
from distillers.pool import Pool, draw_subset
from utils import cli, optim
from utils.device import should_compile
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network of the pool members",
    width="factor on the network's hidden widths",
    outer_steps="updates of the distilled set",
    outer_lr="LAMB learning rate of images and labels, with cosine decay to a tenth",
    outer_batch="b, real images per mini-batch",
    pool_size="number of pool members",
    pool_steps="steps after which a member is reinitialised",
    pool_lr="Adam learning rate of the members",
    pool_batch="most distilled images in a training step of a member",
    ridge="lambda as a multiple of the mean of the kernel's diagonal",
)


def label_margin(y_syn):
    """Return minus the mean over labels (m, C) of the largest minus the second largest entry.

    The difference is clamped to 1/C.
    """
    first, second = y_syn.topk(2).values.unbind(1)
    return -(first - second).clamp(max=1 / y_syn.shape[1]).mean()


def objective(member, x_real, y_real, x_syn, y_syn, ridge, chunk=0, fallbacks=None):
    """Return the objective, a scalar tensor: the two terms above.

    Args:
        member: a `Member` of the pool.
        x_real, y_real: real images (b, 3, S, S) and their labels (b, C).
        x_syn, y_syn: distilled images (m, 3, S, S) and their labels (m, C).
        ridge: lambda as a multiple of trace(k_ss) / m.
        chunk: images per pass; 0: all.
        fallbacks: see `krr.solve`.
    """
    with torch.no_grad():
        f_real = member.embed(x_real, chunk)  # (b, d_h)
    f_syn = member.embed(x_syn, chunk)  # (m, d_h)
    predicted = ridge_predict(  # (b, C)
        f_real,
        f_syn,
        y_syn,
        ridge,
        per_image=True,
        bias=False,
        fallbacks=fallbacks,
        precision=member.precision,
    )
    return 0.5 * (predicted - y_real).square().sum(1).mean() + label_margin(y_syn)


def distill(source, chosen, target, args, run, device):
    """Learn images (m, 3, S, S) and labels (m, C), starting from the images at `chosen` (m,).

    Returns a `Distilled` whose meta holds the objective of the initial and the distilled set under
    the final pool.
    """
    randomness, classes = Randomness(args.seed, device), len(source.classes)

    order = Batches(len(source), args.outer_batch, randomness.cpu)
    loader = Loader([source.pixels, source.labels], order, device)

    def prepare(pixels, labels):
        """Return normalised images (b, 3, S, S) and centred labels (b, C)."""
        x = normalise(to_float(pixels), source.mean, source.std)
        return x, centred_one_hot(labels, classes)

    x_init, y_init = prepare(*loader.rows(chosen))
    y_init = y_init / math.sqrt(classes / 10)
    x_syn, y_syn = x_init.clone().requires_grad_(), y_init.clone().requires_grad_()

    pool = Pool(
        args.pool_size,
        args.pool_steps,
        randomness.cpu,
        arch=args.arch,
        image_size=source.image_size,
        num_outputs=classes,
        width=args.width,
        device=device,
        lr=args.pool_lr,
        weight_decay=0.0,
        precision=args.precision,
        optimizer="adam",
        compiled=should_compile(args, device),
    )
    lamb = optim.make_optimizer("lamb", [x_syn, y_syn], args.outer_lr)
    scheduler = optim.make_schedule(lamb, "cosine_to_tenth", args.outer_steps)
    learned = Tensors(x_syn=x_syn, y_syn=y_syn)
    run.resume(
        device,
        dict(
            learned=learned,
            pool=pool,
            optimizer=lamb,
            scheduler=scheduler,
            real=order,
            randomness=randomness,
        ),
    )

    def draw_batch(x, y):
        # The mean squared error of a training step is FRePo's half sum of squares times 2 / C.
        # Adam's step does not depend on a constant factor.
        return draw_subset(x, y, args.pool_batch, randomness.cpu)

    run.limits = LIMITS
    for _ in run.steps("initialise pool", sum(pool.ages)):
        pool.first_below_initial_age().train_step(*draw_batch(x_init, y_init))

    for step in run.steps("distil", args.outer_steps):
        x_real, y_real = prepare(*loader.next())
        member, fallbacks = pool.draw(randomness.cpu), []
        loss = objective(member, x_real, y_real, x_syn, y_syn, args.ridge, args.chunk, fallbacks)
        lamb.zero_grad()
        loss.backward()
        run.log(
            step,
            loss=loss,
            gradient=x_syn.grad.square().mean().sqrt(),
            larger_ridge=sum(fallbacks),
            lr=scheduler.get_last_lr()[0],
        )
        lamb.step()
        pool.advance(member, *draw_batch(x_syn, y_syn))
        scheduler.step()
        method.update_picture(run, args, step, lambda: make_distilled(x_syn, y_syn, "soft", source))

    x_measured, y_measured = prepare(*loader.rows(measurement_subset(source, args.outer_batch)))
    before, after = pool.mean_losses(
        lambda each, x, y: objective(each, x_measured, y_measured, x, y, args.ridge, args.chunk),
        (x_init, y_init),
        (x_syn, y_syn),
    )
    print(
        f"objective under the final pool: initial images {before:.4f}, distilled images {after:.4f}"
    )
    return make_distilled(
        x_syn, y_syn, "soft", source, objective_initial=before, objective_distilled=after
    )


def add_flags(parser):
    cli.add_chunk_flag(parser)
    cli.add_compile_flag(parser)


METHOD = Method(
    "frepo",
    distill,
    HELP,
    doc=__doc__,
    choose=balanced_subset,
    add_flags=add_flags,
)
