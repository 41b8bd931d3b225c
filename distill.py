"""Stage 1: KRR-ST, Algorithm 1 of the paper.

Learns m images X_s and their target features Y_s from an unlabelled source.

    python distill.py --source tinyimagenet
    python distill.py --source digits --num-images 20 --outer-steps 300

Reads runs/<source>/target/seed0/target.pt, which pretrain_target.py writes. Writes distilled.pt,
images.png and log.jsonl (outer loss and learning rate by step) to runs/<source>/krr_st/seed0/. A
run saves checkpoints: rerun the same command to resume after Ctrl-C. At the end, the script prints
the outer loss of the initial set and of the distilled set under the final pool.

--reference computes each step as the paper writes it, slowly and with the same losses, for
comparison (docs/speed.md). --bases U learns a low-rank set, which needs the storage of
--num-images plain images (distillers/low_rank.py). It is in runs/<source>/krr_st_low_rank/seed0/.
"""

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from data import augment
from data.images import normalise, to_float
from data.loading import Loader
from data.subsets import gaussian_images, measured_subsets, used_subset
from distillers import low_rank, method, reference
from distillers.krr import LIMITS, ridge_predict
from distillers.low_rank import LowRank, Plain
from distillers.method import Method
from distillers.pool import Pool, draw_subset
from distillers.reference import Step
from utils import cli, distributed, optim
from utils.device import should_compile
from utils.errors import UserError
from utils.presets import preset
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="architecture of the pool's members",
    width="factor on the network's hidden widths",
    outer_steps="number of updates of the distilled set",
    outer_lr="AdamW learning rate of images and targets, decayed linearly (D1 outer-lr)",
    outer_batch="b, number of real images per mini-batch",
    pool_size="l, number of networks in the pool",
    pool_steps="T, number of steps after which a member is reinitialised",
    pool_lr="SGD learning rate of the members",
    pool_weight_decay="weight decay of the members",
    ridge="lambda, as a multiple of the kernel's trace",
    ridge_per_image="divide lambda by m, as FRePo does (D2 ridge-per-image)",
    bias_column="append a constant 1 to the features of both kernels (D3 bias-column)",
    keep_pool_count="keep a member's step count when it is reinitialised, as the released code "
    "does (D5 pool-reset)",
    raw_init="start from pixels in [0, 1] instead of normalised pixels, as the released code does "
    "(D7 normalised-init)",
    augment_outer="randomly crop and flip the real images, as the released code does "
    "(D8 outer-augmentation)",
    pool_batch="number of distilled images, drawn at random, in a training step of a member; 0 for "
    "all",
    updates_per_batch="number of updates of the distilled set per mini-batch and drawn member; the "
    "features of the real images are computed once for all of them",
    averaged_steps="number of last steps whose X_s and Y_s are averaged; 0 to keep those of the "
    "last step",
    source_images="number of random images of the source to use, 0 for all; if not all, the outer "
    "loss on the others is measured too",
    random_targets="draw the initial Y_s from N(0, 1) instead of taking the target network's "
    "features, as in the paper's appendix E (D21 target-init)",
    random_images="draw the initial X_s from the normal distribution with the mean and covariance "
    "of the source's images instead of taking real images; the initial Y_s are the target "
    "network's features of real images (D22 image-init)",
    **low_rank.HELP,
)


def outer_loss(member, x_real, y_real, x_syn, y_syn, args, fallbacks=None, f_real=None):
    """Compute the outer loss, equation 4 of the paper, as a mean over all entries (D4 mean-loss).

    This is the error on (X_t, g_phi(X_t)) of the ridge head fitted to (X_s, Y_s).

    Args:
        member: network of the pool, f_omega.
        x_real: (b, 3, S, S) real images, normalised.
        y_real: (b, d_y) their target features.
        x_syn: (m, 3, S, S) distilled images.
        y_syn: (m, d_y) distilled targets.
        args: settings `chunk`, `ridge`, `ridge_per_image` and `bias_column`.
        fallbacks: as in `ridge_predict`.
        f_real: (b, d_h) features of `x_real`, if they are known.

    Returns:
        Scalar tensor, differentiable in `x_syn` and `y_syn`.
    """
    if f_real is None:
        f_real = embed_real(member, x_real, args)
    f_syn = member.embed(x_syn, args.chunk)  # (m, d_h)
    predicted = ridge_predict(  # (b, d_y)
        f_real,
        f_syn,
        y_syn,
        args.ridge,
        args.ridge_per_image,
        args.bias_column,
        fallbacks,
        member.precision,
    )
    return F.mse_loss(predicted, y_real)


