"""Packages that a single feature needs. They are imported where they are used."""

import importlib

from utils.errors import UserError


def optional(module, purpose, package=None):
    """The module of that name.

    Raises UserError where its package is missing; it says what to install for `purpose`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from error
