"""Class-labelled sets as DD-Ranking's hard-label score takes them (`ddranking` 0.2.0, `LabelRobustScoreHard`).

The score trains classifiers of the source's classes on the images as they come, tests them on images that it normalises
by constants of its own, and takes the labels in order of the classes, equally many of each.
"""

import torch

from utils.errors import UserError

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS = {  # source -> its name there, the number of its classes, the constants
    "cifar10": ("CIFAR10", 10, CIFAR),
    "cifar100": ("CIFAR100", 100, CIFAR),
    "tinyimagenet": ("TinyImageNet", 200, IMAGENET),
    "imagenette": ("ImageNette", 10, IMAGENET),
    "imagenet": ("ImageNet1K", 1000, IMAGENET),
}
FILE = "dd_ranking.safetensors"


def converted(distilled):
    """The images (c * n, 3, S, S) float32 of a class-labelled `Distilled`, normalised by DD-Ranking's constants and
    sorted by class, and the labels (c * n,) int64. Raises UserError for a set that the score cannot rank."""
    kind, source = distilled.target_kind, distilled.meta.get("source")
    if kind == "feature":
        raise UserError(
            "--dd-ranking: DD-Ranking scores a set by the accuracy of classifiers that are trained on its labels; "
            "this set has a target network's features instead, on which no classifier can be trained"
        )
    if kind != "class":
        raise UserError(f"--dd-ranking: takes sets with class indices; the targets of this one are of kind {kind}")
    if source not in DATASETS:
        raise UserError(f"--dd-ranking: knows {', '.join(DATASETS)}; this set was distilled from {source}")
    classes, (mean, std) = DATASETS[source][1:]
    counts = torch.bincount(distilled.targets, minlength=classes)
    if len(counts) != classes or counts.unique().numel() != 1:
        raise UserError(
            f"--dd-ranking: takes equally many images of each of {classes} classes; this set has {counts.min()} to "
            f"{counts.max()} of {len(counts)}"
        )
    order = distilled.targets.argsort(stable=True)
    pixels = distilled.images[order] * distilled.std[:, None, None] + distilled.mean[:, None, None]
    mean, std = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return ((pixels - mean) / std).contiguous(), distilled.targets[order]


def section(distilled, images, labels):
    """What the card says of it."""
    name, classes, _ = DATASETS[distilled.meta["source"]]
    size = images.shape[-1]
    return f"""## DD-Ranking

`{FILE}` holds the images in order of the classes, normalised by DD-Ranking's constants, and their labels:

```python
from ddranking.metrics import LabelRobustScoreHard   # pip install ddranking
from safetensors.torch import load_file

tensors = load_file("{FILE}")
score = LabelRobustScoreHard(dataset="{name}", ipc={len(labels) // classes}, im_size=({size}, {size}),
                             model_name="ConvNet-3", eval_full_data=True)
score.compute_metrics(image_tensor=tensors["images"], hard_labels=tensors["labels"])
```

"""
