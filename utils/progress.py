"""Progress bar of the main process. In a log file, it writes a line every ten seconds."""

import sys

from tqdm import tqdm

from utils import distributed


def progress_bar(iterable=None, **options):
    """Return a tqdm bar on standard error. `options` are those of tqdm (desc, total, initial)."""
    options |= dict(mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True)
    if not distributed.is_main_process():
        options["disable"] = True  # otherwise unset, so that $TQDM_DISABLE applies
    return tqdm(iterable, **options)
