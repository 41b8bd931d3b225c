"""DSA: match the gradient of the loss for each class to that of the real images.

    python -m distillers dsa --source cifar100

Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021, equation
7 and algorithm 1. A new network is initialised and trained on the distilled set. Between its
training steps, the distilled images are updated with the gradient of

    sum_c D(grad of the loss on A_c(real images of c),
            grad of the loss on A_c(distilled images of c)).

A_c is the same augmentation for both. D sums 1 - cosine over the rows of each weight matrix, where
a row belongs to one output of a layer. Biases and norms are excluded. The number of image updates
per network and the training epochs between them depend on the images per class.

Needs labels. Starts from the images of `random` with the same seed. This is one of the slowest
methods. An update takes a second-order gradient for each class in turn, and the number of updates
is 1,000 networks times the images per class.
"""

import torch
import torch.nn.functional as F

from data.augment import diff_augment, diff_augment_alike
from data.subsets import balanced_subset
from distillers import method
from distillers.labelled import MEASUREMENT_SEED, ClassBatches, build_untrained
from distillers.method import Method
from utils import optim
from utils.device import autocast
from utils.run import Tensors
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network, with instance norm",
    width="factor on the network's hidden widths",
    networks="networks, used one after the other",
    outer_loops="updates of the images per network; 0: depends on images per class",
    inner_epochs="epochs on the distilled set between updates; 0: depends on images per class",
    outer_lr="SGD learning rate of the images (momentum 0.5)",
    real_batch="real images per class and update",
    inner_lr="SGD learning rate of the networks",
    inner_batch="distilled images per batch of the networks",
)
INNER_EPOCHS = {
    1: 1,
    10: 50,
    20: 25,
    30: 20,
    40: 15,
    50: 10,
}  # images per class, also the number of updates -> epochs
MEASUREMENT_NETWORKS = 5


def loop_counts(per_class):
    """Return (updates, epochs between them) per network for `per_class` images per class.

    The authors give both for 1, 10, 20, ... 50 images per class. In between, the epochs are those
    of the next larger number. Above 50, both are those of 50.
    """
    return min(per_class, 50), next(
        (epochs for most, epochs in INNER_EPOCHS.items() if per_class <= most), 10
    )


def gradient_distance(real, syn):
    """Return D of equation 7: 1 - cosine of each pair of rows, summed over all rows and tensors.

    `real` and `syn` are gradients of the same weights, with shape (out, ...) each. Their rows are
    flattened. A row of zeros has cosine 0 with any row.
    """
    total = 0.0
    for a, b in zip(real, syn, strict=True):
        a, b = a.flatten(1), b.flatten(1)  # (out, in)
        total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def weight_gradients(network, x, label, precision, create_graph=False):
    """Return the gradients of the mean cross-entropy on images `x` (b, 3, S, S) of class `label`.

    They are with respect to the weights of each layer, without biases and norms.
    """
    with autocast(x.device, precision):
        predicted = network(x)
    y = torch.full((len(x),), label, device=x.device)
    weights = [p for p in network.parameters() if p.ndim > 1]
    return torch.autograd.grad(
        F.cross_entropy(predicted.float(), y), weights, create_graph=create_graph
    )


def losses(network, x_syn, real, randomness, precision):
    """Yield the gradient distance of each class in turn.

    `x_syn` (m, 3, S, S) holds the same number of images of each class, in order. The classes depend
    on different images. Backpropagating them one by one gives the gradient of the sum and needs
    less memory.
    """
    for label, syn in enumerate(x_syn.split(len(x_syn) // len(real.members))):
        x_real, syn = diff_augment_alike(randomness.device, real.draw(label, randomness.cpu), syn)
        g_real = weight_gradients(network, x_real, label, precision)
        yield gradient_distance(
            g_real, weight_gradients(network, syn, label, precision, create_graph=True)
        )


def train(network, x_syn, y_syn, epochs, args, randomness):
    """Train `network` for `epochs` epochs of SGD on the augmented distilled set."""
    sgd = optim.make_optimizer(
        "sgd", network.parameters(), args.inner_lr, weight_decay=0.0, momentum=0.0
    )
    batches = Batches(len(x_syn), args.inner_batch, randomness.cpu)
    for _ in range(epochs * batches.per_epoch):
        index = batches.next().to(x_syn.device, non_blocking=True)
        with autocast(x_syn.device, args.precision):
            predicted = network(diff_augment(x_syn[index], randomness.device))
        loss = F.cross_entropy(predicted.float(), y_syn[index])
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def distill(source, chosen, target, args, run, device):
    randomness = Randomness(args.seed, device)
    real = ClassBatches(source, args.real_batch, device)
    num_classes = len(source.classes)
    x_init, y_syn = source.normalised(chosen, device), source.labels[chosen].to(device)
    x_syn = x_init.clone().requires_grad_()
    outer, inner = loop_counts(len(chosen) // num_classes)
    outer, inner = args.outer_loops or outer, args.inner_epochs or inner
    network = build_untrained(args, source, num_classes, device)
    sgd = optim.make_optimizer("sgd", [x_syn], args.outer_lr, weight_decay=0.0, momentum=0.5)
    learned = Tensors(x_syn=x_syn)
    run.resume(device, dict(learned=learned, optimizer=sgd, network=network, randomness=randomness))

    for step in run.steps("distil", args.networks * outer):
        if step % outer == 0:
            network.load_state_dict(build_untrained(args, source, num_classes, device).state_dict())
        else:
            train(network, x_syn.detach(), y_syn, inner, args, randomness)
        sgd.zero_grad()
        loss = torch.zeros((), device=device)
        for part in losses(network, x_syn, real, randomness, args.precision):
            part.backward(inputs=[x_syn])
            loss += part.detach()
        run.log(step, loss=loss, gradient=x_syn.grad.square().mean().sqrt())
        sgd.step()
        method.update_picture(
            run, args, step, lambda: method.make_distilled(x_syn, y_syn, "class", source)
        )

    before, after = (
        measure_objective(x, real, source, args, device) for x in (x_init, x_syn.detach())
    )
    print(
        f"distance of gradients under untrained networks: initial images {before:.4f}, distilled "
        f"images {after:.4f}"
    )
    return method.make_distilled(
        x_syn,
        y_syn,
        "class",
        source,
        objective_initial=before.item(),
        objective_distilled=after.item(),
    )


def measure_objective(x, real, source, args, device):
    """Return the objective of images `x` (m, 3, S, S), averaged over fixed random draws."""
    randomness, total = Randomness(MEASUREMENT_SEED, device), 0.0
    for _ in range(MEASUREMENT_NETWORKS):
        network = build_untrained(args, source, len(source.classes), device)
        total += sum(part.detach() for part in losses(network, x, real, randomness, args.precision))
    return total / MEASUREMENT_NETWORKS


METHOD = Method("dsa", distill, HELP, doc=__doc__, choose=balanced_subset)
