"""What the departures of README change: the results of scripts/run_departures.sh, paired by seed,
as Markdown.

    python -m analysis.departures runs/departures              # from all results.jsonl below it
    python -m analysis.departures --collect runs/departures    # and store them in departures.jsonl
    python -m analysis.departures                              # from that file

Prints a table for each way of judging, with a column for each data set; findings.md has the means
over data sets.

A cell is the mean accuracy in percent ± the standard deviation over seeds (ddof = 0), and in
brackets the same of the difference from KRR-ST as the paper has it, each seed's own: both start
from the same images and the same networks. A star marks deviations whose 95 % interval by Student's
t excludes zero; of many cells, one in twenty does by chance. Last comes what distill.py minimises,
under the final pool and for real images that no step has seen in that order: a variant with another
kind of pool has another measure.
"""

import json
import statistics
from pathlib import Path

from scipy import stats

from analysis.tables import Cell, gather_results, markdown
from data.distilled import load_distilled
from distillers import registry
from evaluation import results
from utils import cli, files

RESULTS = Path(__file__).with_name("departures.jsonl")
BASE = "krr_st"
COMMAND = "bash scripts/run_departures.sh --methods {}"
KEPT = (
    "method",
    "seed",
    "dataset",
    "protocol",
    "labels_per_class",
    "label_fraction",
    "accuracy",
    "num_images",
    "arch",
    "width",
    "digest",
    "deviations",
    "device",
    "versions",
    "seconds",
)
LOSS = "outer loss x 100"


def read_losses(folder):
    """A line for each distilled.pt below a run root that knows its outer loss before and after."""
    for path in sorted(folder.glob("*/*/seed*/distilled.pt")):
        meta = load_distilled(path).meta
        for name, key in (
            ("initial images", "outer_loss_initial"),
            ("distilled images", "outer_loss_distilled"),
        ):
            if key in meta:
                yield dict(
                    method=meta["method"],
                    seed=meta["seed"],
                    protocol=LOSS,
                    dataset=name,
                    accuracy=round(100 * meta[key], 4),
                    digest=f"{files.digest(path)} {key}",
                    deviations=meta["deviations"],
                )


def column_of(line):
    if line["protocol"] == LOSS:
        return LOSS, line["dataset"]
    few = (
        f"{line['labels_per_class']} labels/class"
        if line["labels_per_class"]
        else f"{line['label_fraction']:.0%}"
    )
    return ("fine-tuned" if line["protocol"] == "full" else "probe") + f", {few}", line["dataset"]


def group_by_seed(lines):
    """{method: {column: {seed: accuracy}}}, and for each protocol the mean over its data sets where
    all are there."""
    found = {}
    for line in lines:
        found.setdefault(line["method"], {}).setdefault(column_of(line), {})[line["seed"]] = line[
            "accuracy"
        ]
    protocols = {}
    for columns in found.values():
        for protocol, dataset in columns:
            protocols.setdefault(protocol, []).append(dataset)
    protocols.pop(LOSS, None)
    for protocol, datasets in protocols.items():
        for columns in found.values():
            each = [columns.get((protocol, dataset), {}) for dataset in dict.fromkeys(datasets)]
            seeds = set.intersection(*map(set, each))
            if seeds:
                columns[protocol, "mean"] = {
                    k: statistics.fmean(part[k] for part in each) for k in sorted(seeds)
                }
    return found


def difference(ours, base):
    """(mean, standard deviation, whether the 95 % interval excludes zero) of the deviations at the
    seeds of both, or None without any."""
    apart = [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]
    if not apart:
        return None
    sure = False
    if len(apart) > 1:
        half = stats.t.ppf(0.975, len(apart) - 1) * statistics.stdev(apart) / len(apart) ** 0.5
        sure = abs(statistics.fmean(apart)) > half
    return statistics.fmean(apart), statistics.pstdev(apart), sure


def format_cell(values, base):
    """The text of a column's {seed: accuracy}, with the difference from `base`'s, if any."""
    if not values:
        return ""
    text = f"{statistics.fmean(values.values()):.2f} ± {statistics.pstdev(values.values()):.2f}"
    if apart := base and difference(values, base):
        text += f" ({apart[0]:+.2f} ± {apart[1]:.2f}{'*' if apart[2] else ''})"
    return text


def table(found, name, columns):
    """Markdown, headed `name`: a row for each method that has a result in one of `columns` {head:
    column}."""
    rows = [[Cell(name), *map(Cell, columns), Cell("seeds"), Cell("command")]]
    for method in sorted(found, key=registry.order):
        mine = [found[method].get(column, {}) for column in columns.values()]
        base = [
            found.get(BASE, {}).get(column, {}) if method != BASE else {}
            for column in columns.values()
        ]
        if any(mine):
            count, command = len(set().union(*mine)), f"`{COMMAND.format(method)}`"
            texts = [Cell(format_cell(*pair)) for pair in zip(mine, base, strict=True)]
            rows.append([Cell(registry.title(method)), *texts, Cell(str(count)), Cell(command)])
    return markdown(rows)


def group_by_protocol(found):
    """{protocol: its data sets in order, the mean last}."""
    columns = {column for values in found.values() for column in values}
    last = ("mean", "distilled images")
    return {
        protocol: sorted((t for p, t in columns if p == protocol), key=lambda t: (t in last, t))
        for protocol in sorted(
            {p for p, _ in columns}, key=lambda p: (p == LOSS, not p.startswith("probe"), p)
        )
    }


def tables(lines):
    """A Markdown table for each protocol, with a column for each data set."""
    found = group_by_seed(lines)
    texts = [
        table(found, p, {t: (p, t) for t in datasets})
        for p, datasets in group_by_protocol(found).items()
    ]
    return "\n\n".join(texts) or "No results yet."


def summary(lines):
    """One Markdown table: each protocol's mean over data sets, and the outer loss of the distilled
    images."""
    found = group_by_seed(lines)
    columns = {
        protocol: (protocol, datasets[-1])
        for protocol, datasets in group_by_protocol(found).items()
    }
    return table(found, "mean over data sets", columns) if found else "No results yet."


def main(argv):
    args = parse_args(argv)
    lines = (
        [*gather_results([args.folder]), *read_losses(args.folder)]
        if args.folder
        else results.read(RESULTS)
    )
    if args.collect:
        kept = [{name: line.get(name) for name in KEPT} for line in lines]
        kept.sort(key=lambda line: (registry.order(line["method"]), line["seed"], column_of(line)))
        files.write_text(RESULTS, "".join(json.dumps(line) + "\n" for line in kept))
    print(tables(lines))


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, help=f"run root (default: benchmarks/{RESULTS.name})"
    )
    parser.add_argument("--collect", action="store_true", help="put the results into that file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
