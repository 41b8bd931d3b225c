"""Print the paper's tables: our results as mean ± standard deviation (n results), and the paper's.

    python -m analysis.tables runs                    # from all results.jsonl in the folder
    python -m analysis.tables --only table2 runs      # or --csv, --latex
    python -m analysis.tables --collect runs          # store them in analysis/results.jsonl

Results with the paper's settings are compared with the paper's numbers (analysis/paper.csv). The
table shows the difference, and whether it is within two of the paper's standard deviations. Results
with other settings are in separate tables, which list the settings.

Below a table, further tables show the same sets and networks under other protocols, one table per
data set. These are probes of the features with all or few labels, nearest neighbours, and the head
from pre-training (the accuracy of a network trained only on the distilled set). All other results
are listed by data set.

Standard deviations are those of the population (ddof = 0), as in the paper. `analysis.docs` inserts
the tables into README and docs/.
"""

import csv
import json
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from distillers import registry
from evaluation import results
from models import label
from utils import cli
from utils.presets import image_size

HERE = Path(__file__).parent
RESULTS, PAPER = HERE / "results.jsonl", HERE / "paper.csv"
TITLES = {
    "table1": "Table 1: sets distilled from CIFAR-100, ConvNet3",
    "table2": "Table 2: sets distilled from TinyImageNet, ConvNet4",
    "table3": "Table 3: sets distilled from ImageNet, ConvNet4",
    "table4": "Table 4: knowledge distillation without the target data set, on sets distilled "
    "from TinyImageNet",
    "table5": "Table 5: sets distilled from TinyImageNet, VGG11",
    "table6": "Table 6: sets distilled from TinyImageNet, AlexNet",
    "table7": "Table 7: sets distilled from TinyImageNet, MobileNet",
    "table8": "Table 8: sets distilled from TinyImageNet, ResNet10",
    "imagenette_convnet": "Appendix D: sets distilled from ImageNette at 224 px, ConvNet5",
    "imagenette_resnet18": "Appendix D: sets distilled from ImageNette at 224 px, ResNet18",
    "y_init": "Appendix E: initialisation of the targets, CIFAR-100",
    "ablations": "Departures from the paper, CIFAR-100",
    "fid": "Appendix F: FID to the source",
}
ORACLE = "full"  # the upper reference: never marked as best, and without a number of images
RECIPES = {
    "gaussian": {"kd.lr"},
    "imagenette_resnet18": {"finetune.batch_size"},
}  # settings of the released code, by row or table
PAPERS_NAMES = {"krr_st (y_syn at random)": "krr_st_random_targets"}


@dataclass
class Table:
    """A table of the paper: its rows, its columns, and its numbers.

    `numbers` is a dict {(method, arch, dataset): (mean, std)}. If `probed` is set, the table shows
    other protocols on that data set, and its columns are protocols.
    """

    name: str
    source: str
    archs: list
    datasets: list
    methods: list
    numbers: dict
    probed: str = ""


@dataclass
class Cell:
    """A cell: its text, and whether it is the best of its column (bold)."""

    text: str = ""
    best: bool = False


def all_tables(lines=(), path=PAPER):
    """Return all tables.

    These are the paper's tables, with one FID table per source. For results `lines` there are two
    more kinds: a FID table for each network other than Inception, since FIDs of different networks
    are not comparable, and for other protocols a table for each data set.
    """
    found = {}
    with open(path) as file:
        for line in csv.DictReader(file):
            method, arch = (
                PAPERS_NAMES.get(line["method"], line["method"]),
                line["arch"] or "inception",
            )
            key = (line["table"], line["source"]) if line["table"] == "fid" else line["table"]
            table = found.setdefault(key, Table(line["table"], line["source"], [], [], [], {}))
            for known, word in (
                (table.archs, arch),
                (table.datasets, line["dataset"]),
                (table.methods, method),
            ):
                if word not in known:
                    known.append(word)
            if line["mean"]:
                std = float(line["std"]) if line["std"] else None
                table.numbers[method, arch, line["dataset"]] = float(line["mean"]), std
    base = found["y_init"]
    methods = registry.with_variants("krr_st")
    found["ablations"] = Table("ablations", base.source, base.archs, base.datasets, methods, {})
    for line in sorted((each for each in lines if each["protocol"] == "fid"), key=column_of):
        network, source = column_of(line)
        if network != "inception" or ("fid", source) not in found:
            found["fid", network, source] = Table("fid", source, [network], [source], [], {})
    others = [line for line in lines if by_another_protocol(line)]
    for base in [table for table in found.values() if table.name not in ("fid", "table4")]:
        for dataset in sorted({line["dataset"] for line in others}):
            beside = Table(base.name, base.source, base.archs, [], base.methods, {}, dataset)
            mine = {other_column(line) for line in others if belongs_to(line, beside)}
            beside.datasets = sorted(mine, key=protocol_order)
            found[base.name, dataset] = beside
    return [table for name in TITLES for table in found.values() if table.name == name]


