"""Results as data: one JSON line for each evaluation, in results.jsonl of the folder that the network lies in."""

import hashlib
import json


def digest(settings):
    """12 hexadecimal digits that are equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def find(folder, key):
    """The result of the settings with digest `key` in `folder`, or None."""
    return next((line for line in read(folder / "results.jsonl") if line["digest"] == key), None)


def read(path):
    """All results in a file, oldest first; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(folder, line):
    """Add a result; one write of one line, so that several processes can share the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def show(line):
    """One line for the terminal."""
    labels = f", {line['labels_per_class']} labels a class" if line.get("labels_per_class") else ""
    images = f" on {line['images']['method']} images" if "images" in line else ""
    how = f"{line['protocol']}{labels}{images}"
    return f"{line['method']} {line['arch']} -> {line['target']} ({how}): {line['accuracy']:.2f} %"
