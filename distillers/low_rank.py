"""Low-rank sets: images and targets of KRR-ST as coefficients times bases (`distill.py --bases U`).

    python distill.py --source cifar100 --num-images 100 --bases 200 --views rotations

Yu, Yao and Chiu, "Boost Self-Supervised Dataset Distillation via Parameterization, Predefined
Augmentation, and Approximation", ICLR 2025. The images are C_x B_x, enlarged bilinearly, with U
bases of --base-size pixels a side. The targets are C_y B_y, with V bases. Algorithm 1 learns the
coefficients and bases instead of X_s and Y_s. The initial bases are the principal components of the
source's images and of their target features. The initial coefficients are the projections of real
images, and of their target features, onto these.

With --views rotations, the set also contains each image rotated by 90, 180 and 270 degrees. Each
rotation has its own coefficients C_y^(k) on the same B_y, initialised with the target features of
the rotated images. The ridge head and the pool members use all four views. After the last step, a
small network for each rotation is fitted to predict C_y^(k) - C_y from C_y. The set stores these
networks instead of C_y^(k).

--num-images N is the budget. The set stores at most N (3 S S + d_y) numbers, as many as N images
with their targets. The bases and networks are part of the budget; the rest determines the number of
images m. The file stores the factors, and `load_distilled` computes the images and targets.

The paper uses 30,000 steps for CIFAR-100 and 20,000 at 64 pixels. The paper does not specify the
following choices:
- The principal components are those of uncentred data, so that no mean is stored. They are computed
  from at most 10,000 random images.
- Images are reduced by averaging over squares of pixels.
- Coefficients and bases are scaled to the same root mean square, because Adam changes every number
  by about the same amount.
- The networks have a ReLU. They are fitted by 500 full-batch steps of Adam with learning rate 0.01.
- The networks are part of the budget.
"""

import math

import torch
import torch.nn.functional as F

from data import factors
from data.subsets import random_subset
from models.target import BATCH
from utils import cli, optim
from utils.errors import UserError
from utils.run import Tensors

HELP = dict(
    bases="U, number of image bases of a low-rank set (distillers/low_rank.py); 0: plain images",
    target_bases="V, number of target bases of a low-rank set; 0: min(U, d_y)",
    base_size="side of the image bases in pixels",
    views="additional views of the images: none or rotations",
    shift_width="hidden width of the networks that predict the targets of rotated images",
)
NAME = "krr_st_low_rank"  # name in the registry
VIEWS = ("none", "rotations")
MOST_ROWS = 10_000  # most images for the principal components
SHIFT_STEPS, SHIFT_LR = 500, 0.01


def is_selected(argv):
    """Return whether the command line `argv` of distill.py asks for a low-rank set (--bases)."""
    return cli.peek_flag("bases", argv, "0") != "0"


class Plain:
    """X_s (m, 3, S, S) and Y_s (m, d_y) as plain tensors, with the interface of `LowRank`."""

    parts = {}  # noqa: RUF012, other parts of a checkpoint

    def __init__(self, x_init, y_init):
        start = dict(x_syn=x_init, y_syn=y_init)
        self.learned = {name: each.clone().requires_grad_() for name, each in start.items()}

    def compose(self):
        return self.learned["x_syn"], self.learned["y_syn"]

    def finish(self, run):
        return {}

    def collect_factors(self):
        return None


