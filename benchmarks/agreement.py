"""Whether two devices compute the same: equal random numbers, and the comparison of losses."""

import contextlib
import functools
import math
from unittest import mock

import torch

from utils.sampling import Randomness

# Tolerances, as relative differences of losses in float32: before any training, where only the
# rounding of one forward pass differs, and after updates, which amplify it.
UNTRAINED, TRAINED = 1e-4, 1e-1
CPU = torch.device("cpu")


@contextlib.contextmanager
def equal_draws():
    """Draw all random numbers on the CPU, so that runs on all devices get the same."""

    def on_cpu(draw):
        @functools.wraps(draw)
        def draw_and_move(*size, device=CPU, **options):
            return draw(*size, **options).to(device)

        return draw_and_move

    start = Randomness.__init__

    def start_on_cpu(self, seed, device, per_rank=False):
        start(self, seed, CPU, per_rank)

    with contextlib.ExitStack() as stack:
        for name in ("rand", "randn", "randint"):
            stack.enter_context(mock.patch.object(torch, name, on_cpu(getattr(torch, name))))
        stack.enter_context(mock.patch.object(Randomness, "__init__", start_on_cpu))
        stack.enter_context(
            mock.patch("data.augment.cpu_generator", lambda x, generator: generator)
        )
        yield


def differences(found, expected):
    """Return the relative differences of losses: of the first one, and the largest of all.

    They are NaN if there is no loss, if the numbers of losses differ, or if a loss is not finite.
    """
    if not found or len(found) != len(expected) or not all(map(math.isfinite, found + expected)):
        return math.nan, math.nan
    apart = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(found, expected, strict=True)]
    return apart[0], max(apart)


def agree(found, expected, trained=False):
    """Whether `differences` are within `UNTRAINED` (the first loss) and `TRAINED` (all losses).

    `trained` means that updates precede the first loss.
    """
    first, largest = differences(found, expected)
    return first <= (TRAINED if trained else UNTRAINED) and largest <= TRAINED
