"""Stage 1: KRR-ST (Algorithm 1 of the paper): learn m images X_s and their target features Y_s from a source.

    python distill.py --source tinyimagenet
    python distill.py --source digits --num-images 20 --outer-steps 300

Needs runs/<source>/target/seed0/target.pt (pretrain_target.py). Writes runs/<source>/krr_st/seed0/: distilled.pt,
images.png, log.jsonl (outer loss and learning rate by step), and a checkpoint while it runs: after Ctrl-C the same
command goes on. At the end it prints the outer loss of the initial and of the distilled set under the final pool.
--reference takes the step as plainly as the paper has it, with the same losses, to compare with (README, "Speed").
"""

import torch
import torch.nn.functional as F

from data import augment
from data.images import normalise, unit
from data.loading import Loader
from data.subsets import random_subset
from distillers import method, reference
from distillers.krr import LIMITS, larger_ridges, ridge_predict
from distillers.method import Method
from distillers.pool import Pool
from utils import cli, optim, ranks
from utils.allocator import keep_freed_memory
from utils.errors import UserError
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network of the pool's members",
    width="factor on its hidden widths",
    outer_steps="updates of the distilled set",
    outer_lr="AdamW learning rate of images and targets, decayed linearly (D1)",
    outer_batch="b, real images in a mini-batch",
    pool_size="l, members of the pool",
    pool_steps="T, steps after which a member starts afresh",
    pool_lr="SGD learning rate of the members",
    pool_weight_decay="weight decay of the members",
    ridge="lambda as a factor on the trace of the kernel",
    ridge_per_image="divide lambda by m, as FRePo does (D2)",
    bias_column="append a one to the features before both kernels (D3)",
    keep_pool_count="never set a member's count back, as the released code does (D5)",
    raw_init="start from pixels in [0, 1] instead of normalised ones, as the released code does (D7)",
    augment_outer="crop and flip the real batch, as the released code does (D8)",
    random_targets="start Y_s from N(0, 1) instead of the target's features, as the paper's appendix E compares (D28)",
)


def outer_loss(member, x_real, y_real, x_syn, y_syn, args):
    """Equation 4, as a mean over all entries (D4): how well the ridge head on (X_s, Y_s) predicts g_phi(X_t)."""
    with torch.no_grad():
        f_real = member.embed(x_real, args.chunk)  # (b, d_h)
    f_syn = member.embed(x_syn, args.chunk)  # (m, d_h)
    predicted = ridge_predict(f_real, f_syn, y_syn, args.ridge, args.ridge_per_image, args.bias_column)  # (b, d_y)
    return F.mse_loss(predicted, y_real)


class RealBatches:
    """Mini-batches (x_real, y_real) of the source with their target features, taken from the cache where nothing is
    augmented."""

    def __init__(self, source, target, args, randomness, device):
        self.source, self.target = source, target
        self.generator = randomness.device if args.augment_outer else None
        if args.augment_outer:
            target.require_network()
        self.order = Batches(len(source), args.outer_batch, randomness.cpu)
        tensors = [source.pixels] if args.augment_outer else [source.pixels, target.features_of(source)]
        self.loader = Loader(tensors, self.order, device)

    def next(self):
        """x_real (b, 3, S, S) normalised and y_real (b, d_y)."""
        pixels, *features = self.loader.next()
        x = unit(pixels)
        if self.generator:
            x = augment.horizontal_flip(augment.random_crop(x, self.generator), self.generator)
        x = normalise(x, self.source.mean, self.source.std)
        return x, features[0] if features else self.target.features(x)