def value(line):
    return line["fid"] if line["protocol"] == "fid" else line["accuracy"]


def method_of(line):
    """Return the method of a row; in knowledge distillation it is that of the images."""
    return line["images"]["method"] if line["protocol"] == "kd" else line["method"]


def by_another_protocol(line):
    """Return whether the protocol is not in the paper's tables: a probe, a head, or few labels."""
    few = line.get("labels_per_class") or line.get("label_fraction")
    return bool(few) or line["protocol"] not in ("full", "kd", "fid")


def belongs_to(line, table):
    """Return whether a result belongs to `table`, at any scale."""
    method = method_of(line)
    if by_another_protocol(line) != bool(table.probed):
        return False
    if registry.base(method) in registry.VARIANTS and method not in table.methods:
        return False
    if table.name in ("y_init", "ablations") and method not in table.methods:
        return False
    if table.name == "fid":
        return line["protocol"] == "fid" and column_of(line) == (table.archs[0], table.source)
    if line.get("arch") not in table.archs:
        return False
    if table.name == "table4":
        start = "scratch" if method == "gaussian" else method
        return (
            line["protocol"] == "kd"
            and line["images"]["source"] == table.source
            and line["method"] == start
        )
    if table.probed:
        return line["dataset"] == table.probed and (
            line["source"] == table.source or method == "scratch"
        )
    return line["protocol"] == "full" and (line["source"] == table.source or method == "scratch")


def deviations_of(line, table):
    """Return the settings that differ from the paper's: {name: [ours, paper's]}.

    They exclude the precision, which the paper does not give.
    """
    method = method_of(line)
    own = (
        registry.own_settings(method) | RECIPES.get(method, set()) | RECIPES.get(table.name, set())
    )
    scale = {
        name: pair
        for name, pair in line.get("deviations", {}).items()
        if name not in own and not is_precision(name)
    }
    size = image_size(table.source)
    if (
        line["method"] == "scratch" and line["image_size"] != size
    ):  # without a source, compare with the table's
        scale["image_size"] = [line["image_size"], size]
    return scale


def is_precision(name):
    """Return whether the setting `name` of `presets.deviations` is a precision."""
    return name.endswith(".precision")


def precisions_of(line):
    """Return the stages that were not in float32, as ["bf16 in distill, pretrain"]."""
    stages = defaultdict(list)
    for name, (precision, _) in line.get("deviations", {}).items():
        if is_precision(name):
            stages[precision].append(name.removesuffix(".precision"))
    return [f"{precision} in {', '.join(names)}" for precision, names in sorted(stages.items())]


def column_of(line):
    """Return the column of a result: (network, data set).

    For other protocols than the paper's it is (network, protocol); for FID it is (network of the
    features, source).
    """
    if line["protocol"] == "fid":
        return line["network"], line["source"]
    return line["arch"], other_column(line) if by_another_protocol(line) else line["dataset"]


def format_value(number):
    return (
        f"{number:,}" if isinstance(number, int) and not isinstance(number, bool) else f"{number}"
    )


def natural_key(text):
    """Sort key that orders numbers in a text by value: 50 before 1,000."""
    parts = re.split(r"(\d+)", text.replace(",", ""))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def format_setting(name, here, theres):
    return f"{name} {here} ({' or '.join(sorted(theres, key=natural_key))})"


def split_deviations(lines, table):
    """Split the deviations of `lines` into common ones and those that distinguish rows.

    Returns [(name, ours, {paper's})] of the common ones, and the names of the others.
    """
    here, there, groups = defaultdict(set), defaultdict(set), defaultdict(list)
    for line in lines:
        scale = deviations_of(line, table)
        groups[method_of(line), column_of(line)].append(scale)
        for name, pair in scale.items():
            here[name].add(format_value(pair[0]))
            there[name].add(format_value(pair[1]))
    made = [
        (method, scale)
        for (method, _), scales in groups.items()
        for scale in scales
        if method not in ("scratch", "gaussian")
    ]
    apart = {
        name
        for name in here
        if len(here[name]) > 1
        or any(
            len({json.dumps(scale.get(name)) for scale in scales}) > 1 for scales in groups.values()
        )
        or (
            name in ("num_images", "width", "image_size")
            and not all(
                name in scale for method, scale in made if (method, name) != (ORACLE, "num_images")
            )
        )
    }
    return [(name, min(here[name]), there[name]) for name in here if name not in apart], apart


