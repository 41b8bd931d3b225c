"""KIP: kernel ridge regression with the kernel of an infinitely wide network predicts the labels.

    python -m distillers kip --source cifar100
    python -m distillers kip --source digits --kernel conv --outer-steps 20 --outer-batch 100

Nguyen, Chen and Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021; Nguyen,
Novak, Xiao and Lee, "Dataset Distillation with Infinitely Wide Convolutional Networks", NeurIPS
2021. Each step minimises

    1/2 mean ( y_t - k(X_t, X_s) (k(X_s, X_s) + lambda I)^-1 Y_s )^2

over the images X_s (m, 3, S, S), and with --learn-labels also over their labels Y_s (m, C). Here
X_t are real images, the same number of each class, and y_t are their centred one-hot labels. X_s
and Y_s are initialised in the same way. lambda is 1e-6 trace(k(X_s, X_s)) / m. k is the neural
tangent kernel of a ReLU network, in closed form and float64 (distillers/ntk.py):
    fc     --depth hidden layers. The FC1 of the first paper is --depth 1.
    conv   --depth 3x3 convolutions and a linear read-out of the flattened maps, without pooling.
           The networks of the second paper use pooling, which makes a kernel with S^2 times as many
           entries. They also have an additional first convolution; --depth 4 includes it.

Needs labels and no target network. It differs from the papers in the network without pooling and in
the normalisation of the images (no ZCA).

A step computes (b + m) m kernel entries and their gradients. On one CPU core at 32 px and depth 3,
an entry takes 2 microseconds for fc and 0.2 milliseconds for conv. The time of conv grows with the
number of pixels and the depth. With 1,000 images of CIFAR-100, a step takes 13 seconds for fc and
20 minutes for conv. conv at this size needs a GPU with fast float64. A kernel matrix takes
8 (b + m) m bytes. The part being computed takes about 500 MB on a CPU and 4 GB on a GPU.
"""

import torch
import torch.nn.functional as F

from data.images import normalise, to_float
from data.loading import Loader
from data.subsets import balanced_subset, few_labels
from distillers import method
from distillers.krr import LIMITS, centred_one_hot, kernel_predict
from distillers.method import Method, make_distilled
from distillers.ntk import KERNELS, kernel
from utils import optim
from utils.errors import UserError
from utils.run import Tensors
from utils.sampling import Randomness

HELP = dict(
    kernel="infinitely wide network of the kernel: fc or conv",
    depth="number of hidden layers of that network",
    outer_steps="updates of the distilled set",
    outer_lr="constant Adam learning rate of images and labels",
    outer_batch="b, real images per mini-batch, the same number of each class; all images if the "
    "source has no more",
    ridge="lambda as a multiple of the mean of the kernel's diagonal",
    learn_labels="learn the labels as well",
)


def balanced_batch(source, size, generator):
    """Return the indices of about `size` random images, the same number of each class.

    The number per class is at most the size of the smallest class. If the source has at most `size`
    images, all are returned.
    """
    per_class = min(size // len(source.classes), int(source.labels.bincount().min()))
    return few_labels(source, 0 if size >= len(source) else max(1, per_class), 0.0, generator)


class BalancedBatches:
    """The `balanced_batch`es of a source, for `Loader`.

    `peek` returns None, because the draw of the next batch would change the generator's state.
    """

    def __init__(self, source, size, generator):
        self.source, self.size, self.generator = source, size, generator

    def next(self):
        return balanced_batch(self.source, self.size, self.generator)

    def peek(self):
        return None


def objective(x_real, y_real, x_syn, y_syn, args, fallbacks=None):
    """Return half the mean squared error (), in the precision of `x_syn` and `y_syn`.

    `x_real` (b, 3, S, S) and `x_syn` (m, 3, S, S) are images. `y_real` (b, C) and `y_syn` (m, C)
    are their labels. The mean is over all entries (b, C). For `fallbacks`, see `krr.solve`.
    """
    k_rs = kernel(args.kernel, x_real, x_syn, args.depth)  # (b, m)
    k_ss = kernel(args.kernel, x_syn, x_syn, args.depth)  # (m, m)
    predicted = kernel_predict(k_rs, k_ss, y_syn, args.ridge, True, fallbacks)  # (b, C)
    return 0.5 * F.mse_loss(predicted, y_real.to(y_syn.dtype))


def distill(source, chosen, target, args, run, device):
    """Learn images (m, 3, S, S), and possibly labels (m, C), from the images at `chosen` (m,).

    Returns a `Distilled` whose meta holds the objective of the initial and the distilled set.
    """
    if args.kernel not in KERNELS:
        raise UserError(f"--kernel {args.kernel}: choose one of {', '.join(KERNELS)}")
    if device.type == "mps":
        device = torch.device("cpu")  # MPS has no float64
    randomness = Randomness(args.seed, device)

    batches = BalancedBatches(source, args.outer_batch, randomness.cpu)
    loader = Loader([source.pixels, source.labels], batches, device)

    def prepare(pixels, labels):
        """Return normalised images (b, 3, S, S) and centred labels (b, C)."""
        x = normalise(to_float(pixels), source.mean, source.std)
        return x, centred_one_hot(labels, len(source.classes))

    x_init, y_init = (each.double() for each in prepare(*loader.rows(chosen)))
    x_syn, y_syn = x_init.clone().requires_grad_(), y_init.clone().requires_grad_(args.learn_labels)
    adam = optim.make_optimizer(
        "adam", [x_syn, y_syn] if args.learn_labels else [x_syn], args.outer_lr
    )
    learned = Tensors(x_syn=x_syn, y_syn=y_syn)
    torch.rand(
        (), generator=randomness.cpu
    )  # otherwise the first batch would be the initial images of the set
    run.resume(device, dict(learned=learned, optimizer=adam, randomness=randomness))

    run.limits = LIMITS
    for step in run.steps("distil", args.outer_steps):
        x_real, y_real = prepare(*loader.next())
        fallbacks = []
        loss = objective(x_real, y_real, x_syn, y_syn, args, fallbacks)
        adam.zero_grad()
        loss.backward()
        gradient = x_syn.grad.square().mean().sqrt()
        run.log(step, loss=loss, gradient=gradient, larger_ridge=sum(fallbacks))
        adam.step()
        method.update_picture(
            run, args, step, lambda: make_distilled(x_syn.float(), y_syn.float(), "soft", source)
        )

    # A seed that no run uses, so that these are not the initial images of the set.
    measured = balanced_batch(source, args.outer_batch, torch.Generator().manual_seed(-1))
    x_measured, y_measured = prepare(*loader.rows(measured))
    with torch.no_grad():
        before, after = (
            objective(x_measured, y_measured, x, y, args).item()
            for x, y in ((x_init, y_init), (x_syn, y_syn))
        )
    print(f"objective: initial images {before:.4f}, distilled images {after:.4f}")
    return make_distilled(
        x_syn.float(),
        y_syn.float(),
        "soft",
        source,
        objective_initial=before,
        objective_distilled=after,
    )


METHOD = Method("kip", distill, HELP, doc=__doc__, choose=balanced_subset)
