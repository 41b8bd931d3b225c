"""Compare the rows of an experiment, paired by seed, as Markdown.

    python -m analysis.compare departures runs/departures              # results of a run root
    python -m analysis.compare departures --collect runs/departures    # add them to the stored ones
    python -m analysis.compare departures                              # stored results
    python -m analysis.compare small --against krr_st

The first argument is a table of experiments/tables.py. Results of other tables in the same run root
are left out. --collect replaces the stored results of the same rows, columns and seeds. There is a
table for each source, target network and pre-trained network, with a row for each method. The
columns are protocols, first averaged over the data sets and then for each data set. Rows without a
source or target network (no pre-training, random images with labels) appear in every table to which
they belong. No pre-training appears only in columns that other rows have.

A cell is the mean accuracy in percent ± the standard deviation over all runs (ddof = 0). The
brackets contain the difference from the row `--against`, paired by the seeds of distillation and
pre-training: its mean, and the 95 % interval of Student's t over the means per distillation. A star
marks an interval that excludes zero. By chance alone, one in twenty cells has a star. Column n is
the number of distillations and of pre-trainings per distillation.

The table `less_work` has a column with the TFLOP of a distillation (`measure_tflop`).

The last table is the loss that distill.py minimises, times 100, under the final pool and for random
images of the source, or for images that --source-images left out. Variants with a different kind of
pool are not comparable in this loss.
"""

import statistics
from collections import defaultdict
from pathlib import Path

import torch
from scipy import stats

import models
from analysis.tables import Cell, format_markdown, gather_results, other_column, protocol_order
from benchmarks.timing import count_flop
from data.distilled import load_distilled
from distillers import registry
from evaluation import results
from experiments.tables import TABLES, Source
from utils import cli, files
from utils.errors import UserError
from utils.presets import DISTILL

HERE = Path(__file__).parent
KEPT = (
    "method",
    "source",
    "distilled_seed",
    "seed",
    "dataset",
    "protocol",
    "labels_per_class",
    "label_fraction",
    "accuracy",
    "num_images",
    "arch",
    "width",
    "image_size",
    "digest",
    "deviations",
    "device",
    "versions",
    "seconds",
)
LOSS = "outer loss x 100"
LOSSES = {  # meta of a distilled set -> column
    "outer_loss_initial": "initial images",
    "outer_loss_distilled": "distilled images",
    "outer_loss_distilled_others": "distilled images, on other images",
}
COST = "distillation, TFLOP"
OF_SETS = (LOSS, COST)  # measured on a set itself, in place of a protocol
MEAN = "mean over data sets"


def results_file(name):
    """Return the file with the stored results of a table."""
    return HERE / f"{name}.jsonl"


def measure_tflop(distilled):
    """Return the TFLOP that the networks need in a distillation by distill.py.

    Counts the matrix products and convolutions of all passes, each backward pass as two forward
    passes. The initial training of the pool counts with its expected number of steps. Leaves out
    the ridge system.
    """
    settings = DISTILL | distilled.meta["settings"]
    m, member_steps = len(distilled.images), settings["pool_steps"]
    trained = 3 * min(settings["pool_batch"] or m, m)
    passes = settings["outer_batch"] + 3 * settings["updates_per_batch"] * m
    passes = settings["outer_steps"] * (passes + trained * member_steps / (member_steps + 1))
    passes += settings["pool_size"] * max(2, member_steps) / 2 * trained
    size = settings["image_size"]
    network = models.build(settings["arch"], size, distilled.num_outputs, settings["width"])
    network, x = network.to("meta").eval(), torch.empty(1, 3, size, size, device="meta")
    return passes * count_flop(lambda: network.embed(x)) / 1e12


def read_losses(folder):
    """Yield lines with the outer loss and TFLOP of each set of distill.py in a run root."""
    for path in sorted(folder.glob("*/*/seed*/distilled.pt")):
        distilled = load_distilled(path)
        meta = distilled.meta
        shared = dict(method=meta["method"], source=meta["source"], distilled_seed=meta["seed"])
        shared |= dict(deviations=meta["deviations"])
        for name, dataset in LOSSES.items():
            if (loss := meta.get(name)) is not None:
                digest, accuracy = f"{files.digest(path)} {name}", round(100 * loss, 4)
                yield shared | dict(
                    protocol=LOSS, dataset=dataset, accuracy=accuracy, digest=digest
                )
        if "outer_loss_distilled" in meta:
            digest, accuracy = f"{files.digest(path)} cost", round(measure_tflop(distilled), 4)
            yield shared | dict(protocol=COST, dataset=COST, accuracy=accuracy, digest=digest)


def describes(table, line):
    """Return whether a `Table` describes the source, row, column and seeds of a result line."""
    sources = (*table.sources, *table.quick_sources, *table.more_sources)
    if line["source"] not in {None, *(source.name for source in sources)}:
        return False
    if registry.base(line["method"]) not in {*table.methods, "full"}:
        return False
    if line["protocol"] in OF_SETS:
        return line["protocol"] == LOSS or table.show_cost
    if table.networks and line["arch"] not in table.networks:
        return False
    has_set = registry.entry_of(line["method"]).module
    if table.paired_seeds and has_set and line["seed"] != line["distilled_seed"]:
        return False
    return any(protocol.matches(line) for protocol in table.protocols)


