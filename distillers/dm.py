"""DM: match the mean features of each class to those of the real images, under random networks.

    python -m distillers dm --source cifar100

Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, equation 5. Each step
draws an untrained network psi and an augmentation A_c for each class c. It updates the distilled
images with the gradient of

    sum_c || mean psi(A_c(real images of c)) - mean psi(A_c(distilled images of c)) ||^2.

Needs labels. Starts from the images of `random` with the same seed. This is the cheapest method
that learns images, because it trains no network. A step passes 256 real images of each class
through the network.
"""

import torch
import torch.nn.functional as F

from data.augment import diff_augment_alike
from data.subsets import balanced_subset
from distillers import method
from distillers.labelled import MEASUREMENT_SEED, ClassBatches, build_untrained
from distillers.method import Method
from utils import optim
from utils.device import autocast
from utils.run import Tensors
from utils.sampling import Randomness

HELP = dict(
    arch="network, with instance norm",
    width="factor on the network's hidden widths",
    outer_steps="updates of the distilled images",
    outer_lr="SGD learning rate of the images (momentum 0.5)",
    real_batch="real images per class and step",
)
PASS = 4096  # most images in a pass, which holds whole classes
MEASUREMENT_NETWORKS = 10


def class_means(features, labels, num_classes):
    """Return the mean of `features` (n, d) for each class: (num_classes, d).

    `labels` (n,) int64 contains each class at least once.
    """
    members = F.one_hot(labels, num_classes).to(features.dtype).T  # (c, n)
    return (members / members.sum(1, keepdim=True)) @ features


def mean_distance(f_real, y_real, f_syn, y_syn, num_classes):
    """Return equation 5 for one network: the squared distances of class means, summed over classes.

    `f_real` (b, d) and `f_syn` (m, d) are features. `y_real` (b,) and `y_syn` (m,) are their labels
    in 0..num_classes-1.
    """
    return (
        (class_means(f_real, y_real, num_classes) - class_means(f_syn, y_syn, num_classes))
        .square()
        .sum()
    )


def losses(network, x_syn, real, randomness, precision):
    """Yield the objective in parts; each part is the sum over the classes of one pass.

    `x_syn` (m, 3, S, S) holds the same number of images of each class of `real`, in order. The
    parts depend on different images. Backpropagating them one by one gives the gradient of the sum
    and needs less memory.
    """
    syn = x_syn.split(len(x_syn) // len(real.members))  # (m/c, 3, S, S) per class
    for classes in torch.arange(len(syn)).split(max(1, PASS // max(real.batch_size, len(syn[0])))):
        pairs = [
            diff_augment_alike(randomness.device, real.draw(label, randomness.cpu), syn[label])
            for label in classes.tolist()
        ]
        (f_real, y_real), (f_syn, y_syn) = (
            _features(network, parts, precision) for parts in zip(*pairs, strict=True)
        )
        yield mean_distance(f_real.detach(), y_real, f_syn, y_syn, len(classes))


def _features(network, parts, precision):
    """Return the features of the images in `parts`, and the index of the part of each image."""
    device, counts = parts[0].device, torch.tensor([len(x) for x in parts])
    with autocast(device, precision), torch.set_grad_enabled(parts[0].requires_grad):
        features = network.embed(torch.cat(parts)).float()
    part = torch.arange(len(parts)).repeat_interleave(counts)
    return features, part.to(device, non_blocking=True)


def distill(source, chosen, target, args, run, device):
    randomness = Randomness(args.seed, device)
    real = ClassBatches(source, args.real_batch, device)
    x_init, y_syn = source.normalised(chosen, device), source.labels[chosen]
    x_syn = x_init.clone().requires_grad_()
    sgd = optim.make_optimizer("sgd", [x_syn], args.outer_lr, weight_decay=0.0, momentum=0.5)
    run.resume(device, dict(learned=Tensors(x_syn=x_syn), optimizer=sgd, randomness=randomness))

    for step in run.steps("distil", args.outer_steps):
        network = build_untrained(args, source, 0, device).requires_grad_(False)
        sgd.zero_grad()
        loss = torch.zeros((), device=device)
        for part in losses(network, x_syn, real, randomness, args.precision):
            part.backward()
            loss += part.detach()
        run.log(step, loss=loss, gradient=x_syn.grad.square().mean().sqrt())
        sgd.step()
        method.update_picture(
            run, args, step, lambda: method.make_distilled(x_syn, y_syn, "class", source)
        )

    before, after = (measure_objective(x, real, source, args, device) for x in (x_init, x_syn))
    print(f"distance of the class means: initial images {before:.4f}, distilled images {after:.4f}")
    return method.make_distilled(
        x_syn,
        y_syn,
        "class",
        source,
        objective_initial=before.item(),
        objective_distilled=after.item(),
    )


@torch.no_grad()
def measure_objective(x, real, source, args, device):
    """Return the objective of images `x` (m, 3, S, S), averaged over fixed random draws."""
    randomness, total = Randomness(MEASUREMENT_SEED, device), 0.0
    for _ in range(MEASUREMENT_NETWORKS):
        network = build_untrained(args, source, 0, device)
        total += sum(losses(network, x, real, randomness, args.precision))
    return total / MEASUREMENT_NETWORKS


METHOD = Method("dm", distill, HELP, doc=__doc__, choose=balanced_subset)
