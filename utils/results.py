"""Results as data: one JSON line for each evaluation, in results.jsonl of the folder that the network lies in."""

import hashlib
import json

from utils import files
from utils.errors import UserError


def digest(settings):
    """12 hexadecimal digits that are equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def find(folder, key):
    """The result of the settings with digest `key` in `folder`, or None."""
    return next((line for line in read(folder / "results.jsonl") if line["digest"] == key), None)


def read(path):
    """All results in a file, oldest first; none where there is no file. Raises UserError for a line that is none."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True) if path.is_file() else (), 1):
        if text.endswith("\n"):  # else a process has died while writing it; the evaluation will be done again
            try:
                lines.append(json.loads(text))
                lines[-1]["digest"], lines[-1]["accuracy"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: line {number} is not a result; correct or delete it") from error
    return lines


def append(folder, line):
    """Add a result; several processes can share the file."""
    folder.mkdir(parents=True, exist_ok=True)
    files.append_line(folder / "results.jsonl", json.dumps(line))


def show(line):
    """One line for the terminal."""
    labels = f", {line['labels_per_class']} labels a class" if line.get("labels_per_class") else ""
    images = f" on {line['images']['method']} images" if "images" in line else ""
    how = f"{line['protocol']}{labels}{images}"
    return f"{line['method']} {line['arch']} -> {line['target']} ({how}): {line['accuracy']:.2f} %"
