"""Killed 20 times at random moments, checkpoint writing included, a run ends with the very same
file (torture.py)."""

from tests.conftest import command

STAGES = ["target", "distill", "dm"]  # the rest with `python -m tests.torture`


def test_killed_20_times_and_the_same_file():
    rows = command("-m", "tests.torture", *STAGES, "--kills", "20").stdout.splitlines()[2:]
    for stage, row in zip(STAGES, rows, strict=True):
        name, kills, write, flush, rename, *_, compared, _ = (
            cell.strip() for cell in row.strip("|").split("|")
        )
        assert (name, kills) == (stage, "20") and int(compared) >= 1
        assert int(write) + int(flush) + int(rename) > 0
