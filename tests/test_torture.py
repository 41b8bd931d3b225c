"""Killed 20 times at random moments, checkpoint writing included, a run ends with the very same file (torture.py)."""

import pytest

from tests.conftest import command


@pytest.mark.parametrize("stage", ["target", "distill", "kmeans"])
def test_killed_20_times_and_the_same_file(stage):
    row = command("-m", "tests.torture", stage, "--kills", "20").stdout.splitlines()[-1]
    name, kills, write, flush, rename, *_, compared, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, kills) == (stage, "20") and int(compared) >= 1
    assert int(write) + int(flush) + int(rename) > 0
