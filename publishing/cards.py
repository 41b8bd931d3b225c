"""The README.md of an exported folder: a dataset card or a model card of the Hugging Face Hub."""

import json
import statistics

import models
from data import exported
from utils import files

TARGETS = {
    "feature": "features of the target network, {d} numbers for each image",
    "soft": "learned labels, {d} numbers for each image",
    "class": "class indices from 0 to {last}",
    "none": "none; the images are for knowledge distillation (`kd.py`)",
}
FEATURES, LABELS = "image-feature-extraction", "image-classification"  # names of tasks on the Hub
TASKS = {"feature": FEATURES, "none": FEATURES, "class": LABELS, "soft": LABELS}
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
CONFIGS = """configs:
- config_name: default
  data_files:
  - split: train
    path: images/*
"""  # for datasets.load_dataset
USE = """```python
from load import load, pretrain  # needs torch and safetensors

dataset, info = load()           # a TensorDataset of normalised images and targets
network = pretrain(dataset, info, seed=0)
features = network.embed(dataset.tensors[0])
```
"""
USE_IMAGES = """```python
from load import load  # needs torch and safetensors

dataset, info = load() # a TensorDataset of normalised images
```
"""
ABOUT_FILES = """`distilled.safetensors` is exact. `images/` and `preview.png` are rounded to 8 bits
and clamped to [0, 1]; they are for viewing and for `datasets.load_dataset`. In the repository that
made the set, `--distilled` accepts this folder, or `hf:USER/NAME` once it is on the Hub. Normalise
other images by the mean and standard deviation of their own training split, as for the results
below.
"""
ACCURACY = """## Accuracy

On the test split at the last step: mean ± standard deviation over n pre-trainings.

- `full` fine-tunes the network.
- `linear` fits a linear classifier to its frozen features.
- `knn` classifies by the nearest neighbours of its frozen features.
- `head` evaluates the pre-trained network without further training.
- `kd` distils a teacher into the network on these images.
"""
R2 = """## R^2

R^2 with which the network predicts the target's features of test images: mean ± standard deviation
over n pre-trainings.
"""
LICENCE = """## Licence

The field `license` above is `{license}`. The terms of {source} may also apply to images that are
distilled from it. Check them before you publish, and fill in the field.
"""


def format_front_matter(fields, more=""):
    """Return the YAML at the top of a card. Strings are quoted as in JSON, a subset of YAML."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {json.dumps(each)}" for each in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "---\n" + "\n".join(lines) + f"\n{more}---\n"


def format_table(rows, heads):
    """Return a Markdown table. Cells must not contain line breaks."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def format_facts(facts):
    """Return a table of `facts` (name -> value) without unknown values."""
    return format_table([row for row in facts.items() if row[1] not in (None, "")], ("", ""))


def group_accuracies(lines, untrained=()):
    """Return table rows with the mean and population standard deviation of results.

    Args:
        lines: results of networks pre-trained on the set (lines of results.jsonl).
        untrained: results of networks without pre-training, for the last column.
    """
    found = {}
    for column, these in enumerate((lines, untrained)):
        for line in these:
            if "accuracy" in line:
                few = line.get("labels_per_class") or line.get("label_fraction") or 0
                labels = f"{few} per class" if few >= 1 else f"{100 * few:g} %" if few else "all"
                if line.get("label_draws"):
                    labels += f", mean of {line['label_draws']} draws"
                network = f"{models.label(line['arch'], line['width'])} at {line['image_size']} px"
                key = (network, line["dataset"], line["protocol"], labels)
                found.setdefault(key, ([], []))[column].append(line["accuracy"])
    found = {key: both for key, both in sorted(found.items()) if both[0]}
    return [[*key, *map(format_mean, both)] for key, both in found.items()]


def format_mean(values):
    if not values:
        return ""
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return f"{mean:.2f} ± {deviation:.2f} (n={len(values)})"


