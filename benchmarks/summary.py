"""Print the results below a folder as a Markdown table: a row a method, mean ± standard deviation over n results.

python -m benchmarks.summary runs
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

from models import label
from utils import results

METHODS = {  # in the order of the rows; others follow under their own names
    "scratch": "no pre-training",
    "random_features": "random real images with the target's features",
    "krr_st": "KRR-ST",
}


def column(line):
    """What a result is grouped by: target, protocol and labels."""
    labels = f", {line['labels_per_class']} labels/class" if line.get("labels_per_class") else ""
    labels += f", {100 * line['label_fraction']:g} % of labels" if line.get("label_fraction") else ""
    return f"{line['target']} {line['protocol']}{labels}"


def row(line):
    origin = f", m = {line['num_images']}, {line['source']}" if line["source"] else ""
    origin += f", distilled with seed {line['distilled_seed']}" if line["distilled_seed"] else ""
    own = {"source": line["source"], "method": line["method"], "seed": line["distilled_seed"],
           "num_images": line["num_images"]}  # fmt: skip
    if (images := line.get("images", own)) != own:  # distillation of knowledge on other images
        origin += f"; on {images['num_images']} images of {METHODS.get(images['method'], images['method'])}"
        origin += f", {images['source']}" + (f", distilled with seed {images['seed']}" if images["seed"] else "")
    network = f"{label(line['arch'], line['width'])} at {line['image_size']} px"
    return f"{METHODS.get(line['method'], line['method'])} ({network}{origin})"


def table(folders):
    """The Markdown table of all results.jsonl below `folders`; the deviation is the population's (ddof = 0)."""
    lines = [line for folder in folders for path in sorted(Path(folder).rglob("results.jsonl"))
             for line in results.read(path)]  # fmt: skip
    order = [*METHODS]
    lines.sort(key=lambda line: order.index(line["method"]) if line["method"] in order else len(order))
    cells = defaultdict(list)  # (row, column) -> accuracies; n tells when those of other settings are among them
    for line in lines:
        cells[row(line), column(line)].append(line["accuracy"])
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    grid = [["accuracy in %", *columns]]
    for name in rows:
        values = [cells[name, each] for each in columns]
        shown = [f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f} (n={len(v)})" if v else "" for v in values]
        grid.append([name, *shown])
    widths = [max(map(len, cells)) for cells in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |" for cells in grid
    )


if __name__ == "__main__":
    print(table(sys.argv[1:] or ["runs"]))
