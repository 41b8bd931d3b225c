"""Low-rank sets: KRR-ST's images and targets as coefficients times bases (`distill.py --bases U`).

    python distill.py --source cifar100 --num-images 100 --bases 200 --views rotations

Yu, Yao and Chiu, "Boost Self-Supervised Dataset Distillation via Parameterization, Predefined
Augmentation, and Approximation", ICLR 2025. Images are bilinear enlargements of C_x B_x, with U
bases of --base-size pixels a side; targets are C_y B_y, with V bases. Algorithm 1 learns
coefficients and bases in place of X_s and Y_s. They start from the principal components of the
source: C_x and C_y project real images, and their target features, on these.

With --views rotations each image also appears turned by 90, 180 and 270 degrees, with coefficients
C_y^(k) of its own on the same B_y, which start from the target features of the turned images. The
ridge head and the pool's members see all four views. After the last step one small network for each
rotation is fitted to C_y^(k) - C_y as a function of C_y. The set keeps these networks and not
C_y^(k).

--num-images N is the budget: the set keeps at most N (3 S S + d_y) numbers, as many as N images
with their targets. What the bases and the networks leave of it decides the number of images m. The
file holds the factors; `load_distilled` makes the images and targets from them.

The paper takes 30,000 steps for CIFAR-100 and 20,000 at 64 pixels. These choices are ours:
- the principal components are of uncentred data, so that no mean is kept, and of at most 10,000
  random images;
- images are reduced by averaging squares of pixels;
- coefficients and bases are scaled to the same root mean square, since Adam moves every number by
  about the same amount;
- the networks have a ReLU, and 500 steps of Adam at 0.01 on all images at once fit them;
- the budget pays for the networks.
"""

import math

import torch
import torch.nn.functional as F

from data import factors
from data.subsets import random_subset
from models.target import BATCH
from utils import optim
from utils.errors import UserError
from utils.run import Tensors

HELP = dict(
    bases="U, bases of the images of a low-rank set (distillers/low_rank.py); 0: plain images",
    target_bases="V, bases of its targets; 0: as many as of the images, and at most d_y",
    base_size="pixels of a side of its images' bases",
    views="views of its images: none but themselves, or rotations",
    shift_width="hidden width of the networks that predict the rotations' targets",
)
NAME = "krr_st_low_rank"  # in the registry
VIEWS = ("none", "rotations")
MOST_ROWS = 10_000  # images that the principal components are taken of
SHIFT_STEPS, SHIFT_LR = 500, 0.01


class Plain:
    """X_s (m, 3, S, S) and Y_s (m, d_y) themselves, with the methods of `LowRank`."""

    parts = {}  # noqa: RUF012, what a checkpoint keeps besides

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
    """The factors of a set while they are learned.

    `learned`: name -> tensor, what the optimiser moves: c_x (m, U), b_x (U, 3 s s), c_y (m, V),
    b_y (V, d_y) and with rotations c_views (3, m, V). `initial` (m,): indices of the images that it
    starts from. `parts`: what a checkpoint keeps besides. Raises UserError for settings that do not
    go together.
    """

    def __init__(self, source, target, args, device):
        features = target.features_of(source)  # (n, d_y)
        n, d_y, self.size = len(source), features.shape[1], source.image_size
        v = args.target_bases or min(args.bases, d_y)
        m = count_images(args, n, self.size, d_y, v)
        print(f"the room of {args.num_images:,} plain images holds {m:,} images in factors")
        rows = random_subset(source, min(max(m, MOST_ROWS), n), args.seed)
        self.initial = rows[:m]  # those of a plain set of so many images

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
            self.adam = optim.optimizer("adam", [*self.shifts.values()], SHIFT_LR)
            self.parts = dict(shifts=Tensors(**self.shifts), shift_optimizer=self.adam)
        self.learned = {name: each.to(device).requires_grad_() for name, each in start.items()}

    def compose(self):
        """Images (m, 3, S, S) and targets (m, d_y), or 4 m of each with rotations, as functions of
        what is learned; after `finish`, as the set keeps them."""
        if self.finished or not self.shifts:
            return factors.materialise(self._kept(), self.size)
        c_x, b_x, c_y, b_y = (self.learned[name] for name in factors.NAMES)
        x = factors.compose_images(c_x, b_x, self.size)
        return factors.add_rotations(x), torch.cat([c_y, *self.learned["c_views"]]) @ b_y

    def finish(self, run):
        """Fit the rotations' networks; returns what the set's meta says of the factors."""
        meta = dict(initial=self.initial.tolist(), num_images=self.num_images)
        if self.shifts:
            meta["shift_r2"] = self._fit_shifts(run)
            print(f"share of the rotations' shifts that is predicted: {meta['shift_r2']:.2f}")
        self.finished = True
        return meta | dict(numbers=factors.count_numbers(self.collect_factors()))

    def _fit_shifts(self, run):
        """The share of the shifts' variance that the fitted networks explain."""
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
        """The factors that the set keeps, on the CPU."""
        return {name: each.detach().cpu().contiguous() for name, each in self._kept().items()}


def fit_components(rows, k):
    """The `k` leading right singular vectors of `rows` (n, d), as rows: (k, d) float32."""
    rows = rows.double()
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -k:].flip(1).T.float()


def balancing_ratio(coefficients, bases):
    """The factor on the bases that gives both the same root mean square when it divides the
    coefficients: ()."""
    return (coefficients.square().mean() / bases.square().mean()) ** 0.25


def build_shifts(v, width, seed, device):
    """The networks of the rotations: name -> tensor, initialised as `torch.nn.Linear` is."""
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
    """How many images the budget buys. Raises UserError where it buys none or more than `n`, or
    where there are not as many bases."""
    side, u, h = args.base_size, args.bases, args.shift_width
    most_u, most_v = min(n, 3 * side * side), min(n, d_y)
    budget = args.num_images * (3 * size * size + d_y)
    fixed = u * 3 * side * side + v * d_y
    if args.views == "rotations":
        fixed += factors.ROTATIONS * (v * h + h + h * v + v)
    m = (budget - fixed) // (u + v)
    worth = f"--num-images {args.num_images}: worth {budget:,} numbers"
    too_small = f"{worth}, of which the bases alone take {fixed:,}; raise it, or lower --bases"
    too_large = (
        f"{worth}, enough for {m:,} images of the source's {n:,}; lower it, or raise --bases"
    )
    faults = {
        f"--views {args.views}: must be {' or '.join(VIEWS)}": args.views not in VIEWS,
        "--random-targets goes without --bases": args.random_targets,
        f"--base-size {side}: larger than the images, {size}": side > size,
        f"--bases {u}: at most {most_u}, the numbers of a base or images": u > most_u,
        f"--target-bases {v}: at most {most_v}, the features or images": v > most_v,
        too_small: m < 1,
        too_large: m > n,
    }
    if fault := next((fault for fault, there in faults.items() if there), None):
        raise UserError(fault)
    return m
