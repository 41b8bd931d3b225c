"""Python files that work without this package: a template with the code of one network put in."""

import ast
import inspect
from pathlib import Path

import models

TEMPLATES = Path(__file__).parent / "templates"


def network_code(arch, image_size, num_outputs, width):
    """The source of a network's classes and functions, and of `build()`, which makes it; a list of pieces."""
    function, arguments = models.ARCHITECTURES[arch]
    given = [each.__name__ if callable(each) else repr(each) for each in arguments(image_size, width)]
    build = (
        "def build():\n"
        f'    """A new {models.label(arch, width)} for images of {image_size} x {image_size} pixels."""\n'
        f"    network = Network(*{function.__name__}({', '.join(given)}), {num_outputs})\n"
        "    return network.to(memory_format=torch.channels_last)\n"
    )
    return [inspect.getsource(inspect.getmodule(function)), inspect.getsource(models.Network), build]


def import_order(line):
    """First `import`, then `from`; torch and what builds on it after Python's own."""
    word, module = line.split()[:2]
    return word == "from", module.startswith(("torch", "safetensors")), line


def template(name):
    return (TEMPLATES / name).read_text()


def write(path, docstring, pieces):
    """Write pieces of code to one file; all imports come first, each once."""
    imports, bodies = {"import torch"}, []
    for piece in pieces:
        lines = piece.splitlines()
        for node in ast.parse(piece).body:
            imported = isinstance(node, (ast.Import, ast.ImportFrom))
            if imported and getattr(node, "module", None) not in ("load", "network"):  # these are other pieces
                imports.add(ast.unparse(node))
            if imported or isinstance(node, ast.Expr):  # of expressions there are docstrings only
                lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        bodies.append("\n".join(line for line in lines if line is not None).strip("\n"))
    path.write_text(
        "\n\n\n".join([f'"""{docstring}"""\n\n' + "\n".join(sorted(imports, key=import_order)), *bodies]) + "\n"
    )
