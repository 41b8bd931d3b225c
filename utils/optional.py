"""Packages that a single feature needs. They are imported where they are used."""

import importlib

from utils.errors import UserError


def import_optional(module, purpose, package=None):
    """Import and return a module.

    Raises UserError if its package is missing; the message says what to install for `purpose`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from error