def format_accuracies(lines, untrained=()):
    """Return the section of the accuracies, and that of R^2 if it was measured."""
    found = group_accuracies(lines, untrained)
    rows = [row for row in found if row[2] != "r2"]
    heads = ("network", "data set", "protocol", "labels", "accuracy in %", "no pre-training")
    text = f"{ACCURACY}\n{format_table(rows, heads)}" if rows else "## Accuracy\n\nNot measured.\n"
    r2 = [[*row[:2], row[4]] for row in found if row[2] == "r2"]
    heads = ("network", "data set", "R^2 in %")
    return text + (f"\n{R2}\n{format_table(r2, heads)}" if r2 else "")


def format_checksums(folder, main):
    return f"""## Files

`{exported.SUMS}` lists the SHA-256 of every file except this one: `sha256sum -c {exported.SUMS}`.
The SHA-256 of `{main}` is `{files.compute_checksums(folder / main)["sha256"]}`.
"""


def describe_preprocessing(mean, std):
    """Describe the normalisation of images by `mean` and `std` (3,)."""
    mean, std = (", ".join(f"{each:.4f}" for each in values) for values in (mean, std))
    return f"(pixels - mean) / std, with pixels in [0, 1], mean ({mean}) and std ({std})"


def make_dataset_card(folder, name, license, distilled, facts, lines, untrained, sections):
    """Return the dataset card (README.md) of a set.

    Args:
        folder: folder that the set is exported to.
        name: name of the set.
        license: identifier of the licence on the Hub.
        distilled: a `Distilled`.
        facts: dict, name -> value, for the table of facts.
        lines: results of networks pre-trained on the set.
        untrained: results without pre-training.
        sections: text before the accuracies.
    """
    m, size, kind = len(distilled.images), distilled.images.shape[-1], distilled.target_kind
    fields = dict(
        license=license,
        pretty_name=name,
        tags=["dataset-distillation", "self-supervised-learning"][: 1 + (kind == "feature")],
        task_categories=[TASKS[kind]],
        size_categories=[next((text for most, text in SIZES.items() if m < most), "n>1M")],
        source_datasets=["extended|other"],
    )
    numbers = dict(d=distilled.num_outputs, last=distilled.num_outputs - 1)
    facts = facts | {
        "images": f"{m} of {size} x {size} pixels",
        "targets": TARGETS[kind].format(**numbers),
        "preprocessing": describe_preprocessing(distilled.mean.tolist(), distilled.std.tolist()),
    }
    return f"""{format_front_matter(fields, CONFIGS)}
# {name}

{m} images distilled from {facts["source"]}. Method: {facts["method"]}.

![the first images](preview.png)

## Use

{USE_IMAGES if kind == "none" else USE}
{ABOUT_FILES}
## Facts

{format_facts(facts)}
{sections}{format_accuracies(lines, untrained)}
{format_checksums(folder, exported.SET)}
{LICENCE.format(license=license, source=facts["source"])}"""


def required_packages(network):
    """Return the packages that the exported code of a network needs, by the network's label."""
    resnet = network.startswith("resnet")
    return "torch, torchvision and safetensors" if resnet else "torch and safetensors"


def make_model_card(folder, main, name, license, facts, lines):
    """Return the model card (README.md) of a network, whose weights are in the file `main`.

    The other arguments are as in `make_dataset_card`.
    """
    fields = dict(license=license, tags=["dataset-distillation"], pipeline_tag=FEATURES)
    return f"""{format_front_matter(fields)}
# {name}

## Use

```python
from network import load     # needs {required_packages(facts["network"])}

network = load()             # in eval mode
features = network.embed(x)  # of normalised images x (b, 3, S, S)
```

`network.py` contains the code of the network. For ONNX, `torch.onnx.export` needs the packages onnx
and onnxscript.

## Facts

{format_facts(facts)}
{format_accuracies(lines)}
{format_checksums(folder, main)}
{LICENCE.format(license=license, source=facts["source"])}"""