def select_results(table, lines):
    """Yield the results that `table` shows, as (reduced, lines).

    The first part is at the paper's scale, the second at reduced scale. Columns with results of the
    baseline row only are excluded.
    """
    base = "krr_st" if any(method in registry.VARIANTS for method in table.methods) else "scratch"
    mine = [line for line in lines if belongs_to(line, table)]
    if (
        table.name == "fid" and not table.numbers
    ):  # by another network than Inception: all scales in one table
        yield any(deviations_of(line, table) for line in mine), mine
        return
    for reduced in (False, True):
        chosen = [line for line in mine if bool(deviations_of(line, table)) == reduced]
        columns = {column_of(line) for line in chosen if method_of(line) != base}
        yield reduced, [line for line in chosen if column_of(line) in columns]


def split_by_scale(table, lines):
    """Yield the results of `table` in `lines` as (settings, columns, rows), for each scale.

    At the paper's scale, `settings` is None. At reduced scale, it is the list of deviations common
    to all rows. A row is (method, distinguishing settings, {column: results}).
    """
    for reduced, chosen in select_results(table, lines):
        if not chosen:
            continue
        common, apart = split_deviations(chosen, table)
        rows = defaultdict(lambda: defaultdict(list))
        for line in chosen:
            scale = deviations_of(line, table)
            own = [
                format_setting(name, format_value(scale[name][0]), [format_value(scale[name][1])])
                for name in sorted(apart & {*scale})
            ]
            own += precisions_of(line)
            own += (
                [f"distilled with seed {line['distilled_seed']}"]
                if line.get("distilled_seed")
                else []
            )
            rows[method_of(line), ", ".join(own)][column_of(line)].append(value(line))
        settings = [format_setting(*each) for each in sorted(common)] if reduced else None
        found = sorted({column for columns in rows.values() for column in columns})
        paper = [(arch, dataset) for arch in table.archs for dataset in table.datasets]
        columns = [each for each in paper if each in found] + [
            each for each in found if each not in paper
        ]
        in_order = sorted(rows, key=lambda key: (registry.order(key[0]), natural_key(key[1])))
        yield settings, columns, [(*key, rows[key]) for key in in_order]


def make_grid(table, reduced, columns, rows):
    """Return the rows of `split_by_scale`, and the paper's, as rows of `Cell`s; heading first."""
    one_arch = len({arch for arch, _ in columns}) == 1
    many_datasets = len({dataset for _, dataset in columns}) > 1
    heads = [
        dataset if one_arch else f"{arch}, {dataset}" if many_datasets else arch
        for arch, dataset in columns
    ]
    better = min if table.name == "fid" else max
    best, papers_best = {}, {}
    for column in columns:
        means = (
            statistics.mean(cells[column])
            for method, _, cells in rows
            if column in cells and method != ORACLE
        )
        best[column] = better(means, default=None)
        known = (mean for (_, *rest), (mean, _) in table.numbers.items() if tuple(rest) == column)
        papers_best[column] = better(known, default=None)
    lines = [[Cell("FID" if table.name == "fid" else "accuracy in %"), Cell(""), *map(Cell, heads)]]
    names = dict.fromkeys(
        sorted([*table.methods, *(method for method, *_ in rows)], key=registry.order)
    )
    for method in names:
        for other, own, cells in rows:
            if other != method:
                continue
            name = registry.title(method) + (f" ({own})" if own else "")
            ours = [Cell("ours")]
            for column in columns:
                v = cells.get(column)
                text = (
                    f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f} (n={len(v)})"
                    if v
                    else ""
                )
                ours.append(
                    Cell(text, bool(v) and other != ORACLE and statistics.mean(v) == best[column])
                )
            lines.append([Cell(name), *ours])
        known = [table.numbers.get((method, *column)) for column in columns]
        if not any(known) or (reduced and not any(other == method for other, *_ in rows)):
            continue
        paper = [
            Cell(
                f"{k[0]:.2f}" + (f" ± {k[1]:.2f}" if k[1] is not None else "") if k else "",
                bool(k) and k[0] == papers_best[column],
            )
            for k, column in zip(known, columns, strict=True)
        ]
        lines.append(
            [
                Cell(registry.title(method)),
                Cell("paper, full scale" if reduced else "paper"),
                *paper,
            ]
        )
        mine = [cells for other, own, cells in rows if (other, own) == (method, "")]
        if mine and not reduced:
            compared = [
                format_difference(mine[0].get(column), k)
                for column, k in zip(columns, known, strict=True)
            ]
            lines.append([Cell(""), Cell("difference"), *(Cell(text) for text, *_ in compared)])
    for above, below in zip(reversed(lines[:-1]), reversed(lines[1:]), strict=True):
        if above[0].text == below[0].text:
            below[0] = Cell("")
    return lines


