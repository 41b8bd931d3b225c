"""One progress bar for all loops: lively in a terminal, a line every ten seconds in a log file."""

import sys

from tqdm import tqdm


def bar(iterable=None, **options):
    """A tqdm bar on standard error; `options` are tqdm's (desc, total, initial)."""
    return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)
