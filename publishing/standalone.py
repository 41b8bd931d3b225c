"""Python files that work without this package, made from templates and the code of a network."""

import ast
import inspect
from pathlib import Path

import models

TEMPLATES = Path(__file__).parent / "templates"
PIECES = ("load", "network")  # modules whose code is in the same file


def collect_network_code(arch, image_size, num_outputs, width):
    """Return pieces of source code: the network's functions and classes, and `build()`."""
    function, arguments = models.ARCHITECTURES[arch]
    arguments = arguments(image_size, width)
    given = ", ".join(each.__name__ if callable(each) else repr(each) for each in arguments)
    label, size = models.label(arch, width), f"{image_size} x {image_size}"
    build = f'''def build():
    """Return an untrained {label} for images of {size} pixels."""
    network = Network(*{function.__name__}({given}), {num_outputs})
    return network.to(memory_format=torch.channels_last)
'''
    module = inspect.getmodule(function)
    return [inspect.getsource(module), inspect.getsource(models.Network), build]


def read_template(name):
    return (TEMPLATES / name).read_text()


def write(path, docstring, pieces):
    """Write pieces of code to one file, with all imports at the top."""
    imports, bodies = {"import torch"}, []
    for piece in pieces:
        lines = piece.splitlines()
        for node in ast.parse(piece).body:
            imported = isinstance(node, (ast.Import, ast.ImportFrom))
            if imported and getattr(node, "module", None) not in PIECES:
                imports.add(ast.unparse(node))
            if imported or isinstance(node, ast.Expr):  # docstring of a module
                lines[node.lineno - 1 : node.end_lineno] = [None] * (
                    node.end_lineno - node.lineno + 1
                )
        bodies.append("\n".join(line for line in lines if line is not None).strip("\n"))
    head = f'"""{docstring}"""\n\n' + "\n".join(sorted(imports, key=import_order))
    path.write_text("\n\n\n".join([head, *bodies]) + "\n")


def import_order(line):
    """Sort key: `import` before `from`."""
    return line.startswith("from"), line