def format_difference(ours, paper):
    """Return (text, difference, within two of the paper's standard deviations).

    The last two are None if unknown.
    """
    if not ours or not paper:
        return "", None, None
    apart = statistics.mean(ours) - paper[0]
    within = abs(apart) <= 2 * paper[1] if paper[1] is not None else None
    return f"{apart:+.2f}" + {None: "", True: " ✓", False: " ✗"}[within], apart, within


def format_markdown(lines):
    """Return rows of `Cell`s as a Markdown table with aligned columns."""
    texts = [[f"**{cell.text}**" if cell.best else cell.text for cell in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*texts, strict=True)]
    left = 2 if any(cell.text == "ours" for cell in (line[1] for line in lines)) else 1
    texts.insert(1, ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(
        "| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |"
        for row in texts
    )


def format_latex(lines):
    """Return rows of `Cell`s as a LaTeX tabular."""

    def escaped(cell):
        text = re.sub(r"([%&#_$])", r"\\\1", cell.text)
        for sign, command in (("±", r"$\pm$"), ("✓", r"$\checkmark$"), ("✗", r"$\times$")):
            text = text.replace(sign, command)
        return rf"\textbf{{{text}}}" if cell.best else text

    rows = [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{'l' * 2 + 'r' * (len(lines[0]) - 2)}}}",
            r"\hline",
            rows[0],
            r"\hline",
            *rows[1:],
            r"\hline",
            r"\end{tabular}",
        ]
    )


def write_csv(tables, lines, out):
    """Write tables as CSV, one line per cell."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "table",
            "scale",
            "method",
            "arch",
            "dataset",
            "mean",
            "std",
            "n",
            "paper_mean",
            "paper_std",
            "difference",
            "within_two_std",
        ]
    )
    for table in tables:
        for settings, columns, rows in split_by_scale(table, lines):
            for method, own, cells in rows:
                for column in columns:
                    if v := cells.get(column):
                        known = table.numbers.get((method, *column), ("", ""))
                        _, apart, within = format_difference(
                            v, None if settings is not None or own or not known[0] else known
                        )
                        compared = ["" if each is None else each for each in (apart, within)]
                        scale = "; ".join(
                            filter(None, ["paper" if settings is None else "reduced", own])
                        )
                        writer.writerow(
                            [
                                table.name,
                                scale,
                                method,
                                *column,
                                statistics.mean(v),
                                statistics.pstdev(v),
                                len(v),
                                *known,
                                *compared,
                            ]
                        )


def other_row(line):
    """Return the row name of a result that is in no table of the paper."""
    origin = f", m = {line['num_images']}, {line['source']}" if line["source"] else ""
    origin += f", distilled with seed {line['distilled_seed']}" if line["distilled_seed"] else ""
    own = {
        "source": line["source"],
        "method": line["method"],
        "seed": line["distilled_seed"],
        "num_images": line["num_images"],
    }
    if (images := line.get("images", own)) != own:  # knowledge distillation on other images
        method = registry.title(images["method"])
        origin += f"; on {images['num_images']} images of {method}"
        origin += f", {images['source']}" + (
            f", distilled with seed {images['seed']}" if images["seed"] else ""
        )
    network = f"{label(line['arch'], line['width'])} at {line['image_size']} px"
    origin += "".join(f", {precision}" for precision in precisions_of(line))
    return f"{registry.title(line['method'])} ({network}{origin})"


def other_column(line):
    labels = f", {line['labels_per_class']} labels/class" if line.get("labels_per_class") else ""
    labels += (
        f", {100 * line['label_fraction']:g} % of labels" if line.get("label_fraction") else ""
    )
    labels += f", {line['label_draws']} draws" if line.get("label_draws") else ""
    return f"{line['protocol']}{labels}"


def protocol_order(column):
    """Sort key of `other_column`: by protocol, then few labels before all."""
    protocol, _, labels = column.partition(", ")
    known = ["r2", "head", "knn", "linear", "full", "kd"]
    return (
        known.index(protocol) if protocol in known else len(known),
        protocol,
        not labels,
        natural_key(labels),
    )


def other_results(lines):
    """Return the results in none of the paper's tables: {data set: rows of `Cell`s}."""
    found = defaultdict(lambda: defaultdict(list))
    shown = {
        id(line)
        for table in all_tables(lines)
        for _, part in select_results(table, lines)
        for line in part
    }
    for line in sorted(lines, key=lambda line: registry.order(line["method"])):
        if id(line) not in shown:
            found[line["dataset"]][other_row(line), other_column(line)].append(line["accuracy"])
    grids = {}
    for dataset in sorted(found):
        cells = found[dataset]
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = sorted({column for _, column in cells}, key=protocol_order)
        grids[dataset] = [[Cell("in %"), *map(Cell, columns)]]
        for row in rows:
            values = [cells.get((row, column)) for column in columns]
            texts = [
                f"{statistics.mean(v):.2f} ± {statistics.pstdev(v):.2f} (n={len(v)})" if v else ""
                for v in values
            ]
            grids[dataset].append([Cell(row), *map(Cell, texts)])
    return grids


