"""Run a distillation method, a baseline, or the import of a released set.

    python -m distillers random --source cifar100
    python -m distillers import --source cifar100 --method mtt_released --images images_best.pt ...
    python -m distillers export runs/cifar100/krr_st/seed0/distilled.pt FOLDER

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png. All methods write the same kind
of file. `import` converts a set that others released. `export` writes a set or a network as a
folder that others can use without this package. KRR-ST itself is distill.py.
"""

import importlib

from distillers import importing, method, registry
from utils import cli
from utils.errors import UserError
from utils.run import program_name


def listing():
    """List the methods and their titles, one per line."""
    width = max(map(len, registry.COMMANDS))
    return "\n".join(f"  {name:{width}}  {registry.title(name)}" for name in registry.COMMANDS)


def main(argv):
    name, *flags = argv or [""]
    prog = f"{program_name()} {name}"
    if name in ("-h", "--help"):
        print(f"{__doc__}\nMethods:\n{listing()}\n\nEach method, import and export have a --help.")
    elif name == "import":
        importing.main(flags, reserved=("target", *registry.METHODS), prog=prog)
    elif name == "export":
        importlib.import_module("publishing.export").main(flags, prog=prog)
    elif name in registry.COMMANDS:
        module = importlib.import_module(registry.METHODS[name].module)
        method.main(module.METHOD, flags, prog=prog)
    else:
        known = ", ".join(registry.COMMANDS)
        raise UserError(f"the first argument must be a method ({known}), import or export")


if __name__ == "__main__":
    cli.run(main)
