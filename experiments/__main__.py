"""Make a table or figure: run the missing commands.

    python -m experiments table1 --dry-run       # list the commands, and the remaining time
    python -m experiments table1 --quick         # the reduced table, in hours on a CPU

The scripts scripts/run_*.sh call this module. Rerun a command to resume. Several processes may work
on one run root at the same time.
"""

import os
import sys
import textwrap
from pathlib import Path

from experiments import scheduler
from experiments.plan import Choice, Plan
from experiments.tables import TABLES
from utils import cli
from utils.errors import UserError
from utils.run import program_name


def make_plan(argv):
    """Return the parsed flags and the `Plan` of the command line `argv`: a table and its flags.

    Raises UserError for an unknown table and as `Plan`.
    """
    if argv[0] not in TABLES:
        raise UserError(f"{argv[0]}: no such table; choose one of {', '.join(TABLES)}")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parse_args(TABLES[argv[0]], argv[1:end])
    chosen = {name: value for name, value in vars(args).items() if name not in ("jobs", "dry_run")}
    return args, Plan(TABLES[argv[0]], Choice(**chosen, flags=argv[end + 1 :]))


def main(argv):
    if not argv:
        raise UserError(f"the first argument must be a table: {', '.join(TABLES)}")
    if argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nTables:")
        for name, table in TABLES.items():
            text = f"{name}: {table.description.partition('. ')[0].rstrip('.')}."
            print(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="      "))
        print("\nEach table has its own --help.")
        return
    args, plan = make_plan(argv)
    jobs = args.jobs or ((os.cpu_count() or 1) if plan.scale.folder else 1)
    if args.dry_run:
        scheduler.show(plan.tasks, jobs)
        return
    print(scheduler.estimate(plan.tasks, jobs), flush=True)
    sys.exit(scheduler.carry_out(plan.tasks, jobs, plan.runs))


def parse_args(table, argv):
    parser = cli.Parser(table.description, prog=f"{program_name()} {table.name}")
    what, run = parser.groups["data"], parser.groups["run"]
    if table.quick:
        text = "use reduced settings and <run root>/quick; the tables say so"
        run.add_argument("--quick", action="store_true", help=text)
    sources = " ".join(source.name for source in table.sources)
    what.add_argument("--sources", nargs="+", metavar="S", help=f"data sets to distil: {sources}")
    what.add_argument(
        "--datasets",
        nargs="+",
        metavar="D",
        help=f"data sets to evaluate on (default: {' '.join(table.datasets) or 'none'})",
    )
    method = parser.groups["method"]
    method.add_argument("--methods", nargs="+", metavar="M", help=" ".join(table.methods))
    archs = " ".join(table.networks) or "that of the source"
    method.add_argument("--archs", nargs="+", metavar="A", help=f"networks: {archs}")
    keys = " ".join(protocol.key for protocol in table.protocols)
    method.add_argument("--protocols", nargs="+", metavar="P", help=f"evaluations: {keys}")
    method.add_argument(
        "--oracle",
        action="store_true",
        help="add the oracle: pre-training on all images of the source with the target's features",
    )
    method.add_argument(
        "--probes",
        action="store_true",
        help="add linear probes with 1, 5, 10, 50 and 100 %% of the labels, and nearest neighbours",
    )
    method.add_argument(
        "--head",
        action="store_true",
        help="add the accuracy on the source of networks trained only on the distilled set",
    )
    seeds = " ".join(map(str, table.seeds))
    run.add_argument(
        "--seeds", nargs="+", metavar="K", help=f"seeds of pre-training (default: {seeds})"
    )
    seeds = " ".join(map(str, table.distill_seeds))
    text = f"seeds of distillation (default: {seeds})"
    run.add_argument("--distill-seeds", nargs="+", metavar="K", help=text)
    run.add_argument(
        "--jobs",
        type=cli.positive_int,
        metavar="N",
        help="number of parallel commands (default: 1, or one per core with reduced settings)",
    )
    run.add_argument(
        "--run-root", type=Path, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    what.add_argument(
        "--data-root", type=Path, help="folder of the data sets (default: datasets, or $DATA_ROOT)"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="list the commands, their state, and the remaining time",
    )
    parser.epilog = (
        "Flags after -- are passed to every stage: -- --device cuda. Figures and tables do not "
        "take them."
    )
    args = parser.parse_args(argv)
    for name in ("sources", "datasets", "methods", "archs", "protocols", "seeds", "distill_seeds"):
        if (values := getattr(args, name)) is not None:
            words = [
                word for value in values for word in value.split()
            ]  # "A B" is equivalent to A B
            setattr(args, name, [*dict.fromkeys(words)])
    for name in ("seeds", "distill_seeds"):
        if (values := getattr(args, name)) is not None:
            if bad := [word for word in values if not word.isdigit()]:
                parser.error(f"--{name.replace('_', '-')} {bad[0]}: not a seed")
            setattr(args, name, [int(word) for word in values])
    return args


if __name__ == "__main__":
    cli.run(main)
