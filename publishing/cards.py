"""The README.md of an exported folder: a dataset card or a model card of the Hugging Face Hub."""

import json
import shlex
import statistics
from pathlib import Path

import models
from data import exported
from utils import files
from utils.run import FREE_SETTINGS

TARGETS = {
    "feature": "features of the target network, {d} numbers for each image",
    "soft": "learned labels, {d} numbers for each image",
    "class": "class indices from 0 to {most}",
    "none": "none: the images are for the distillation of knowledge (`kd.py`)",
}
TASKS = {"feature": "image-feature-extraction", "none": "image-feature-extraction"}  # else classification
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
ACCURACY = """## Accuracy

On the test split, at the last step: mean ± standard deviation over n pre-trainings. The protocol `full` fine-tunes the
network, `linear` fits a linear classifier to its frozen features, `knn` takes their nearest neighbours, `head` is the
pre-trained network as it is, and `kd` distils a teacher on the images.
"""
LICENCE = """## Licence

The field `license` at the top says `{license}`. Distilled images derive from those of {source}, and its terms may bind
what you publish: check them, then fill in the field. (README.md has no checksum, so it can be edited.)
"""


CONFIGS = """configs:
- config_name: default
  data_files:
  - split: train
    path: images/*
"""  # for datasets.load_dataset


def front_matter(fields, more=""):
    """YAML between its marks; texts are quoted as JSON, which YAML includes."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {json.dumps(each)}" for each in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "---\n" + "\n".join(lines) + f"\n{more}---\n"


def facts_table(facts):
    return table([row for row in facts.items() if row[1] not in (None, "")], "", "")


def table(rows, *heads):
    """A Markdown table; cells are text on one line."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in lines)


def command_of(folder):
    """The command in a run's config.json, without the flags that decide nothing; None where there is no such file."""
    path = folder / "config.json"
    words = files.read_json(path, "settings file").get("command") if path.is_file() else None
    if not words:
        return None
    program, *rest = map(str, words)
    kept, skip = [Path(program).name if program.endswith(".py") else program], False
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            free = flag[2:].replace("-", "_") in FREE_SETTINGS
            kept += [] if free else [f"{flag}={plain(value)}" if equals else flag]
            skip = free and not equals
        elif not skip:
            kept.append(plain(word))
    python = "" if program.startswith("python") else "python "
    return f"`{python}{' '.join(kept)}`"


def plain(word):
    """A word of a command, for a shell; of a path of this machine the last part only."""
    return shlex.quote(Path(word).name if Path(word).is_absolute() else word)


def accuracies(lines, scratch=()):
    """Rows of results (lines of results.jsonl) as mean and population standard deviation, with those of networks
    that were not pre-trained beside them."""
    found = {}
    for which, these in enumerate((lines, scratch)):
        for line in these:
            if "accuracy" in line:
                few = line.get("labels_per_class") or line.get("label_fraction")
                labels = "all" if not few else f"{few} a class" if few >= 1 else f"{100 * few:g} %"
                network = f"{models.label(line['arch'], line['width'])} at {line['image_size']} px"
                key = (network, line["target"], line["protocol"], labels)
                found.setdefault(key, ([], []))[which].append(line["accuracy"])

    def shown(values):
        return f"{statistics.fmean(values):.2f} ± {statistics.pstdev(values):.2f} (n={len(values)})" if values else ""

    return [[*key, *map(shown, values)] for key, values in sorted(found.items()) if values[0]]


def accuracy_section(lines, scratch=()):
    """What the card says of results, or that there are none."""
    rows = accuracies(lines, scratch)
    if not rows:
        return "## Accuracy\n\nNot measured.\n"
    heads = ("network", "data set", "protocol", "labels", "accuracy in %", "without pre-training")
    return f"{ACCURACY}\n{table(rows, *heads)}"


