"""Follow docs/extending.md literally in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {
    text.partition("\n")[0]: text for text in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
}
FILE_BLOCK = re.compile(r"^In `(\S+)`:\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = (".git", ".venv", ".*_cache", "__pycache__", "runs", "datasets", "images")


def apply_changes(root, section):
    """Apply the changes of a section to the repository at `root`."""
    for name, language, block in FILE_BLOCK.findall(section):
        path = root / name
        if language == "diff":
            lines = block.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            text = path.read_text()
            assert text.count(before) == 1, f"{name} does not have these lines once:\n{before}"
            path.write_text(text.replace(before, after))
        else:
            assert not path.exists()
            path.write_text(block)


@pytest.fixture(scope="module")
def followed(roots, tmp_path_factory):
    """Follow the page in a copy of the repository; return (folder, output by section)."""
    root = tmp_path_factory.mktemp("extending") / "repository"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copytree(
        Path(roots[3], "digits", "target"), root / "runs" / "digits" / "target", dirs_exist_ok=True
    )
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / "bin" / "python").chmod(0o755)
    environment = os.environ | dict(
        PATH=f"{root / 'bin'}:{os.environ['PATH']}", TQDM_DISABLE="1", PYTHONPATH=""
    )
    output = {}
    for title, section in SECTIONS.items():
        apply_changes(root, section)
        (commands,) = COMMANDS.findall(section)
        done = subprocess.run(
            ["bash", "-euc", commands], cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{title}:\n{done.stdout}{done.stderr}"
        output[title] = done.stdout + done.stderr
    return root, output


def test_new_method_appears_in_results_tables_and_docs(followed):
    root, output = followed
    assert "means of random images" in output["A new method"]  # analysis.tables
    assert (root / "runs/digits/blend/seed0/distilled.pt").exists()
    assert "python -m distillers blend" in (root / "docs" / "methods.md").read_text()


def test_new_data_set_is_prepared_distilled_and_evaluated(followed):
    root, output = followed
    assert (root / "runs/patches/random/seed0/distilled.pt").exists()
    (accuracy,) = re.findall(r"-> patches .*: ([\d.]+) %", output["A new data set"])
    assert float(accuracy) > 60  # two classes


def test_new_network_is_pretrained_and_evaluated(followed):
    root, output = followed
    assert (root / "runs/digits/blend/seed0/mlp-x0.25/seed0/model.pt").exists()
    (accuracy,) = re.findall(r"blend mlp -> digits .*: ([\d.]+) %", output["A new network"])
    assert float(accuracy) > 20  # ten classes


def test_new_encoder_gives_a_target_with_a_warning(followed):
    root, output = followed
    assert (root / "runs/digits/untrained/seed0/target.pt").exists()
    assert "may not help" in output["A new encoder"]


def test_page_names_every_changed_file(followed):
    root, _ = followed
    named = set().union(*(FILE_BLOCK.findall(text) for text in SECTIONS.values()))
    named = {name for name, _, _ in named} | {"docs/methods.md"}  # changed by a command
    code = [*ROOT.rglob("*.py"), *ROOT.glob("docs/*.md")]
    code = [path.relative_to(ROOT) for path in code if ".venv" not in path.parts]
    changed = {
        str(path)
        for path in code
        if (root / path).exists() and (root / path).read_text() != (ROOT / path).read_text()
    }
    new = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if not (ROOT / path.relative_to(root)).exists()
    }
    assert changed | new == named
