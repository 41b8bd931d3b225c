"""Results as data: one JSON line for each evaluation, in results.jsonl of the folder that the
network lies in.

A line says what was evaluated (source, method, arch, width, image_size, num_images, seed,
distilled_seed), how (dataset, protocol, labels_per_class, label_fraction), what came out (accuracy
in percent), under which settings (`digest`; in `deviations` those of all stages that differ from
the paper's, {} for none) and by what means (device, versions, seconds and peak memory of the
evaluating process). `name` tells the lines of a file apart. A line knows nothing of tables: one
evaluation may stand in several.
"""

import json

from utils import files
from utils.errors import UserError


def find(folder, key):
    """The result of the settings with digest `key` in `folder`, or None."""
    return next((line for line in read(folder / "results.jsonl") if line["digest"] == key), None)


def read(path):
    """All results in a file, oldest first; none where there is no file. Raises UserError for a line
    that is none."""
    lines = []
    for number, text in enumerate(
        path.read_text().splitlines(keepends=True) if path.is_file() else (), 1
    ):
        if text.endswith(
            "\n"
        ):  # else a process has died while writing it; the evaluation will be done again
            try:
                lines.append(json.loads(text))
                lines[-1]["digest"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}: line {number} is not a result; correct or delete it"
                ) from error
    return lines


def append(folder, line):
    """Add a result, unless one of the same digest is there: several processes may write, and
    evaluate the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    files.append_line(path, json.dumps(line), unless=lambda: find(folder, line["digest"]))


def format_line(line):
    """One line for the terminal."""
    labels = f", {line['labels_per_class']} labels a class" if line.get("labels_per_class") else ""
    if line.get("label_fraction"):
        labels = f", {100 * line['label_fraction']:g} % of the labels"
    images = f" on {line['images']['method']} images" if "images" in line else ""
    how = f"{line['protocol']}{labels}{images}"
    return f"{line['method']} {line['arch']} -> {line['dataset']} ({how}): {line['accuracy']:.2f} %"
