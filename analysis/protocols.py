"""The tables of experiments/protocols.py: KRR-ST and random images under two protocols.

    python -m analysis.protocols                                     # stored results
    python -m analysis.protocols runs/small/protocols/protocols.jsonl

The first table has a row for each combination of the factors. The second has the mean difference
between a set and random images with the target's features, over all combinations with one value of
a factor, and its 95 % interval over the distillations. The third has the sets of
scripts/run_successors.sh under the protocols of the two papers.
"""

import itertools
from pathlib import Path
from statistics import fmean

from analysis.compare import format_cell, format_differences
from analysis.tables import Cell, format_markdown
from distillers import registry
from evaluation import results
from experiments.protocols import PAPERS, PROBES, STEPS, STORED, WEIGHT_DECAYS
from experiments.tables import TABLES
from utils import cli

BASE = ("random_features", False)
ROWS = (("scratch", False), BASE, ("high_loss", False), ("krr_st", False), ("krr_st", True))
FACTORS = {
    "steps": {steps: f"{steps} steps" for steps in STEPS},
    "weight_decay": {value: f"weight decay {value:g}" for value in WEIGHT_DECAYS},
    "arch": {"dc_convnet3": "instance norm", "convnet3": "batch norm"},
    "probe": {name: f"probe: {name}" for name in PROBES},
}


def title(method, raw):
    return registry.title(method) + (", pixels in [0, 1]" if raw else "")


def select_accuracies(lines, row, values, equal_steps=False):
    """Return {(distillation, pre-training): accuracy} of a row of `ROWS`.

    `values` holds a value for each factor. A network without pre-training has no steps, weight
    decay or distillation. `equal_steps` selects the cases with that setting of
    `experiments.protocols.Case`.
    """
    scratch = row[0] == "scratch"
    wanted = {k: v for k, v in values.items() if not scratch or k in ("arch", "probe")}
    return {
        (None if scratch else line["seed"], line["seed"]): line["accuracy"]
        for line in lines
        if (line["method"], line["raw"]) == row
        and line["equal_steps"] == equal_steps
        and all(line[factor] == value for factor, value in wanted.items())
    }


def differences_by_seed(lines, row, values):
    """Return {seed: accuracy of `row` minus that of random images with features}."""
    ours, base = (
        {seed: accuracy for (_, seed), accuracy in select_accuracies(lines, each, values).items()}
        for each in (row, BASE)
    )
    return {seed: ours[seed] - base[seed] for seed in ours.keys() & base.keys()}


def list_combinations(**fixed):
    """Return [{factor: value}] of all combinations with the `fixed` values."""
    choices = [[fixed[name]] if name in fixed else [*texts] for name, texts in FACTORS.items()]
    return [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*choices)]


def format_combinations(lines):
    """Return the first table as Markdown."""
    rows = [[Cell("steps, weight decay, network, probe"), *(Cell(title(*row)) for row in ROWS)]]
    for values in list_combinations():
        base = select_accuracies(lines, BASE, values)
        cells = [
            format_cell(select_accuracies(lines, row, values), {} if row == BASE else base)
            for row in ROWS
        ]
        name = f"{values['steps']}, {values['weight_decay']:g}, "
        name += f"{FACTORS['arch'][values['arch']]}, {values['probe']}"
        rows.append([Cell(name), *map(Cell, cells)])
    return format_markdown(rows)


def format_factors(lines):
    """Return the second table as Markdown."""
    shown = [row for row in ROWS if row != BASE]
    rows = [[Cell("minus random images with features"), *(Cell(title(*row)) for row in shown)]]
    for name, texts in FACTORS.items():
        for value, text in texts.items():
            cells = []
            for row in shown:
                apart = [
                    differences_by_seed(lines, row, values)
                    for values in list_combinations(**{name: value})
                ]
                common = set.intersection(*map(set, apart))
                means = [fmean(each[seed] for each in apart) for seed in sorted(common)]
                cells.append(format_differences(means))
            rows.append([Cell(text), *map(Cell, cells)])
    return format_markdown(rows)


def format_successors(lines):
    """Return the third table as Markdown: differences are from random images of equal storage."""
    rows = [[Cell("images, method"), *(Cell(f"protocol of {name}") for name in PAPERS), Cell("n")]]
    for method, equal_steps in itertools.product(TABLES["successors"].methods, (False, True)):
        m = method.partition("_m_")[2]
        base = f"random_features_m_{m}" if m else "random_features"
        found = [
            select_accuracies(lines, (method, False), values, equal_steps)
            for values in PAPERS.values()
        ]
        others = [
            {} if method == base else select_accuracies(lines, (base, False), values)
            for values in PAPERS.values()
        ]
        if any(found):
            name = registry.title(method).partition(", m = ")[0]
            name += ", as many steps" * equal_steps
            cells = map(format_cell, found, others)
            rows.append(
                [Cell(f"{m or 100}, {name}"), *map(Cell, cells), Cell(f"{max(map(len, found))}")]
            )
    return format_markdown(rows)


FORMATTERS = {
    "protocols": format_combinations,
    "protocol_factors": format_factors,
    "successors": format_successors,
}


def collected_tables():
    """Return {name: text} of the tables of the stored results."""
    if not (lines := results.read(STORED)):
        return {}
    return {name: format_lines(lines) for name, format_lines in FORMATTERS.items()}


def main(argv):
    args = parse_args(argv)
    lines = results.read(args.results)
    print(*(format_lines(lines) for format_lines in FORMATTERS.values()), sep="\n\n")


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "results",
        nargs="?",
        type=Path,
        default=STORED,
        help="results file (default: stored results)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
