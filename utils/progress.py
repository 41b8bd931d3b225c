"""One progress bar for all loops: lively in a terminal, a line every ten seconds in a log file; of
the first rank."""

import sys

from tqdm import tqdm

from utils import distributed


def bar(iterable=None, **options):
    """A tqdm bar on standard error; `options` are tqdm's (desc, total, initial)."""
    options |= dict(mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)
    if not distributed.is_main_process():
        options["disable"] = True  # not given otherwise: $TQDM_DISABLE decides
    return tqdm(iterable, **options)
