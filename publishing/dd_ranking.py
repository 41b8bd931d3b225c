"""Conversion of class-labelled sets for the hard-label score of DD-Ranking.

`LabelRobustScoreHard` of ddranking 0.2.0 trains classifiers on the images without changing them. It
tests the classifiers on images that it normalises by its own constants. It needs the same number of
images of each class, sorted by class.
"""

import torch

from utils.errors import UserError

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS = {  # source -> name in DD-Ranking, number of classes, mean and std in DD-Ranking
    "cifar10": ("CIFAR10", 10, CIFAR),
    "cifar100": ("CIFAR100", 100, CIFAR),
    "tinyimagenet": ("TinyImageNet", 200, IMAGENET),
    "imagenette": ("ImageNette", 10, IMAGENET),
    "imagenet": ("ImageNet1K", 1000, IMAGENET),
}
FILE = "dd_ranking.safetensors"


def convert(distilled):
    """Normalise the images of a `Distilled` as DD-Ranking does, and sort them by class.

    Returns:
        Images (c n, 3, S, S) float32 and labels (c n,) int64, for n images of each of c classes.

    Raises:
        UserError: if DD-Ranking cannot score the set.
    """
    kind, source = distilled.target_kind, distilled.meta.get("source")
    if kind == "feature":
        raise UserError(
            "--dd-ranking: DD-Ranking scores a set by the accuracy of classifiers trained on its "
            "labels, but this set has a target network's features instead of labels"
        )
    if kind != "class":
        raise UserError(f"--dd-ranking: needs class labels, but the targets of this set are {kind}")
    if source not in DATASETS:
        raise UserError(
            f"--dd-ranking: supports {', '.join(DATASETS)}, but this set is from {source}"
        )
    classes, (mean, std) = DATASETS[source][1:]
    counts = torch.bincount(distilled.targets, minlength=classes)
    if len(counts) != classes or counts.unique().numel() != 1:
        raise UserError(
            f"--dd-ranking: needs the same number of images of each of {classes} classes, but this "
            f"set has {counts.min()} to {counts.max()} images per class"
        )
    order = distilled.targets.argsort(stable=True)
    pixels = distilled.images[order] * distilled.std[:, None, None] + distilled.mean[:, None, None]
    mean, std = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return (pixels - mean) / std, distilled.targets[order]


def format_card_section(distilled, images, labels):
    """Return the section of the card about the converted set."""
    name, classes, _ = DATASETS[distilled.meta["source"]]
    size = images.shape[-1]
    return f"""## DD-Ranking

`{FILE}` contains the images and their labels, sorted by class. The images are normalised by
DD-Ranking's constants.

```python
from ddranking.metrics import LabelRobustScoreHard   # pip install ddranking
from safetensors.torch import load_file

tensors = load_file("{FILE}")
score = LabelRobustScoreHard(dataset="{name}", ipc={len(labels) // classes},
                             im_size=({size}, {size}), model_name="ConvNet-3", eval_full_data=True)
score.compute_metrics(image_tensor=tensors["images"], hard_labels=tensors["labels"])
```

"""
