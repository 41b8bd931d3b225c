"""Check of a target network: probes of its features against those of an untrained student."""

import math
import sys

import torch

import models
from evaluation.probes import compute_outputs, knn_accuracy_of, linear_accuracy_of
from utils import distributed

MOST = 10_000  # largest number of training images in the check; half of them are held out


def measure_quality(source, target_features, arch, width, device):
    """Compare the target's features with those of an untrained student on the source's labels.

    Uses at most `MOST` random images of the source's training split. A linear probe and a
    nearest-neighbour classifier are fitted to one half and tested on the other half.

    Args:
        source: `ImageSet`.
        target_features: function of indices (k,) that returns the target's features (k, d_y).
        arch, width: the student network, initialised with seed 0.
        device: torch device.

    Returns:
        dict: `linear` and `knn`, accuracies in percent; `untrained`, a dict with those of the
        student; `student`, its name; and `n`, the number of held-out images. None if the source has
        no labels or fewer than 20 images.
    """
    if source.labels is None or len(source) < 20:
        return None
    chosen = images_for_check(source)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    student = models.build(arch, source.image_size, 0, width).to(device)
    torch.set_rng_state(state)
    labels, untrained = (
        source.labels[chosen].to(device),
        compute_outputs(student, source.subset(chosen), device),
    )
    accuracies = [
        _accuracies(features, labels, len(source.classes))
        for features in (target_features(chosen), untrained)
    ]
    names = dict(student=models.label(arch, width), n=len(chosen) - len(chosen) // 2)
    return accuracies[0] | dict(untrained=accuracies[1]) | names


def images_for_check(source):
    """Return the indices of the images in the check, in random order."""
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:MOST]


def _accuracies(features, labels, num_classes):
    half = len(features) // 2
    parts = (features[:half], labels[:half], features[half:], labels[half:], num_classes)
    return dict(linear=round(linear_accuracy_of(*parts), 2), knn=round(knn_accuracy_of(*parts), 2))


def is_better(quality):
    """Whether the target's linear probe beats the student's by more than two standard errors."""
    p, q = (each["linear"] / 100 for each in (quality, quality["untrained"]))
    return p - q > 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / quality["n"])


def print_quality(quality):
    """Print the accuracies, and a warning if the target does not beat the untrained student."""
    if quality is None:
        print("target features: not checked, because the source has no labels or too few images")
        return
    untrained, student = quality["untrained"], quality["student"]
    print(
        f"target features: linear probe {quality['linear']:.1f} %, nearest neighbours "
        f"{quality['knn']:.1f} %; untrained {student}: {untrained['linear']:.1f} %, "
        f"{untrained['knn']:.1f} % ({quality['n']:,} held-out training images)"
    )
    if distributed.is_main_process() and not is_better(quality):
        print(
            "warning: a linear probe of the target is no better than one of an untrained "
            f"{student}; distilling this target may not help (docs/encoders.md)",
            file=sys.stderr,
        )