def split_blocks(table, lines):
    """Return [(heading, lines)] for each source, target network and network of a `Table`.

    Of several target networks, those without results are left out. If the row that others are
    compared with names a target network, there is no block for each target network.
    """
    if len(table.networks) < 2:
        return _split_by_target(table, lines)
    return [
        (f"{heading}, {arch}", [line for line in part if line.get("arch") in (arch, None)])
        for heading, part in _split_by_target(table, lines)
        for arch in table.networks
    ]


def _split_by_target(table, lines):
    lines = [line for line in lines if describes(table, line)]
    described = {source.name: source for source in table.sources}
    found = {line["source"] for line in lines} - {None}
    order = [*(name for name in described if name in found), *sorted(found - described.keys())]
    blocks = []
    for name in order:
        source = described.get(name) or Source(name)
        of_source = [line for line in lines if line["source"] == name]
        columns = set(map(column_of, of_source))
        of_source += [
            line for line in lines if line["source"] is None and column_of(line) in columns
        ]
        if "." in table.against:
            blocks.append((name, of_source))
            continue
        for target in source.targets:
            several = len(source.targets) > 1
            mine = [line for line in of_source if target_of(line) in (target.name, "")]
            heading = name + (f", target network {target.name}" if several else "")
            if not several or any(map(target_of, mine)):
                blocks.append((heading, mine))
    return blocks


def target_of(line):
    """Return the name of the target network in the method of a result, or ""."""
    return line["method"].partition(".")[2]


def column_of(line):
    """Return the column of a result: (protocol, data set)."""
    own = line["protocol"] in OF_SETS
    return line["protocol"] if own else other_column(line), line["dataset"]


def group_by_seeds(lines, by_target=False):
    """Return {method: {column: {(distillation, pre-training): accuracy}}}.

    The mean over data sets is included if all data sets have a result. With `by_target`, the name
    of a method includes its target network.
    """
    found = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        seeds = line["distilled_seed"], line.get("seed")
        method = line["method"] if by_target else registry.base(line["method"])
        found[method][column_of(line)][seeds] = line["accuracy"]
    datasets = defaultdict(dict)
    for columns in found.values():
        for protocol, dataset in columns:
            datasets[protocol][dataset] = None
    for protocol in OF_SETS:
        datasets.pop(protocol, None)
    for protocol, names in datasets.items():
        for columns in found.values():
            parts = [columns.get((protocol, name), {}) for name in names]
            if common := set.intersection(*map(set, parts)):
                columns[protocol, MEAN] = {
                    seeds: statistics.fmean(part[seeds] for part in parts)
                    for seeds in sorted(common, key=str)
                }
    return found


def paired_differences(ours, base):
    """Return the differences of two {(distillation, pre-training): accuracy} at equal seeds.

    A row without distillations (None) is compared with every distillation of the other row.

    Returns:
        A list with the mean difference over pre-trainings for each distillation. If neither row has
        distillations, it has the difference of each pre-training.
    """
    groups = defaultdict(list)
    for (ours_set, ours_seed), accuracy in ours.items():
        for (base_set, base_seed), other in base.items():
            if ours_seed == base_seed and (ours_set == base_set or None in (ours_set, base_set)):
                seed = base_set if ours_set is None else ours_set
                key = ("pre-training", ours_seed) if seed is None else ("distillation", seed)
                groups[key].append(accuracy - other)
    return [statistics.fmean(groups[key]) for key in sorted(groups)]


