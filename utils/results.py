"""Results as data: one JSON line for each evaluation, in results.jsonl of the folder that the network lies in.

A line says what was evaluated (source, method, arch, width, image_size, num_images, seed, distilled_seed), how (target,
protocol, labels_per_class, label_fraction), what came out (accuracy in percent), under which settings (`digest`; in
`scale` those of all stages that differ from the paper's, {} for none) and by what means (device, versions, seconds and
peak memory of the evaluating process). `name` tells the lines of a file apart. A line knows nothing of tables: one
evaluation may stand in several.
"""

import fcntl
import hashlib
import json
import os


def digest(settings):
    """12 hexadecimal digits that are equal for equal settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def find(folder, key):
    """The result of the settings with digest `key` in `folder`, or None."""
    return next((line for line in read(folder / "results.jsonl") if line["digest"] == key), None)


def read(path):
    """All results in a file, oldest first; none where there is no file. What a full disk cut off is left out."""
    return _parsed(path.read_text()) if path.is_file() else []


def _parsed(text):
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def append(folder, line):
    """Add a result, unless one of the same digest is there: several processes may write, and evaluate the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "results.jsonl", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not any(other["digest"] == line["digest"] for other in _parsed(text)):
            start = "\n" if text and not text.endswith("\n") else ""  # after a line that was cut off
            os.write(file.fileno(), f"{start}{json.dumps(line)}\n".encode())  # one write, at the end wherever it is


def show(line):
    """One line for the terminal."""
    labels = f", {line['labels_per_class']} labels a class" if line.get("labels_per_class") else ""
    images = f" on {line['images']['method']} images" if "images" in line else ""
    how = f"{line['protocol']}{labels}{images}"
    return f"{line['method']} {line['arch']} -> {line['target']} ({how}): {line['accuracy']:.2f} %"
