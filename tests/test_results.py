"""Several processes add results to the same file."""

import fcntl
import subprocess
import sys

import pytest

from evaluation import results
from tests.conftest import ROOT


@pytest.mark.long
def test_several_processes_append_each_result_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from evaluation import results\n"
        "for i in range(100):\n"
        "    results.append(Path(sys.argv[1]), dict(digest=f'{sys.argv[2]}-{i}', filler='x' * "
        "3000))\n"
        "    results.append(Path(sys.argv[1]), dict(digest=f'all-{i}'))\n"
    )
    (tmp_path / "results.jsonl").write_text(
        '{"digest": "first"}\n{"digest": "cut o'
    )  # a full disk, once
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(k)], cwd=ROOT)
        for k in range(3)
    ]
    assert [process.wait(timeout=1800) for process in started] == [0, 0, 0]
    found = sorted(line["digest"] for line in results.read(tmp_path / "results.jsonl"))
    assert found == sorted(["first", *(f"{k}-{i}" for k in (0, 1, 2, "all") for i in range(100))])
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 401


def test_append_waits_for_the_lock(tmp_path):
    results.append(tmp_path, dict(digest="a"))
    with open(tmp_path / "results.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code = "from pathlib import Path; from evaluation import results; "
        code += "results.append(Path({!r}), dict(digest='b'))"
        other = subprocess.Popen([sys.executable, "-c", code.format(str(tmp_path))], cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1)
    assert other.wait(timeout=30) == 0 and len(results.read(tmp_path / "results.jsonl")) == 2
