"""Python files that work without this package: templates with the code of one network in them."""

import ast
import inspect
from pathlib import Path

import models

TEMPLATES = Path(__file__).parent / "templates"
PIECES = ("load", "network")  # what a template imports from other pieces of the same file


def network_code(arch, image_size, num_outputs, width):
    """The source of a network's functions and classes, and of `build()`; a list of pieces."""
    function, arguments = models.ARCHITECTURES[arch]
    arguments = arguments(image_size, width)
    given = ", ".join(each.__name__ if callable(each) else repr(each) for each in arguments)
    label, size = models.label(arch, width), f"{image_size} x {image_size}"
    build = f'''def build():
    """An untrained {label} for images of {size} pixels."""
    network = Network(*{function.__name__}({given}), {num_outputs})
    return network.to(memory_format=torch.channels_last)
'''
    module = inspect.getmodule(function)
    return [inspect.getsource(module), inspect.getsource(models.Network), build]


def template(name):
    return (TEMPLATES / name).read_text()


def write(path, docstring, pieces):
    """Write pieces of code to one file, with all imports at its beginning."""
    imports, bodies = {"import torch"}, []
    for piece in pieces:
        lines = piece.splitlines()
        for node in ast.parse(piece).body:
            imported = isinstance(node, (ast.Import, ast.ImportFrom))
            if imported and getattr(node, "module", None) not in PIECES:
                imports.add(ast.unparse(node))
            if imported or isinstance(node, ast.Expr):  # an expression is a module's docstring
                lines[node.lineno - 1 : node.end_lineno] = [None] * (
                    node.end_lineno - node.lineno + 1
                )
        bodies.append("\n".join(line for line in lines if line is not None).strip("\n"))
    head = f'"""{docstring}"""\n\n' + "\n".join(sorted(imports, key=import_order))
    path.write_text("\n\n\n".join([head, *bodies]) + "\n")


def import_order(line):
    """A sort key: `import` before `from`."""
    return line.startswith("from"), line
