"""Every other way to make a distilled set, under one command and with one kind of file.

    python -m distillers random --source cifar100

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png.
"""

import importlib
import sys

from distillers import method
from utils import cli
from utils.errors import UserError

METHODS = ("random", "random_features", "dm", "dsa", "mtt")  # modules of this package, each with a METHOD


def main(argv):
    sys.argv[0] = "python -m distillers"
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nMethods: {', '.join(METHODS)}. Each has its own --help.")
        return
    if not argv or argv[0] not in METHODS:
        raise UserError(f"name a method first, one of: {', '.join(METHODS)}")
    sys.argv[0] += f" {argv[0]}"
    method.main(importlib.import_module(f"distillers.{argv[0]}").METHOD, argv[1:])


if __name__ == "__main__":
    cli.run(main)
