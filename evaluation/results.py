"""Results in results.jsonl: one JSON line per evaluation, in the folder of the network.

A line contains:

- the network: source, method, arch, width, image_size, num_images, seed, distilled_seed
- the evaluation: dataset, protocol, labels_per_class, label_fraction, label_draws
- the result: accuracy in percent
- the settings: `digest`, and `deviations` of all stages from the paper's settings
- the cost: device, versions, seconds and peak memory of the evaluating process
- `name`, which differs between the evaluations of a table

Several tables may use the same line.
"""

import json

from utils import files
from utils.errors import UserError


def find(folder, key, name="results.jsonl"):
    """Return the result in `folder` whose settings have the digest `key`, or None."""
    return next((line for line in read(folder / name) if line["digest"] == key), None)


def read(path):
    """Return all results in a file, oldest first; [] if the file does not exist.

    Raises UserError if a line is not a result.
    """
    lines = []
    for number, text in enumerate(
        path.read_text().splitlines(keepends=True) if path.is_file() else (), 1
    ):
        # A killed process may leave an incomplete line; its evaluation is repeated.
        if text.endswith("\n"):
            try:
                lines.append(json.loads(text))
                lines[-1]["digest"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}: line {number} is not a result; correct or delete it"
                ) from error
    return lines


def append(folder, line, name="results.jsonl"):
    """Append a result to the file `name`, unless the file has one with the same digest.

    Several processes may append at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    files.append_line(path, json.dumps(line), unless=lambda: find(folder, line["digest"], name))


def merge(path, lines, key, order=None):
    """Store results in the file `path`. Each replaces the stored result with the same key.

    Args:
        lines: results, oldest first; of several with the same key, the last is stored.
        key: function that returns the key of a result.
        order: function that returns the sort key of a result in the file (default: `key`).

    Returns:
        The results in the file, sorted.
    """
    kept = sorted({key(line): line for line in [*read(path), *lines]}.values(), key=order or key)
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def format_line(line):
    """Return a one-line summary of a result for the terminal."""
    labels = (
        f", {line['labels_per_class']} labels per class" if line.get("labels_per_class") else ""
    )
    if line.get("label_fraction"):
        labels = f", {100 * line['label_fraction']:g} % of the labels"
    if line.get("label_draws"):
        labels += f", mean of {line['label_draws']} draws"
    images = f" on {line['images']['method']} images" if "images" in line else ""
    how = f"{line['protocol']}{labels}{images}"
    return f"{line['method']} {line['arch']} -> {line['dataset']} ({how}): {line['accuracy']:.2f} %"
