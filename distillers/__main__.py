"""Every other way to make a distilled set, under one command and with one kind of file.

    python -m distillers random --source tinyimagenet

Writes runs/<source>/<method>/seed<k>/distilled.pt.
"""

import importlib
import sys

from utils import cli
from utils.errors import UserError

METHODS = {  # name -> module with main(argv)
    "random": "distillers.random",
}


def main(argv):
    sys.argv[0] = "python -m distillers"
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nMethods: {', '.join(METHODS)}. Each has its own --help.")
        return
    if not argv or argv[0] not in METHODS:
        raise UserError(f"name a method first, one of: {', '.join(METHODS)}")
    sys.argv[0] += f" {argv[0]}"
    importlib.import_module(METHODS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    cli.run(main)
