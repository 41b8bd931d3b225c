"""Shared parts of the command lines: flags, presets as defaults, and one-line errors."""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

from utils import distributed
from utils.device import add_device_flags
from utils.errors import UserError
from utils.presets import PRESETS, SMALLEST_IMAGE_SIZE, image_size, preset_name
from utils.run import UNTRACKED_SETTINGS, Stopped, program_name

GROUPS = ("data", "method", "run", "device")  # groups of flags, in the order of --help


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors and `groups` (name -> group) to add flags to."""

    def __init__(self, docstring, prog=None):
        super().__init__(
            prog=prog or program_name(),
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.groups = {name: self.add_argument_group(name) for name in GROUPS}

    def exit(self, status=0, message=None):
        # Under torchrun, all processes have the same command line and the same error.
        super().exit(status, message if distributed.is_main_process() else None)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _number(kind, least, most=float("inf")):
    """Return an argparse type: a finite number of type `kind` in [least, most]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        if not least <= value <= most or value == float("inf"):
            limits = f"at least {least}" if most == float("inf") else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}: {text}")
        return value

    return parse


positive_int, non_negative_int = _number(int, 1), _number(int, 0)
pixels = _number(int, SMALLEST_IMAGE_SIZE)
non_negative_float, fraction = _number(float, 0), _number(float, 0, 1)
seed = _number(int, 0, 2**32 - 1)  # the range of NumPy and scikit-learn


def folder_parser(docstring, prog=None):
    """Return a `Parser` with --data-root and --run-root."""
    parser = Parser(docstring, prog)
    add_data_root(parser)
    parser.groups["run"].add_argument(
        "--run-root", type=Path, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    return parser


def add_data_root(parser):
    """Add --data-root. The default is the environment variable DATA_ROOT or datasets."""
    root = os.environ.get("DATA_ROOT", "datasets")
    parser.groups["data"].add_argument(
        "--data-root",
        type=Path,
        default=Path(root),
        help="folder of the data sets (default: %(default)s)",
    )


def stage_parser(docstring, prog=None):
    """Return a `Parser` with the flags that all stages share."""
    parser = folder_parser(docstring, prog)
    add_device_flags(parser)
    parser.groups["run"].add_argument(
        "--log-every",
        type=positive_int,
        default=50,
        metavar="STEPS",
        help="number of steps between lines of log.jsonl (default: 50)",
    )
    parser.groups["run"].add_argument(
        "--tensorboard",
        action="store_true",
        help="also log for TensorBoard, to <run folder>/tensorboard (pip install tensorboard)",
    )
    return parser


def source_parser(docstring, argv, prog=None):
    """Add --source, --preset, --image-size and --seed to `stage_parser`.

    Returns:
        The parser, and the name of the preset that `argv` selects.
    """
    parser = stage_parser(docstring, prog)
    source = peek_flag("source", argv, "digits")
    name = preset_name(peek_flag("preset", argv, source))
    size = image_size(name)
    data = parser.groups["data"]
    data.add_argument(
        "--source", default="digits", help="data set or folder of images (default: digits)"
    )
    data.add_argument(
        "--image-size",
        type=pixels,
        default=size,
        help=f"height and width in pixels (default: {size})",
    )
    parser.groups["method"].add_argument(
        "--preset",
        choices=[*PRESETS],
        default=name,
        help="name of the preset (default: that of the source)",
    )
    add_seed(parser)
    return parser, name


def add_seed(parser):
    """Add --seed."""
    parser.groups["run"].add_argument(
        "--seed", type=seed, default=0, help="random seed (default: 0)"
    )


def add_settings(parser, defaults, help, choices=None):
    """Add a flag for each setting.

    The type of a flag is that of its default. Numbers must not be negative. Integers must be
    positive, unless the default is 0, the text states the meaning of 0 ("0: all") or the name
    starts with warmup. A boolean setting x becomes --x and --no-x.

    Args:
        parser: `Parser`; the flags join its group "method".
        defaults: dict, name -> default value.
        help: dict, name -> text.
        choices: dict, name -> allowed values.
    """
    group = parser.groups["method"]
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        text = f"{help[name]} (default: {value})".replace("%", "%%")
        if isinstance(value, bool):
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=value, help=text
            )
        elif choices and name in choices:
            group.add_argument(flag, choices=[*choices[name]], default=value, help=text)
        else:
            zero = value == 0 or "; 0: " in help[name] or name.startswith("warmup")
            integer = non_negative_int if zero else positive_int
            kind = {int: integer, float: non_negative_float}.get(type(value), str)
            group.add_argument(flag, type=kind, default=value, metavar="X", help=text)


def add_chunk_flag(parser):
    """Add --chunk, for methods that differentiate through the features of all distilled images."""
    parser.groups["device"].add_argument(
        "--chunk",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="compute the gradient for N distilled images at a time, which is slower and takes "
        "less memory (default: 0, all images)",
    )


def add_compile_flag(parser):
    """Add --compile, for methods with a pool. `device.should_compile` interprets it."""
    parser.groups["device"].add_argument(
        "--compile",
        choices=["auto", "on", "off"],
        default="auto",
        help="compile the networks of the pool, which takes more than half a minute and makes a "
        "step faster; losses are equal up to rounding (default: on with CUDA from 10,000 outer "
        "steps on, if a compiler works; else off)",
    )


def peek_flag(name, argv, default=None):
    """Return the value of the flag --`name` in `argv`, or `default`, before `argv` is parsed.

    The defaults of other flags depend on it.
    """
    value, flag = default, f"--{name}"
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag and following is not None:
            value = following
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
    return value


def refuse_flags(parser, argv, names, reason):
    """End with an error if `argv` has a flag of the settings `names`, for example --x or --no-x.

    Flags without effect would otherwise be ignored. `reason` follows the flag in the message.
    """
    for word in argv:
        name = word.partition("=")[0].removeprefix("--")
        name = name if word.startswith("--") else ""
        if {name.replace("-", "_"), name.removeprefix("no-").replace("-", "_")} & {*names}:
            parser.error(f"--{name} {reason}")


def run_settings(args, **derived):
    """Return the settings that determine a run's result, for its config.json.

    These are `args` without `UNTRACKED_SETTINGS`, updated with `derived`.
    """
    chosen = {name: value for name, value in vars(args).items() if name not in UNTRACKED_SETTINGS}
    return chosen | derived


def run(main, argv=None):
    """Call `main(argv)` and turn exceptions into one line on standard error and an exit code.

    The exit code is 2 for an error, 130 for an interruption, and 141 without a message if the
    reader of standard output has ended, such as `head`.
    """
    code = 2
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
            return
        except BrokenPipeError:
            # Python flushes standard output again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except UserError as error:
            message = f"error: {error}"
        except (torch.OutOfMemoryError, MemoryError):
            message = (
                "error: out of memory; lower the batch size, or add --precision bf16 or, if --help "
                "lists it, --chunk 100"
            )
        except OSError as error:
            message = f"error: {error.filename or 'system'}: {error.strerror or error}"
        except (Stopped, KeyboardInterrupt) as stop:
            message, code = str(stop) or "interrupted; rerun the same command to resume", 130
        # torchrun sends SIGTERM when another process has ended.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if distributed.is_main_process() or code == 2:
            which = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
            print(f"{program_name()}{which}: {message}", file=sys.stderr, flush=True)
        sys.exit(code)
    finally:
        distributed.shutdown()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number, frame):
    """Treat SIGTERM as SIGINT."""
    raise KeyboardInterrupt