def distill(source, chosen, target, args, run, device):
    """Algorithm 1, from the images at `chosen` (m,): the learned images (m, 3, S, S) and features (m, d_y) as a
    `Distilled`, with the loss under the final pool before and after in its meta."""
    if args.reference and (args.precision != "fp32" or args.augment_outer):
        raise UserError("--reference goes with --precision fp32 and without --augment-outer")
    if args.pool_size % ranks.count():
        raise UserError(f"--pool-size {args.pool_size}: must be a multiple of the number of processes, {ranks.count()}")
    steps = args.outer_steps // (ranks.count() if args.steps_equal_samples else 1)
    randomness = Randomness(args.seed, device, own=True)
    kind, loss_of, layout = RealBatches, outer_loss, torch.channels_last
    if args.reference:
        kind, loss_of, layout = reference.RealBatches, reference.outer_loss, reference.FORMAT
        keep_freed_memory(False)
    real = kind(source, target, args, randomness, device)
    x_init = source.raw(chosen, device) if args.raw_init else source.normalised(chosen, device)  # line 3
    y_init = target.features_at(source, chosen)  # line 4
    if args.random_targets:
        y_init = torch.randn(y_init.shape, generator=randomness.device, device=device)
    x_init = x_init.contiguous(memory_format=layout)
    ranks.same([x_init, y_init])
    x_syn, y_syn = x_init.clone().requires_grad_(), y_init.clone().requires_grad_()

    pool = Pool(
        args.pool_size // ranks.count(), args.pool_steps, randomness.cpu,
        arch=args.arch, image_size=source.image_size, num_outputs=y_init.shape[1], width=args.width, device=device,
        lr=args.pool_lr, weight_decay=args.pool_weight_decay, precision=args.precision, memory_format=layout,
    )  # fmt: skip
    adamw = optim.optimizer("adamw", [x_syn, y_syn], args.outer_lr, weight_decay=0.0)
    scheduler = optim.schedule(adamw, "linear", steps)
    learned = Tensors(x_syn=x_syn, y_syn=y_syn)
    run.resume(
        device,
        dict(learned=learned, pool=pool, optimizer=adamw, scheduler=scheduler, real=real.order, randomness=randomness),
        own=("pool", "real", "randomness"),
    )

    run.limits = LIMITS
    for _ in run.steps("initialise pool", ranks.most(sum(pool.ages))):  # line 5
        if young := pool.below_age():  # else only other ranks have some
            young.train_step(x_init, y_init)

    for step in run.steps("distil", steps):  # line 6
        x_real, y_real = real.next()  # line 7
        member = pool.draw(randomness.cpu)  # line 8
        loss = loss_of(member, x_real, y_real, x_syn, y_syn, args)  # line 9
        adamw.zero_grad()
        loss.backward(inputs=[x_syn, y_syn])
        loss = loss.detach()
        ranks.average([x_syn.grad, y_syn.grad, loss])
        # Adam divides by the gradient's size plus 1e-8: a gradient near that would stall the images unseen (D4).
        gradient, lr = x_syn.grad.square().mean().sqrt(), scheduler.get_last_lr()[0]
        run.log(step, loss=loss, gradient=gradient, lr=lr, larger_ridge=larger_ridges(device))
        adamw.step()  # line 10
        pool.advance(member, x_syn.detach(), y_syn.detach(), args.keep_pool_count)  # lines 11-16
        scheduler.step()
        method.renew_picture(run, args, step, lambda: packed(x_syn, y_syn, source, args))

    # A seed of no run: another draw than the images that the set starts as.
    index = random_subset(source, min(args.outer_batch, len(source)), seed=-1)
    x_held = source.normalised(index, device)
    y_held = target.features_at(source, index)
    with torch.no_grad():
        losses = [
            torch.stack([loss_of(member, x_held, y_held, x, y, args) for member in pool.members]).mean()
            for x, y in ((x_init, y_init), (x_syn, y_syn))
        ]
    ranks.average(losses)
    before, after = (each.item() for each in losses)
    print(f"outer loss under the final pool: initial images {before:.4f}, distilled images {after:.4f}")
    return packed(x_syn, y_syn, source, args, outer_loss_initial=before, outer_loss_distilled=after)


def packed(x_syn, y_syn, source, args, **measured):
    """The learned set as every later stage reads it."""
    result = method.packed(x_syn, y_syn, "feature", source, **measured)
    if args.raw_init:
        result.mean, result.std = torch.zeros(3), torch.ones(3)
    return result


def add_flags(parser):
    cli.add_chunk(parser)
    parser.add_argument(
        "--steps-equal-samples", action="store_true",
        help="of several processes: so many steps fewer that all together see as many real images as one would",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="the plain, slow step, to compare with")


METHOD = Method(
    "krr_st", distill, HELP, stage="distill", doc=__doc__, needs_target=True, several=True, add_flags=add_flags
)


def main(argv):
    method.main(METHOD, argv)


if __name__ == "__main__":
    cli.run(main)
