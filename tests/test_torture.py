"""Runs that are killed 20 times at random moments give the same file (tests/torture.py)."""

from tests.conftest import run_command

STAGES = ["target", "distill", "dm"]  # `python -m tests.torture` runs all stages


def test_killed_runs_give_the_same_file():
    rows = run_command("-m", "tests.torture", *STAGES, "--kills", "20").stdout.splitlines()[2:]
    for stage, row in zip(STAGES, rows, strict=True):
        name, kills, write, flush, rename, *_, compared, _ = (
            cell.strip() for cell in row.strip("|").split("|")
        )
        assert (name, kills) == (stage, "20") and int(compared) >= 1
        assert int(write) + int(flush) + int(rename) > 0
