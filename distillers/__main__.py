"""Every other way to make a distilled set, under one command and with one kind of file.

    python -m distillers random --source cifar100
    python -m distillers import --source cifar100 --method mtt_released --images images_best.pt ...

    python -m distillers export runs/cifar100/krr_st/seed0/distilled.pt FOLDER

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png. `import` does so for a set that others released;
`export` writes a set or a network as a folder that others can use without this package.
"""

import importlib
import sys

from distillers import importing, method
from utils import cli
from utils.errors import UserError

METHODS = (
    "random",
    "random_features",
    "kmeans",
    "dm",
    "dsa",
    "mtt",
    "frepo",
    "kip",
    "gaussian",
    "ssl_bilevel",
)  # modules with a METHOD


def main(argv):
    sys.argv[0] = "python -m distillers"
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nMethods: {', '.join(METHODS)}. Each, import and export have their own --help.")
        return
    if argv[:1] == ["import"]:
        sys.argv[0] += " import"
        importing.main(argv[1:], reserved=("krr_st", "target", "full", *METHODS))
        return
    if argv[:1] == ["export"]:
        sys.argv[0] += " export"
        importlib.import_module("publishing.export").main(argv[1:])
        return
    if not argv or argv[0] not in METHODS:
        raise UserError(f"name a method first, one of: {', '.join(METHODS)}, or import, or export")
    sys.argv[0] += f" {argv[0]}"
    method.main(importlib.import_module(f"distillers.{argv[0]}").METHOD, argv[1:])


if __name__ == "__main__":
    cli.run(main)
