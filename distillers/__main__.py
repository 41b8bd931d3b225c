"""Every other way to make a distilled set, under one command and with one kind of file.

    python -m distillers random --source cifar100
    python -m distillers import --source cifar100 --method mtt_released --images images_best.pt ...

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png. `import` does so for a set that others released.
"""

import importlib
import sys

from distillers import importing, method, registry
from utils import cli
from utils.errors import UserError

PROGRAM = "python -m distillers"


def listing():
    """The methods, one a line, with what each does."""
    width = max(map(len, registry.COMMANDS))
    return "\n".join(f"  {name:{width}}  {registry.METHODS[name].title}" for name in registry.COMMANDS)


def main(argv):
    name, *flags = argv or [""]
    if name in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{listing()}\n\nEach, and import, has its own --help.")
    elif name == "import":
        sys.argv[0] = f"{PROGRAM} import"
        importing.main(flags, reserved=("target", *registry.METHODS))
    elif name in registry.COMMANDS:
        sys.argv[0] = f"{PROGRAM} {name}"
        method.main(importlib.import_module(registry.METHODS[name].module).METHOD, flags)
    else:
        raise UserError(f"name a method first, one of: {', '.join(registry.COMMANDS)}, or import")


if __name__ == "__main__":
    sys.argv[0] = PROGRAM
    cli.run(main)