def interval(values):
    """Return the 95 % interval (Student's t) of the mean of `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def format_cell(values, base):
    """Return the text of a cell; `base` are the values of the reference row, or empty."""
    if not values:
        return ""
    accuracies = values.values()
    text = f"{statistics.fmean(accuracies):.2f} ± {statistics.pstdev(accuracies):.2f}"
    if apart := paired_differences(values, base):
        text += f" ({format_differences(apart)})"
    return text


def format_differences(apart):
    """Return the mean of differences with its 95 % interval, and a star if that excludes zero."""
    if not apart:
        return ""
    text = f"{statistics.fmean(apart):+.2f}"
    if bounds := interval(apart):
        low, high = bounds
        text += f" [{low:+.2f}, {high:+.2f}]{'*' if low > 0 or high < 0 else ''}"
    return text


def count_runs(columns):
    """Return the number of distillations and of pre-trainings per distillation, such as 3 x 3.

    A row without distillations or pre-trainings has a single number.
    """
    trained = defaultdict(set)
    for distilled, seed in {pair for values in columns for pair in values}:
        trained[distilled] |= {seed} - {None}
    most = max(map(len, trained.values()))
    if None in trained:
        return str(most)
    return f"{len(trained)} x {most}" if most else str(len(trained))


def format_table(found, heading, columns, against):
    """Return a Markdown table with a row for each method that has results.

    `columns` is {heading: column}; `heading` is the first cell. All columns except the cost have
    the differences from the row `against`.
    """
    rows = [[Cell(heading), *map(Cell, columns), Cell("n")]]
    for method in sorted(found, key=registry.order):
        mine = [found[method].get(column, {}) for column in columns.values()]
        reference = found.get(against, {}) if method != against else {}
        base = [
            {} if column == (COST, COST) else reference.get(column, {})
            for column in columns.values()
        ]
        if any(mine):
            texts = [Cell(format_cell(*pair)) for pair in zip(mine, base, strict=True)]
            rows.append([Cell(registry.title(method)), *texts, Cell(count_runs(mine))])
    return format_markdown(rows)


def columns_by_dataset(found):
    """Return {data set: {protocol: column}}, with the mean first and the losses last."""
    columns = {column for values in found.values() for column in values}
    names = sorted(
        {dataset for protocol, dataset in columns if protocol not in OF_SETS},
        key=lambda name: (name != MEAN, name),
    )
    ordered = {}
    for name in names:
        protocols = sorted((p for p, dataset in columns if dataset == name), key=protocol_order)
        ordered[name] = {protocol: (protocol, name) for protocol in protocols}
    if losses := {d: (LOSS, d) for p, d in sorted(columns, reverse=True) if p == LOSS}:
        ordered[LOSS] = losses
    return ordered


def format_means(table, lines, against=None):
    """Return Markdown tables of the means over data sets.

    The outer loss is added if several rows have one.
    """
    texts = []
    for heading, part in split_blocks(table, lines):
        found = group_by_seeds(part, "." in table.against)
        if not (by_dataset := columns_by_dataset(found)):
            continue
        columns = dict(next(iter(by_dataset.values())))
        loss = LOSS, "distilled images"
        if LOSS not in columns and sum(loss in values for values in found.values()) > 1:
            columns[LOSS] = loss
        if table.show_cost:
            columns[COST] = COST, COST
        names = [name for name in by_dataset if name not in (MEAN, LOSS)]
        heading += (
            f", evaluated on {names[0]}" if len(names) == 1 else f", {next(iter(by_dataset))}"
        )
        texts.append(format_table(found, heading, columns, against or table.against))
    return "\n\n".join(texts) or "No results yet."


def format_datasets(table, lines, against=None):
    """Return Markdown tables for each data set and for the losses."""
    texts = []
    for heading, part in split_blocks(table, lines):
        found = group_by_seeds(part, "." in table.against)
        for name, columns in columns_by_dataset(found).items():
            if name != MEAN:
                text = format_table(found, f"{heading}: {name}", columns, against or table.against)
                texts.append(text)
    return "\n\n".join(texts) or "No results yet."


def collected_tables():
    """Return {name: text} of all stored tables: NAME has means, NAME.datasets each data set."""
    made = {}
    for name, table in TABLES.items():
        if lines := results.read(results_file(name)):
            made[name] = format_means(table, lines)
            made[f"{name}.datasets"] = format_datasets(table, lines)
    return made


def identity(line):
    """Return the key of a result: its row, its seeds and its column."""
    names = ("source", "method", "arch", "distilled_seed", "seed")
    return *(line.get(name) for name in names), column_of(line)


def sort_key(line):
    seeds = [-1 if line.get(key) is None else line[key] for key in ("distilled_seed", "seed")]
    return line["source"] or "", registry.order(line["method"]), *seeds, column_of(line)


def main(argv):
    args = parse_args(argv)
    table, path = TABLES[args.table], results_file(args.table)
    if args.folder:
        lines = [*gather_results([args.folder]), *read_losses(args.folder)]
        lines = [line for line in lines if "accuracy" in line]
    else:
        lines = results.read(path)
    if args.against:
        blocks = [part for _, part in split_blocks(table, lines)]
        rows = {row for part in blocks for row in group_by_seeds(part, "." in table.against)}
        if args.against not in rows:
            listed = ", ".join(sorted(rows, key=registry.order)) or "(no results)"
            raise UserError(f"--against {args.against}: not one of {listed}")
    if args.collect:
        kept = [{k: line.get(k) for k in KEPT} for line in lines if describes(table, line)]
        lines = results.merge(path, kept, identity, sort_key)
        print(f"{path}: {len(lines)} results\n")
    print(format_means(table, lines, args.against))
    print()
    print(format_datasets(table, lines, args.against))


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument("table", choices=[*TABLES], metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("folder", nargs="?", type=Path, help="run root (default: stored results)")
    parser.add_argument("--against", metavar="ROW", help="reference row (default: the table's)")
    parser.add_argument(
        "--collect", action="store_true", help="add the results of the folder to those in analysis/"
    )
    args = parser.parse_intermixed_args(argv)
    if args.collect and not args.folder:
        parser.error("--collect requires a folder")
    return args


if __name__ == "__main__":
    cli.run(main)
