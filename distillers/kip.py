"""KIP: images on which kernel ridge regression with an infinitely wide network's kernel predicts
the real labels.

    python -m distillers kip --source cifar100
    python -m distillers kip --source digits --kernel conv --outer-steps 20 --outer-batch 100

Nguyen, Chen and Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021; Nguyen,
Novak, Xiao and Lee, "Dataset Distillation with Infinitely Wide Convolutional Networks", NeurIPS
2021. Each step lowers

    1/2 mean ( y_t - k(X_t, X_s) (k(X_s, X_s) + lambda I)^-1 Y_s )^2

over the images X_s (m, 3, S, S), and with --learn-labels over their labels Y_s (m, C). Here (X_t,
y_t) are real images, as many of each class, with centred one-hot labels, which is also what X_s and
Y_s start as; lambda is 1e-6 trace(k(X_s, X_s)) / m; and k is the neural tangent kernel of a ReLU
network in float64, in closed form (distillers/ntk.py):
    fc     --depth hidden layers (the first paper's FC1: --depth 1)
    conv   --depth 3x3 convolutions and a linear read-out of the flattened maps, no pooling. The
           second paper's networks pool, which makes a kernel of S^2 times as many numbers; its
           extra convolution in front is --depth 4 here.

Needs labels, no target network. Departs from the papers in the network without pooling and the
images' normalisation (no ZCA). A step makes (b + m) m numbers of the kernel, each with its
gradient: on one CPU core 2 microseconds each for fc at 32 px and depth 3, 0.2 milliseconds for
conv, which grows with the pixels and the depth. For CIFAR-100's 1,000 images fc takes 13 seconds a
step and conv 20 minutes, which asks for a GPU that is fast in float64. Memory is 8 (b + m) m bytes
for each kernel matrix, and for the part that is being made some 500 MB, on a GPU some 4 GB.
"""

import torch
import torch.nn.functional as F

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
    kernel="of which infinitely wide network: fc or conv",
    depth="its hidden layers",
    outer_steps="updates of the distilled set",
    outer_lr="Adam learning rate of images and labels, constant",
    outer_batch="b, real images in a mini-batch, as many of each class; all of them if there are "
    "no more",
    ridge="lambda as a factor on the mean of the kernel's diagonal",
    learn_labels="learn the labels as well",
)


def balanced_batch(source, size, generator):
    """Indices of about `size` images, as many of each class (fewer where a class is smaller), or of
    all if there are no more."""
    per_class = min(size // len(source.classes), int(source.labels.bincount().min()))
    return few_labels(source, 0 if size >= len(source) else max(1, per_class), 0.0, generator)


def objective(x_real, y_real, x_syn, y_syn, args, fallbacks=None):
    """Half the mean squared error over all entries (b, C), in the precision of x_syn (m, 3, S, S)
    and y_syn (m, C)."""
    k_rs = kernel(args.kernel, x_real, x_syn, args.depth)  # (b, m)
    k_ss = kernel(args.kernel, x_syn, x_syn, args.depth)  # (m, m)
    predicted = kernel_predict(k_rs, k_ss, y_syn, args.ridge, True, fallbacks)  # (b, C)
    return 0.5 * F.mse_loss(predicted, y_real.to(y_syn.dtype))


def distill(source, chosen, target, args, run, device):
    """From the images at `chosen` (m,): the learned images (m, 3, S, S) and their labels (m, C) as
    a `Distilled`, with the objective before and after in its meta."""
    if args.kernel not in KERNELS:
        raise UserError(f"--kernel {args.kernel}: choose one of {', '.join(KERNELS)}")
    if device.type == "mps":
        device = torch.device("cpu")  # which has float64
    randomness = Randomness(args.seed, device)

    def batch_of(index):
        """x (b, 3, S, S) normalised and y (b, C) centred."""
        return source.normalised(index, device), centred_one_hot(
            source.labels[index], len(source.classes)
        ).to(device)

    x_init, y_init = (each.double() for each in batch_of(chosen))
    x_syn, y_syn = x_init.clone().requires_grad_(), y_init.clone().requires_grad_(args.learn_labels)
    adam = optim.optimizer("adam", [x_syn, y_syn] if args.learn_labels else [x_syn], args.outer_lr)
    learned = Tensors(x_syn=x_syn, y_syn=y_syn)
    torch.rand(
        (), generator=randomness.cpu
    )  # else the first batch would be the very images that the set starts as
    run.resume(device, dict(learned=learned, optimizer=adam, randomness=randomness))

    run.limits = LIMITS
    for step in run.steps("distil", args.outer_steps):
        x_real, y_real = batch_of(balanced_batch(source, args.outer_batch, randomness.cpu))
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

    # A seed of no run: another draw than the images that the set starts as.
    x_held, y_held = batch_of(
        balanced_batch(source, args.outer_batch, torch.Generator().manual_seed(-1))
    )
    with torch.no_grad():
        before, after = (
            objective(x_held, y_held, x, y, args).item()
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
