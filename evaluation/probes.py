"""Accuracy of a network or of its frozen features.

The functions do not change a network, its mode or its buffers.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from data.images import normalise
from utils.device import autocast

BATCH = 512


@contextlib.contextmanager
def evaluation_mode(network, batch_statistics=False):
    """Context with `network` in eval mode and without gradients.

    With `batch_statistics`, batch norm uses the statistics of each batch and does not update its
    running statistics (the paper's knowledge distillation, departure D12 kd-details).
    """
    modes = {module: module.training for module in network.modules()}
    norms = (
        [module for module in modes if isinstance(module, _BatchNorm)] if batch_statistics else []
    )
    network.eval()
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for module, training in modes.items():
            module.training = training


def compute_outputs(function, images, device, precision="fp32", mean=None, std=None):
    """Apply a network to all images of an `ImageSet`, in order.

    Args:
        function: a `Network`, or its bound method `embed`.
        images: `ImageSet`.
        device: torch device.
        precision: as --precision.
        mean, std: (3,) statistics that normalise the images; by default those of `images`.

    Returns:
        (n, d) float32 on `device`.
    """
    mean, std = images.mean if mean is None else mean, images.std if std is None else std
    network = function.__self__ if hasattr(function, "__self__") else function
    results = []
    with evaluation_mode(network), autocast(device, precision):
        for index in torch.arange(len(images)).split(BATCH):
            results.append(function(normalise(images.raw(index, device), mean, std)).float())
    return torch.cat(results)


def accuracy(network, images, device, precision="fp32", batch_statistics=False):
    """Return the percentage of correctly classified images.

    With `batch_statistics`, the images are in a fixed random order, because a batch of one class
    has other statistics than a batch of all classes.

    Args:
        network: `Network` with a head.
        images: labelled `ImageSet`.
        device: torch device.
        precision: as --precision.
        batch_statistics: as in `evaluation_mode`.
    """
    order = torch.arange(len(images))
    if batch_statistics:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    correct = 0
    with evaluation_mode(network, batch_statistics), autocast(device, precision):
        for index in order.split(BATCH):
            predicted = network(images.normalised(index, device)).argmax(1)
            correct += (predicted.cpu() == images.labels[index]).sum().item()
    return 100 * correct / len(images)


def r2_percent(predicted, targets):
    """Return R^2 of a prediction in percent: the share of the targets' variance that it explains.

    The variance is summed over all dimensions. It is that around the mean of `targets`.

    Args:
        predicted, targets: (n, d).
    """
    residual = (predicted - targets).square().sum()
    return 100 * (1 - residual / (targets - targets.mean(0)).square().sum()).item()


def knn_accuracy_of(features, labels, tests, test_labels, num_classes, k=20, temperature=0.07):
    """Compute the accuracy, in percent, of weighted nearest neighbours by cosine similarity.

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR
    2018, section 3.4: each of the k neighbours votes with weight exp(similarity / temperature).

    Args:
        features: (n, d), with `labels` (n,) in 0..num_classes-1.
        tests: (t, d), with `test_labels` (t,).
    """
    bank, correct = F.normalize(features), 0
    for part, truth in zip(F.normalize(tests).split(BATCH), test_labels.split(BATCH), strict=True):
        similarity, neighbours = (part @ bank.T).topk(min(k, len(bank)))
        votes = torch.zeros(len(part), num_classes, device=part.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        correct += (votes.argmax(1) == truth).sum().item()
    return 100 * correct / len(tests)


def linear_accuracy_of(features, labels, tests, test_labels, num_classes):
    """Compute the accuracy, in percent, of a linear classifier fitted to convergence.

    The features are standardised with the statistics of the training features. L-BFGS minimises
    multinomial logistic regression: the summed cross-entropy plus half the squared norm of the
    weights. The minimum is unique, so there is no seed, learning rate or schedule.

    Args:
        features: (n, d), with `labels` (n,) in 0..num_classes-1.
        tests: (t, d), with `test_labels` (t,).
    """
    mean, std = features.mean(0), features.std(0, unbiased=False)
    features, tests = ((f - mean) / std.clamp(min=1e-6) for f in (features, tests))
    weight = torch.zeros(features.shape[1], num_classes, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    fit = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure():
        fit.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + weight.square().sum() / (
            2 * len(labels)
        )
        loss.backward()
        return loss

    fit.step(closure)
    predicted = (tests @ weight + bias).argmax(1)
    return 100 * (predicted == test_labels).float().mean().item()
