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
FEATURES, LABELS = "image-feature-extraction", "image-classification"  # tasks, as the Hub says
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
made the set, `--distilled` takes this folder, or `hf:USER/NAME` once it is on the Hub. Normalise
other images by the mean and standard deviation of their own training split, as for the results
below.
"""
ACCURACY = """## Accuracy

On the test split at the last step: mean ± standard deviation over n pre-trainings. `full`
fine-tunes the network, `linear` fits a linear classifier to its frozen features, `knn` takes their
nearest neighbours, `head` is the pre-trained network as it is, and `kd` distils a teacher's
knowledge on the images.
"""
LICENCE = """## Licence

The field `license` above says `{license}`. The terms of {source} may also hold for what is
distilled from it. Check them before you publish, and fill in the field.
"""


def front_matter(fields, more=""):
    """The YAML at the top of a card. Texts are quoted as in JSON, which YAML includes."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {json.dumps(each)}" for each in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "---\n" + "\n".join(lines) + f"\n{more}---\n"


def table(rows, heads):
    """A Markdown table; cells are texts on one line."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def facts_table(facts):
    """A table of the `facts` (name -> value) that are known."""
    return table([row for row in facts.items() if row[1] not in (None, "")], ("", ""))


def accuracy_rows(lines, untrained=()):
    """Results (lines of results.jsonl) as rows of mean and population standard deviation, each
    beside that of `untrained`, the results of networks without pre-training."""
    found = {}
    for column, these in enumerate((lines, untrained)):
        for line in these:
            if "accuracy" in line:
                few = line.get("labels_per_class") or line.get("label_fraction")
                labels = "all" if not few else f"{few} a class" if few >= 1 else f"{100 * few:g} %"
                network = f"{models.label(line['arch'], line['width'])} at {line['image_size']} px"
                key = (network, line["dataset"], line["protocol"], labels)
                found.setdefault(key, ([], []))[column].append(line["accuracy"])
    found = {key: both for key, both in sorted(found.items()) if both[0]}
    return [[*key, *map(mean_and_deviation, both)] for key, both in found.items()]


def mean_and_deviation(values):
    if not values:
        return ""
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return f"{mean:.2f} ± {deviation:.2f} (n={len(values)})"


def accuracy_section(lines, untrained=()):
    rows = accuracy_rows(lines, untrained)
    heads = ("network", "data set", "protocol", "labels", "accuracy in %", "no pre-training")
    return f"{ACCURACY}\n{table(rows, heads)}" if rows else "## Accuracy\n\nNot measured.\n"


def checksum_section(folder, main):
    return f"""## Files

`{exported.SUMS}` lists the SHA-256 of every file except this one: `sha256sum -c {exported.SUMS}`.
That of `{main}` is `{files.checksums(folder / main)["sha256"]}`.
"""


def preprocessing(mean, std):
    """In words, the units of images that were normalised by `mean` and `std` (3,)."""
    mean, std = (", ".join(f"{each:.4f}" for each in values) for values in (mean, std))
    return f"(pixels - mean) / std, with pixels in [0, 1], mean ({mean}) and std ({std})"


def dataset_card(folder, name, license, distilled, facts, lines, untrained, sections):
    """The card of the set that is exported to `folder`.

    Args:
        name: of the set.
        license: as the Hub names it.
        distilled: a `Distilled`.
        facts: name -> value, for the table of facts.
        lines: results with the set.
        untrained: results without pre-training.
        sections: further text.
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
        "preprocessing": preprocessing(distilled.mean.tolist(), distilled.std.tolist()),
    }
    return f"""{front_matter(fields, CONFIGS)}
# {name}

{m} images distilled from {facts["source"]}. Method: {facts["method"]}.

![the first images](preview.png)

## Use

{USE_IMAGES if kind == "none" else USE}
{ABOUT_FILES}
## Facts

{facts_table(facts)}
{sections}{accuracy_section(lines, untrained)}
{checksum_section(folder, exported.SET)}
{LICENCE.format(license=license, source=facts["source"])}"""


def model_card(folder, main, name, license, facts, lines):
    """As `dataset_card`, of a network with the weights in the file `main`."""
    fields = dict(license=license, tags=["dataset-distillation"], pipeline_tag=FEATURES)
    packages = "torch, torchvision and safetensors"
    if not facts["network"].startswith("resnet"):
        packages = "torch and safetensors"
    return f"""{front_matter(fields)}
# {name}

## Use

```python
from network import load     # needs {packages}

network = load()             # in eval mode
features = network.embed(x)  # of normalised images x (b, 3, S, S)
```

`network.py` holds the network's code. For ONNX, `torch.onnx.export` needs the packages onnx and
onnxscript.

## Facts

{facts_table(facts)}
{accuracy_section(lines)}
{checksum_section(folder, main)}
{LICENCE.format(license=license, source=facts["source"])}"""
