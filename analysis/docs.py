"""Update the tables in README.md and other Markdown files from the stored results, or check them.

    python -m analysis.docs --write README.md docs/*.md
    python -m analysis.docs --check README.md docs/*.md    # fails if a table is stale

A table is placed between `<!-- table NAME -->` and `<!-- end of table -->`. NAME is one of:
- a table or data set of `analysis.tables`;
- a table of `analysis.compare` with stored results, or NAME.datasets of such a table;
- methods, speed, parallel, scaling, protocols, protocol_factors or successors.
"""

import re
from pathlib import Path

from analysis import compare, protocols, tables
from benchmarks import scaling, speed
from distillers import registry
from evaluation import results
from utils import cli, files
from utils.errors import UserError

MARK = re.compile(r"(<!-- table ([\w.-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def update_tables(text, lines):
    """Return `text` with all marked tables rendered from the results `lines` and the benchmarks."""
    made = tables.format_tables(lines) | speed.collected_tables()
    made["methods"] = registry.markdown()
    made["scaling"] = scaling.collected_tables()
    made |= compare.collected_tables() | protocols.collected_tables()
    return MARK.sub(lambda m: f"{m[1]}\n{made.get(m[2], 'No results yet.')}\n\n{m[3]}", text)


def main(argv):
    args = parse_args(argv)
    lines = results.read(tables.RESULTS)
    for path in args.files:
        before = path.read_text()
        after = update_tables(before, lines)
        if args.check and after != before:
            raise UserError(
                f"{path}: the tables are stale; run: python -m analysis.docs --write {path}"
            )
        if after != before:
            files.write_text(path, after)
        state = "up to date" if after == before else "updated"
        print(f"{path}: {len(MARK.findall(before))} tables {state}")


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Markdown files")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="update the tables")
    action.add_argument(
        "--check", action="store_true", help="exit with an error if a table is stale"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
