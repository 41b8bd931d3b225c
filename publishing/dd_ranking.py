"""Class-labelled sets in the form that DD-Ranking's hard-label score takes.

Its `LabelRobustScoreHard` (ddranking 0.2.0) trains classifiers of the source's classes on the
images as they are, and tests them on images that it normalises by its own constants. Labels are
sorted by class, with as many images of each.
"""

import torch

from utils.errors import UserError

CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS = {  # source -> DD-Ranking's name of it, its classes, DD-Ranking's constants
    "cifar10": ("CIFAR10", 10, CIFAR),
    "cifar100": ("CIFAR100", 100, CIFAR),
    "tinyimagenet": ("TinyImageNet", 200, IMAGENET),
    "imagenette": ("ImageNette", 10, IMAGENET),
    "imagenet": ("ImageNet1K", 1000, IMAGENET),
}
FILE = "dd_ranking.safetensors"


def convert(distilled):
    """The images (c * n, 3, S, S) float32 of a class-labelled `Distilled`, normalised by
    DD-Ranking's constants and sorted by class, and their labels (c * n,) int64.

    Raises UserError for a set that DD-Ranking cannot score.
    """
    kind, source = distilled.target_kind, distilled.meta.get("source")
    if kind == "feature":
        raise UserError(
            "--dd-ranking: DD-Ranking scores a set by the accuracy of classifiers trained on its "
            "labels; this set has a target network's features instead of labels"
        )
    if kind != "class":
        raise UserError(f"--dd-ranking: takes class labels; this set's targets are of kind {kind}")
    if source not in DATASETS:
        raise UserError(f"--dd-ranking: knows {', '.join(DATASETS)}; this set is from {source}")
    classes, (mean, std) = DATASETS[source][1:]
    counts = torch.bincount(distilled.targets, minlength=classes)
    if len(counts) != classes or counts.unique().numel() != 1:
        raise UserError(
            f"--dd-ranking: takes as many images of each of {classes} classes; this set has "
            f"{counts.min()} to {counts.max()} of {len(counts)} classes"
        )
    order = distilled.targets.argsort(stable=True)
    pixels = distilled.images[order] * distilled.std[:, None, None] + distilled.mean[:, None, None]
    mean, std = (torch.tensor(each)[:, None, None] for each in (mean, std))
    return (pixels - mean) / std, distilled.targets[order]


def card_section(distilled, images, labels):
    """What the card says of the converted set."""
    name, classes, _ = DATASETS[distilled.meta["source"]]
    size = images.shape[-1]
    return f"""## DD-Ranking

`{FILE}` holds the images sorted by class, normalised by DD-Ranking's constants, and their labels:

```python
from ddranking.metrics import LabelRobustScoreHard   # pip install ddranking
from safetensors.torch import load_file

tensors = load_file("{FILE}")
score = LabelRobustScoreHard(dataset="{name}", ipc={len(labels) // classes},
                             im_size=({size}, {size}), model_name="ConvNet-3", eval_full_data=True)
score.compute_metrics(image_tensor=tensors["images"], hard_labels=tensors["labels"])
```

"""