def make_blocks(lines, only=None):
    """Yield (name, heading, rows of `Cell`s) for all tables, or those in `only`, with results."""
    above = name = None
    for table in all_tables(lines):
        if only and table.name not in only:
            continue
        for settings, columns, rows in split_by_scale(table, lines):
            shown_grid = make_grid(table, settings is not None, columns, rows)
            heading = TITLES[table.name]
            heading += (
                f", {table.source}, features of {table.archs[0]}" if table.name == "fid" else ""
            )
            heading += (
                f". The same sets and networks on {table.probed}, under other protocols"
                if table.probed
                else ""
            )
            if settings is None:
                compared = any(cell.text.endswith(("✓", "✗")) for row in shown_grid for cell in row)
                remark = "✓: within two of the paper's standard deviations." if compared else ""
            elif table.name == name and above and {*settings} <= {*above}:
                remark = "**Reduced scale**, with the settings of the table above."
            else:
                above, name = settings, table.name
                said = ", ".join(settings) or "see the rows"
                remark = (
                    "**Reduced scale, not comparable with the paper.** "
                    f"Settings (the paper's in brackets): {said}."
                )
            yield table.name, f"{heading}. {remark}".strip(), shown_grid
    for dataset, rows in other_results(lines).items():
        if not only or dataset in only:
            known = [cell.text for cell in rows[0]]
            note = "; r2 is R^2 of the target's features" if "r2" in known else ""
            yield dataset, f"Accuracy on the test split of {dataset}{note}.", rows


def format_tables(lines, only=None, style=format_markdown):
    """Return {name: text} of the tables of `make_blocks`."""
    texts = defaultdict(list)
    for name, heading, rows in make_blocks(lines, only):
        texts[name] += [heading, style(rows)]
    return {name: "\n\n".join(parts) for name, parts in texts.items()}


def identity(line):
    """Return the key of a result; results of the same experiment have the same key."""
    names = (
        "source",
        "method",
        "distilled_seed",
        "num_images",
        "arch",
        "width",
        "image_size",
        "dataset",
        "protocol",
        "labels_per_class",
        "label_fraction",
        "label_draws",
        "images",
        "network",
        "deviations",
        "seed",
    )
    return json.dumps([line.get(name) for name in names], sort_keys=True)


def gather_results(folders):
    """Return all results in `folders`; of the same experiment only the last."""
    paths = sorted(
        {path.resolve() for folder in folders for path in Path(folder).rglob("results.jsonl")}
    )
    return [*{identity(line): line for path in paths for line in results.read(path)}.values()]


def collect(folders, path=RESULTS):
    """Store the results in `folders` in the file `path`; replace those of the same experiments."""
    kept = results.merge(path, gather_results(folders), identity)
    print(f"{path}: {len(kept)} results")


def main(argv):
    args = parse_args(argv)
    if args.collect:
        collect(args.folders or ["runs"])
        return
    lines = gather_results(args.folders) if args.folders else results.read(RESULTS)
    only = args.only.split(",") if args.only else None
    if args.csv:
        write_csv([t for t in all_tables(lines) if not only or t.name in only], lines, sys.stdout)
        return
    texts = format_tables(lines, only, format_latex if args.latex else format_markdown)
    print(
        "\n\n".join(texts.values()) or f"no results yet{f' for {args.only}' if args.only else ''}"
    )


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        help=f"folders of runs (default: the stored results, analysis/{RESULTS.name})",
    )
    parser.add_argument(
        "--only", help=f"comma-separated names of tables: {', '.join(TITLES)}, or a data set"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--collect",
        action="store_true",
        help="store the results of the folders in analysis/results.jsonl",
    )
    what.add_argument("--latex", action="store_true", help="print LaTeX")
    what.add_argument(
        "--csv", action="store_true", help="the paper's tables as CSV, one line per cell"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