@torch.no_grad()
def embed_real(member, x_real, args):
    """Return the features (b, d_h) of real images (b, 3, S, S)."""
    return member.embed(x_real, args.chunk)


class RealBatches:
    """Mini-batches of the source with their target features.

    The features are computed once. With augmentation they are computed for each batch. `used` (n,)
    are the indices of the images to use, by default all.
    """

    def __init__(self, source, target, args, randomness, device, used=None):
        self.source, self.target = source, target
        self.generator = randomness.device if args.augment_outer else None
        if args.augment_outer:
            target.require_network()
        tensors = [source.pixels] + ([] if args.augment_outer else [target.features_of(source)])
        if used is not None and len(used) < len(source):
            tensors = [each[used] for each in tensors]
        self.order = Batches(len(tensors[0]), args.outer_batch, randomness.cpu)
        self.loader = Loader(tensors, self.order, device)

    def next(self):
        """Return the next batch: x_real (b, 3, S, S), normalised, and y_real (b, d_y)."""
        pixels, *features = self.loader.next()
        x = to_float(pixels)
        if self.generator:
            x = augment.horizontal_flip(augment.random_crop(x, self.generator), self.generator)
        x = normalise(x, self.source.mean, self.source.std)
        return x, features[0] if features else self.target.features(x)


STEP = Step(RealBatches, outer_loss, torch.channels_last)


def distill(source, chosen, target, args, run, device):
    """Learn a distilled set with Algorithm 1 of the paper.

    Args:
        source: `ImageSet` of the real images.
        chosen: (m,) indices of the images that X_s starts from.
        target: `Target` of the source.
        args: parsed flags.
        run: `Run` that logs and saves checkpoints.
        device: torch device.

    Returns:
        `Distilled` with the learned images (m, 3, S, S) and features (m, d_y). Its meta holds the
        outer loss of the initial and of the learned set under the final pool.
    """
    outer_step = reference.STEP if args.reference else STEP
    world_size = distributed.world_size()
    steps = args.outer_steps // (world_size if args.steps_equal_samples else 1)
    randomness = Randomness(args.seed, device, per_rank=True)
    used = used_subset(source, args.source_images, args.seed)
    real = outer_step.batches(source, target, args, randomness, device, used)
    x_init = (source.raw if args.raw_init else source.normalised)(chosen, device)  # line 3
    if args.random_images:
        x_init = gaussian_images(source, used, len(chosen), randomness.cpu).to(device)
    y_init = target.features_at(source, chosen)  # line 4
    if args.random_targets:
        y_init = torch.randn(y_init.shape, generator=randomness.device, device=device)
    x_init = x_init.contiguous(memory_format=outer_step.memory_format)
    syn = LowRank(source, used, target, args, device) if args.bases else Plain(x_init, y_init)
    leaves = [*syn.learned.values()]
    distributed.broadcast([leaf.detach() for leaf in leaves])
    x_init, y_init = (each.detach().clone() for each in syn.compose())

    pool = Pool(
        args.pool_size // world_size,
        args.pool_steps,
        randomness.cpu,
        arch=args.arch,
        image_size=source.image_size,
        num_outputs=y_init.shape[1],
        width=args.width,
        device=device,
        lr=args.pool_lr,
        weight_decay=args.pool_weight_decay,
        precision=args.precision,
        memory_format=outer_step.memory_format,
        compiled=not args.reference and should_compile(args, device),
    )
    adamw = optim.make_optimizer("adamw", leaves, args.outer_lr, weight_decay=0.0)
    scheduler = optim.make_schedule(adamw, "linear", steps * args.updates_per_batch)
    state = dict(learned=Tensors(**syn.learned), optimizer=adamw, scheduler=scheduler)
    state |= dict(pool=pool, real=real.order, randomness=randomness) | syn.parts
    if args.averaged_steps:
        learned = torch.nn.ParameterDict(syn.learned)  # the same memory
        state["averaged"] = averaged = AveragedModel(learned)
    run.resume(device, state, per_rank=("pool", "real", "randomness"))

    def to_set(**measured):
        normalised = not args.raw_init
        result = method.make_distilled(*syn.compose(), "feature", source, normalised, **measured)
        result.factors = syn.collect_factors()
        return result

    run.limits = LIMITS
    for _ in run.steps("initialise pool", distributed.all_reduce_max(sum(pool.ages))):  # line 5
        if (
            young := pool.first_below_initial_age()
        ):  # None if all such members belong to other ranks
            young.train_step(*draw_subset(x_init, y_init, args.pool_batch, randomness.cpu))

    for step in run.steps("distil", steps):  # line 6
        x_real, y_real = real.next()  # line 7
        member, fallbacks = pool.draw(randomness.cpu), []  # line 8
        shared = {}
        if args.updates_per_batch > 1:
            shared["f_real"] = embed_real(member, x_real, args)
        for _ in range(args.updates_per_batch):
            loss = outer_step.loss(  # line 9
                member, x_real, y_real, *syn.compose(), args, fallbacks, **shared
            )
            adamw.zero_grad()
            loss.backward(inputs=leaves)
            loss = loss.detach()
            distributed.all_reduce_mean([*(leaf.grad for leaf in leaves), loss])
            # Adam divides by the gradient's magnitude plus 1e-8, so a gradient near 1e-8 would stop
            # the images from moving. The log shows it (D4 mean-loss).
            gradient, lr = leaves[0].grad.square().mean().sqrt(), scheduler.get_last_lr()[0]
            adamw.step()  # line 10
            scheduler.step()
        run.log(step, loss=loss, gradient=gradient, lr=lr, larger_ridge=sum(fallbacks))
        x_syn, y_syn = (each.detach() for each in syn.compose())
        part = draw_subset(x_syn, y_syn, args.pool_batch, randomness.cpu)
        pool.advance(member, *part, args.keep_pool_count)  # lines 11-16
        if step >= steps - args.averaged_steps:
            averaged.update_parameters(learned)
        method.update_picture(run, args, step, to_set)
    if args.averaged_steps:
        learned.load_state_dict(averaged.module.state_dict())

    facts = syn.finish(run)
    for name, index in measured_subsets(source, used, args.outer_batch).items():
        x, y = source.normalised(index, device), target.features_at(source, index)
        before, after = pool.mean_losses(
            lambda member, *pair, x=x, y=y: outer_step.loss(member, x, y, *pair, args),
            (x_init, y_init),
            syn.compose(),
        )
        print(
            f"outer loss under the final pool, {name}: initial set {before:.4f}, "
            f"distilled set {after:.4f}"
        )
        suffix = "_others" if name == "other images" else ""
        facts |= {f"outer_loss_initial{suffix}": before, f"outer_loss_distilled{suffix}": after}
    if args.random_images:
        facts["initial"] = None
    return to_set(**facts)


