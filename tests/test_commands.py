"""The command lines in README.md and docs/ are accepted by the parsers of their programs.

A command is parsed but not run: the test stops after the parser of the program.
"""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.run import get_args_parser

from tests.conftest import ROOT
from tests.test_extending import COMMANDS

PAGES = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROGRAM = re.compile(r"<<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
STARTS = ("python ", "torchrun ", "bash ", "pip ", "cd ", "for ", "srun ", "sbatch ")
NOT_PARSED = {  # start of the command -> reason
    "python -m venv ": "belongs to Python",
    "pip install ": "belongs to pip",
    "python - <<": "a program in the page; test_program_in_a_page_compiles compiles it",
    "cd sets/NAME": "belongs to the shell",
    "python load.py": "a script in an exported folder; tests/test_export.py runs it",
}
RUN = {"extending.md": "tests/test_extending.py runs all commands of this page"}


class Parsed(BaseException):
    """Raised in place of running a command, after its parser has accepted the flags."""


def read_blocks(text):
    """Return the code blocks of a Markdown text: indented ones, and fenced ones in bash."""
    blocks, block, fence = [], [], None
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            if fence == "bash":
                blocks.append(block)
            block, fence = [], line[3:] if fence is None else None
        elif fence is not None:
            block.append(line)
        elif line.startswith("    "):
            block.append(line[4:])
        elif block:
            blocks.append(block)
            block = []
    return ["\n".join(block) for block in blocks]


def list_commands():
    """Return (page, command) for each command line of all pages, with continued lines joined."""
    found = []
    for page, text in PAGES.items():
        for block in read_blocks(text):
            lines = PROGRAM.sub("<<", block).replace("\\\n", " ").splitlines()
            found += [(page, line) for line in lines if line.startswith(STARTS)]
    return found


def split_command(line):
    """Return the words after `python` of each command of this project in a line.

    torchrun, srun, sbatch and loops of the shell are removed, and scripts are replaced by the
    commands that they call with their flags.
    """
    words = shlex.split(line, comments=True)
    if "torchrun" in words:
        args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        program = ["-m"] if args.module else []
        return [[*program, args.training_script, *args.training_script_args]]
    if words[0] == "python":
        return [words[1:]]
    found = re.findall(r"bash (\S+\.sh)([^&;\"#]*)", line)
    return [words for script, flags in found for words in split_script(script, shlex.split(flags))]


def split_script(script, flags):
    """Return the commands that a script calls with its flags.

    benchmarks/gpu.sh has a part of its `case` for each first word.
    """
    text = (ROOT / script).read_text()
    if flags and (part := re.search(rf"^  {flags[0]}\)(.*?);;", text, re.MULTILINE | re.DOTALL)):
        text, flags = part[1], flags[1:]
    call = r'^\s*(?:exec )?"\$PYTHON" (-m (?:experiments|benchmarks).*) "\$@"'
    calls = re.findall(call, text, re.MULTILINE)
    assert calls or not flags, f"{script} has no parser, so its flags cannot be checked"
    return [[*call.split(), *flags] for call in calls] or [[]]


def parse(words, monkeypatch):
    """Start a program with the parser's result replaced by `Parsed`."""
    parse_args, parse_known_args = (
        getattr(argparse.ArgumentParser, name) for name in ("parse_args", "parse_known_args")
    )

    def stop(self, *args, **kwargs):
        with monkeypatch.context() as original:
            original.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
            parse_args(self, *args, **kwargs)
        raise Parsed

    def stop_known(self, *args, **kwargs):
        parse_known_args(self, *args, **kwargs)
        raise Parsed

    def load(name):  # pretrain.py reads its defaults from the set
        return SimpleNamespace(meta={"preset": "other"}, target_kind="feature")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_known)
    monkeypatch.setattr("data.distilled.load_distilled", load)
    monkeypatch.setattr("data.distilled.distilled_file", Path)  # it downloads sets of the Hub
    monkeypatch.chdir(ROOT)
    module = words[0] == "-m"
    program, *flags = words[1:] if module else words
    monkeypatch.setattr(sys, "argv", [program, *flags])
    run = runpy.run_module if module else runpy.run_path
    with pytest.raises(Parsed):
        run(program, run_name="__main__")


def find_reason(page, line):
    """Return why a command is not parsed, or None."""
    reasons = [reason for start, reason in NOT_PARSED.items() if line.startswith(start)]
    return RUN.get(page) or next(iter(reasons), None)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("page", "line"), [each for each in list_commands() if not find_reason(*each)]
)
def test_command_is_accepted_by_its_parser(page, line, monkeypatch):
    commands = split_command(line)
    assert commands
    for words in filter(None, commands):
        parse(words, monkeypatch)


def test_unknown_flag_is_detected(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(["pretrain.py", "--distilled", "x.pt", "--no-such-flag"], monkeypatch)
    assert "--no-such-flag" in capsys.readouterr().err


def test_commands_are_found_and_exceptions_are_needed():
    commands = list_commands()
    assert len(commands) > 60 and {page for page, _ in commands} > {"README.md", "speed.md"}
    for start in NOT_PARSED:
        assert any(line.startswith(start) for _, line in commands), start
    blocks = COMMANDS.findall(PAGES["extending.md"])
    run = "".join(blocks).replace("\\\n", " ").splitlines()
    assert [line for page, line in commands if page in RUN] == run


def test_scripts_in_the_text_exist():
    text = "".join(PAGES.values())
    scripts = {*re.findall(r"(?:scripts|benchmarks)/\w+\.sh", text)}
    scripts |= {f"scripts/{name}" for name in re.findall(r"`(run_\w+\.sh)", text)}
    assert len(scripts) > 10 and all((ROOT / name).is_file() for name in scripts)


def test_program_in_a_page_compiles():
    programs = [each for block in read_blocks(PAGES["data.md"]) for each in PROGRAM.findall(block)]
    assert len(programs) == 1
    compile(programs[0], "docs/data.md", "exec")