def of_set(folder, name, license, distilled, recipe, facts, lines, scratch, sections):
    """The dataset card of the set exported to `folder`: `facts` are rows on what it is, `lines` and `scratch` results
    with and without it, `sections` further text."""
    m, size, kind, source = len(distilled.images), distilled.images.shape[-1], distilled.target_kind, facts["source"]
    numbers = dict(d=distilled.num_outputs, most=distilled.num_outputs - 1)
    fields = dict(
        license=license,
        pretty_name=name,
        tags=["dataset-distillation", *(["self-supervised-learning"] if kind == "feature" else []), "image"],
        task_categories=[TASKS.get(kind, "image-classification")],
        size_categories=[next((text for most, text in SIZES if m < most), "n>1M")],
        source_datasets=["extended|other"],
    )
    facts = facts | {
        "images": f"{m} of {size} x {size} pixels",
        "targets": TARGETS[kind].format(**numbers),
        "preprocessing": preprocessing(distilled.mean, distilled.std),
    }
    if recipe:
        facts["pre-training"] = ", ".join(f"{key} {value}" for key, value in recipe.items())
    uses = f"""```python
from load import load, pretrain   # needs torch and safetensors

dataset, info = load()            # TensorDataset of images ({m}, 3, {size}, {size}) and targets, checksum verified
network = pretrain(dataset, info, seed=0)
features = network.embed(dataset.tensors[0])
```
"""
    if kind == "none":
        uses = "```python\nfrom load import load\n\ndataset, info = load()   # needs torch and safetensors\n```\n"
    return f"""{front_matter(fields, CONFIGS)}
# {name}

{m} images distilled from {source} by {facts["method"]}.

![the first images](preview.png)

## Use

{uses}
`distilled.safetensors` is exact. `images/` and `preview.png` are rounded to 8 bits and clamped to [0, 1]: they are for
looking, and for `datasets.load_dataset`. In the repository that made the set, `--distilled` takes this folder, or
`hf:USER/NAME` once it is on the Hub, in place of a `distilled.pt`. Normalise other images by the mean and the standard
deviation of their own training split, as the results below do.

## Facts

{facts_table(facts)}
{sections}{accuracy_section(lines, scratch)}
## Files

`{exported.SUMS}` lists the SHA-256 of every file (`sha256sum -c {exported.SUMS}`). That of `{exported.SET}` is
`{files.sums(folder / exported.SET)["sha256"]}`.

{LICENCE.format(license=license, source=source)}"""


def of_network(folder, file, name, license, facts, lines):
    """The model card of the network exported to `folder`, whose weights are in `file`."""
    fields = dict(license=license, tags=["dataset-distillation"], pipeline_tag="image-feature-extraction")
    return f"""{front_matter(fields)}
# {name}

## Use

```python
from network import load      # needs torch and safetensors{" and torchvision" * facts["network"].startswith("resnet")}

network = load()              # in eval mode
features = network.embed(x)   # of normalised images x (b, 3, S, S)
```

`network.py` holds the network's code. For ONNX, `torch.onnx.export` needs the packages onnx and onnxscript.

## Facts

{facts_table(facts)}
{accuracy_section(lines)}
## Files

`{exported.SUMS}` lists the SHA-256 of every file (`sha256sum -c {exported.SUMS}`). That of `{file}` is
`{files.sums(folder / file)["sha256"]}`.

{LICENCE.format(license=license, source=facts["source"])}"""


def distance(meta):
    """In words, how far a set's images are from the real ones that they started as; None where that is not known."""
    moved = meta.get("distance_from_initial")
    if moved == 0:
        return "0: the images are unchanged copies of real ones"
    return moved and f"{moved:.4f} of the source's standard deviation (root mean square); 0 is an unchanged real image"


def preprocessing(mean, std):
    """In words, the units of images that were normalised by `mean` and `std` (3,)."""
    mean, std = (", ".join(f"{value:.4f}" for value in values.tolist()) for values in (mean, std))
    return f"(pixels - mean) / std, with pixels in [0, 1], mean ({mean}) and std ({std})"