class LowRank:
    """The factors of a low-rank set during distillation.

    Args:
        source: `ImageSet`.
        used: indices of the images of the source that may be used: `used_subset` of `args`.
        target: `Target` of the source.
        args: parsed flags.
        device: torch device.

    Attributes:
        learned: dict of name to learned tensor: c_x (m, U), b_x (U, 3 s s), c_y (m, V),
            b_y (V, d_y), and with rotations c_views (3, m, V).
        initial: indices (m,) of the initial images.
        parts: other parts of a checkpoint.

    Raises:
        UserError: the settings are inconsistent.
    """

    def __init__(self, source, used, target, args, device):
        features = target.features_of(source)  # (n, d_y)
        n, d_y, self.size = len(used), features.shape[1], source.image_size
        v = args.target_bases or min(args.bases, d_y)
        m = count_images(args, n, self.size, d_y, v)
        print(f"the storage of {args.num_images:,} plain images holds {m:,} images as factors")
        rows = random_subset(source, min(max(m, MOST_ROWS), n), args.seed)
        self.initial = rows[:m]  # those of a plain set of m images

        def small(index):
            x = source.raw(index, device) if args.raw_init else source.normalised(index, device)
            return F.adaptive_avg_pool2d(x, args.base_size).flatten(1).cpu()

        def turned(index, k):
            return target.features(source.normalised(index, device).rot90(k, (2, 3))).cpu()

        x_rows = torch.cat([small(index) for index in rows.split(BATCH)])  # (n, 3 s s)
        b_x = fit_components(x_rows[:MOST_ROWS], args.bases)
        b_y = fit_components(features[rows[:MOST_ROWS]], v)
        c_x, c_y = x_rows[:m] @ b_x.T, features[self.initial] @ b_y.T
        x_ratio, y_ratio = balancing_ratio(c_x, b_x), balancing_ratio(c_y, b_y)
        start = dict(c_x=c_x / x_ratio, b_x=b_x * x_ratio, c_y=c_y / y_ratio, b_y=b_y * y_ratio)
        self.shifts, self.parts, self.finished = {}, {}, False
        self.num_images = args.num_images
        if args.views == "rotations":
            views = [
                torch.cat([turned(index, k) for index in self.initial.split(BATCH)])
                for k in range(1, 1 + factors.ROTATIONS)
            ]
            start["c_views"] = torch.stack(views) @ b_y.T / y_ratio
            self.shifts = build_shifts(v, args.shift_width, args.seed, device)
            self.adam = optim.make_optimizer("adam", [*self.shifts.values()], SHIFT_LR)
            self.parts = dict(shifts=Tensors(**self.shifts), shift_optimizer=self.adam)
        self.learned = {name: each.to(device).requires_grad_() for name, each in start.items()}

    def compose(self):
        """Return images (m, 3, S, S) and targets (m, d_y), or 4 m of each with rotations.

        They are differentiable functions of `learned`. After `finish`, they are computed from the
        stored factors.
        """
        if self.finished or not self.shifts:
            return factors.materialise(self._kept(), self.size)
        c_x, b_x, c_y, b_y = (self.learned[name] for name in factors.NAMES)
        x = factors.compose_images(c_x, b_x, self.size)
        return factors.add_rotations(x), torch.cat([c_y, *self.learned["c_views"]]) @ b_y

    def finish(self, run):
        """Fit the networks of the rotations; return the entries of the set's meta."""
        meta = dict(initial=self.initial.tolist(), num_images=self.num_images)
        if self.shifts:
            meta["shift_r2"] = self._fit_shifts(run)
            print(f"explained variance (R^2) of the rotations' shifts: {meta['shift_r2']:.2f}")
        self.finished = True
        return meta | dict(numbers=factors.count_numbers(self.collect_factors()))

    def _fit_shifts(self, run):
        """Fit the networks; return the fraction of the shifts' variance that they explain."""
        c_y = self.learned["c_y"].detach()
        shifts = self.learned["c_views"].detach() - c_y
        for step in run.steps("fit shifts", SHIFT_STEPS):
            error = F.mse_loss(factors.predict_shifts(c_y, **self.shifts), shifts)
            self.adam.zero_grad()
            error.backward()
            run.log(step, error=error)
            self.adam.step()
        error = F.mse_loss(factors.predict_shifts(c_y, **self.shifts).detach(), shifts)
        return 1 - (error / shifts.var(dim=1, correction=0).mean()).item()

    def _kept(self):
        return {name: self.learned[name] for name in factors.NAMES} | self.shifts

    def collect_factors(self):
        """Return the factors that the set stores, on the CPU."""
        return {name: each.detach().cpu().contiguous() for name, each in self._kept().items()}


def fit_components(rows, k):
    """Return the `k` leading right singular vectors of `rows` (n, d), as rows: (k, d) float32."""
    rows = rows.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -k:].flip(1).T.float()


def balancing_ratio(coefficients, bases):
    """Return the ratio () that equalises the root mean squares of coefficients and bases.

    The coefficients are divided by it and the bases multiplied.
    """
    return (coefficients.square().mean() / bases.square().mean()) ** 0.25


def build_shifts(v, width, seed, device):
    """Return the networks of the rotations as a dict of tensors, initialised as `nn.Linear`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, inputs):
        values = torch.rand(factors.ROTATIONS, *shape, generator=generator) * 2 - 1
        return (values / math.sqrt(inputs)).to(device).requires_grad_()

    return dict(
        w1=uniform(v, width, inputs=v),
        b1=uniform(width, inputs=v),
        w2=uniform(width, v, inputs=width),
        b2=uniform(v, inputs=width),
    )


def count_images(args, n, size, d_y, v):
    """Return the number of images m that the budget allows.

    Args:
        args: settings of the set.
        n: number of images of the source that may be used.
        size: S, image side in pixels.
        d_y: number of target features.
        v: V, number of target bases.

    Raises:
        UserError: the budget allows no image or more than `n`, there are too many bases, or a
            setting is not possible for a low-rank set.
    """
    side, u, h = args.base_size, args.bases, args.shift_width
    most_u, most_v = min(n, 3 * side * side), min(n, d_y)
    budget = args.num_images * (3 * size * size + d_y)
    fixed = u * 3 * side * side + v * d_y
    if args.views == "rotations":
        fixed += factors.ROTATIONS * (v * h + h + h * v + v)
    m = (budget - fixed) // (u + v)
    allowed = f"--num-images {args.num_images}: a budget of {budget:,} numbers"
    too_small = f"{allowed}, but the bases alone take {fixed:,}; raise it, or lower --bases"
    too_large = (
        f"{allowed} allows {m:,} images, but only {n:,} images of the source may be used; lower "
        "it, or raise --bases"
    )
    is_fault = {
        f"--views {args.views}: must be {' or '.join(VIEWS)}": args.views not in VIEWS,
        "--random-targets cannot be combined with --bases": args.random_targets,
        "--random-images cannot be combined with --bases": args.random_images,
        f"--base-size {side}: larger than the images ({size} px)": side > size,
        f"--bases {u}: must be at most {most_u}, the numbers in a base or the images": u > most_u,
        f"--target-bases {v}: must be at most {most_v}, the target features or the images": v
        > most_v,
        too_small: m < 1,
        too_large: m > n,
    }
    if fault := next((fault for fault, found in is_fault.items() if found), None):
        raise UserError(fault)
    return m