def check_flags(args):
    """Raise UserError for flags that cannot be combined."""
    if args.reference and (args.precision != "fp32" or args.augment_outer or args.compile == "on"):
        raise UserError(
            "--reference requires --precision fp32 and excludes --augment-outer and --compile on"
        )
    if args.reference and (args.source_images or args.updates_per_batch > 1):
        raise UserError("--reference excludes --source-images and --updates-per-batch")
    if args.source_images and args.source_images < args.num_images:
        raise UserError(
            f"--source-images {args.source_images}: fewer than --num-images {args.num_images}"
        )
    if args.random_images and args.raw_init:
        raise UserError("--random-images cannot be combined with --raw-init")
    for name in () if args.bases else low_rank.HELP:
        if getattr(args, name) != preset(args.preset, "distill")[name]:
            raise UserError(f"--{name.replace('_', '-')} requires --bases")
    if args.pool_size % distributed.world_size():
        raise UserError(
            f"--pool-size {args.pool_size}: must be a multiple of the number of processes, "
            f"{distributed.world_size()}"
        )


def add_flags(parser):
    cli.add_chunk_flag(parser)
    cli.add_compile_flag(parser)
    parser.groups["method"].add_argument(
        "--steps-equal-samples",
        action="store_true",
        help="with several processes: divide the number of steps by the number of processes, so "
        "that the number of real images stays the same",
    )
    parser.groups["method"].add_argument(
        "--reference",
        action="store_true",
        help="compute each step as the paper writes it, which is slow",
    )


METHOD = Method(
    "krr_st",
    distill,
    HELP,
    doc=__doc__,
    add_flags=add_flags,
    check_flags=check_flags,
)


def main(argv):
    if low_rank.is_selected(argv) and cli.peek_flag("name", argv) is None:
        argv = [*argv, "--name", low_rank.NAME]
    method.main(METHOD, argv)


if __name__ == "__main__":
    cli.run(main)
