"""Print the results below a folder as a Markdown table: a row a method, mean +- standard deviation over the seeds.

python -m benchmarks.summary runs
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

from utils import results


def column(line):
    """What a result is grouped by: target, protocol and labels."""
    labels = f", {line['labels_per_class']} labels a class" if line.get("labels_per_class") else ""
    labels += f", {100 * line['label_fraction']:g} % of the labels" if line.get("label_fraction") else ""
    return f"{line['target']} {line['protocol']}{labels}"


def row(line):
    source = f"{line['method']} on {line['source']}" if line["source"] else line["method"]
    m = f", {line['num_images']} images" if line.get("num_images") else ""
    width = "" if line["width"] == 1 else f" x{line['width']:g}"
    return f"{source}{m}, {line['arch']}{width}"


def table(folders):
    """The Markdown table of all results.jsonl below `folders`; the deviation is the population's (ddof = 0)."""
    cells = defaultdict(dict)
    for folder in folders:
        for path in sorted(Path(folder).rglob("results.jsonl")):
            for line in results.read(path):
                cells[row(line), column(line)][line["seed"]] = line["accuracy"]
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [["accuracy in %", *columns], ["---"] + ["---:"] * len(columns)]
    for name in rows:
        values = [list(cells.get((name, each), {}).values()) for each in columns]
        shown = [f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f} (n={len(v)})" if v else "" for v in values]
        lines.append([name, *shown])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    print(table(sys.argv[1:] or ["runs"]))
