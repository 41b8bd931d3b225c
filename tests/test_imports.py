"""Imports between the folders go in one direction, without a circle, at the top of each file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # from the ground up; a file may import from its own room and from those before it
    ("utils",),
    ("data",),
    ("models",),
    ("evaluation",),
    ("distillers",),
    ("pretrain_target", "distill", "pretrain", "finetune", "kd"),
    ("benchmarks", "experiments"),
    ("analysis",),
    ("tests",),
)
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names}
# Slow to import or optional, so imported where they are used.
LAZY = {"sklearn", "scipy", "torch_fidelity", "timm", "safetensors"}


def get_module(path):
    """Return the module of a file: utils/files.py -> utils.files, data/__init__.py -> data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    get_module(path): path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] in LEVELS or path.parent == ROOT
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def read_import(node):
    """Return the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in FILES else node.module for name in names]


def list_imports(tree):
    return [
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in read_import(node)
    ]


GRAPH = {
    name: sorted({each for each in list_imports(tree) if each in FILES})
    for name, tree in TREES.items()
}


def test_every_file_is_in_a_known_folder():
    assert {name.split(".")[0] for name in FILES} == set(LEVELS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_from_a_higher_folder(name):
    level = LEVELS[name.split(".")[0]]
    above = [each for each in GRAPH[name] if LEVELS[each.split(".")[0]] > level]
    assert not above, f"{name} imports {', '.join(above)}"


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for each in GRAPH[name]:
                visit(each)
            done.add(path.pop())

    for name in FILES:
        visit(name)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_are_at_the_top_of_a_file(name):
    top = {id(node) for node in TREES[name].body}
    found = {
        each
        for node in ast.walk(TREES[name])
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in top
        for each in read_import(node)
        if each.split(".")[0] not in LAZY
    }
    assert not found, f"{name} imports {', '.join(sorted(found))} within a function"
