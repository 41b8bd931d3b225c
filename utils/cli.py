"""What every script's command line shares: flags, presets as defaults, devices, and one-line errors."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch

from models import ARCHITECTURES, SMALLEST_SIZE
from utils import allocator, ranks
from utils.errors import UserError
from utils.presets import PRESETS, image_size
from utils.run import FREE_SETTINGS, Stopped

_savings = []  # what saves memory, among the flags that were added


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, docstring):
        super().__init__(
            description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args=None, namespace=None):
        parsed, others = super().parse_known_args(args, namespace)
        if getattr(parsed, "precision", None) == "auto":
            parsed.precision = fast_precision(parsed)
        return parsed, others

    def exit(self, status=0, message=None):
        super().exit(status, message if ranks.first() else None)  # all ranks have the same command line

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def roots_parser(docstring):
    """A parser with the flags that say where things lie."""
    shown = Parser(docstring)
    add_data_root(shown)
    shown.add_argument("--run-root", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    return shown


def parser(docstring):
    """A parser with the flags that mean the same in every script."""
    shown = roots_parser(docstring)
    add_device(shown)
    shown.add_argument(
        "--log-every", type=positive_int, default=50, metavar="STEPS", help="steps per line of log.jsonl"
    )
    shown.add_argument(
        "--tensorboard", action="store_true",
        help="also log to <run folder>/tensorboard: tensorboard --logdir <run root> (pip install tensorboard)",
    )  # fmt: skip
    return shown


def add_device(shown):
    shown.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    shown.add_argument(
        "--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
        help="of the networks' passes (default: bf16 on a GPU that computes in it, else fp32)",
    )  # fmt: skip
    shown.add_argument("--deterministic", action="store_true", help="on a GPU: the same bits in each run, more slowly")


def fast_precision(args):
    """What --precision auto means for the other flags: the fast one of the device (benchmarks/findings.md has what
    that does to results). The plain step (--reference) is in float32."""
    on_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available() and not getattr(args, "reference", False)
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def add_data_root(shown):
    root = os.environ.get("DATA_ROOT", "datasets")
    shown.add_argument("--data-root", type=Path, default=Path(root), help="data sets' folder (default: %(default)s)")


def source_parser(docstring, argv):
    """As `parser`, with --source, --preset, --seed and --image-size; returns it and the preset that argv asks for."""
    shown = parser(docstring)
    source = early("source", argv, "digits")
    name = preset_name(early("preset", argv, source))
    shown.add_argument("--source", default="digits", help="data set or folder of images (default: digits)")
    shown.add_argument("--preset", choices=[*PRESETS], default=name, help="settings (default: the source's own)")
    shown.add_argument("--seed", type=count, default=0)
    size = image_size(name)
    shown.add_argument("--image-size", type=pixels, default=size, help=f"pixels of a side (default: {size})")
    return shown, name


def preset_name(name):
    """The preset of a data set's name: its own, or "other"."""
    return name if name in PRESETS else "other"


def add_settings(shown, defaults, help):
    """A flag for each of `defaults` (name -> value), of the default's type, described in `help` (name -> text).

    A number must not be negative, and a count not 0 but for warm-ups and where that is the default; True and False
    become --x and --no-x.
    """
    for name, value in defaults.items():
        flag, text = "--" + name.replace("_", "-"), f"{help[name]} (default: {value})".replace("%", "%%")
        if "batch" in name:
            _savings.append(f"a lower {flag}")
        if isinstance(value, bool):
            shown.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=text)
        elif name == "arch":
            shown.add_argument(flag, choices=[*ARCHITECTURES], default=value, help=text)
        else:
            zero = value == 0 or name.startswith("warmup")
            kind = {int: count if zero else positive_int, float: amount}.get(type(value), str)
            shown.add_argument(flag, type=kind, default=value, metavar="X", help=text)


def _number(kind, least, most=float("inf")):
    """An argparse type: a number from `least` to `most`, not infinite."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be {least} to {most}: {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


positive_int, count, pixels = _number(int, 1), _number(int, 0), _number(int, SMALLEST_SIZE)
amount, share = _number(float, 0), _number(float, 0, 1)


def add_chunk(shown):
    """--chunk, of the methods whose gradient goes through the features of all distilled images."""
    _savings.append("--chunk 100")
    shown.add_argument(
        "--chunk", type=count, default=0, metavar="N",
        help="take the gradient of N distilled images at a time and compute their layers twice: slower, in less memory",
    )  # fmt: skip


def early(name, argv, default=None):
    """The value of one flag before the whole line is parsed: presets depend on it."""
    value, flag = default, f"--{name}"
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == flag and following is not None:
            value = following
        elif word.startswith(flag + "="):
            value = word.removeprefix(flag + "=")
    return value


def settings(args, **derived):
    """What decides a run's result, for its config.json: all of `args` but where things lie, and `derived` values."""
    return {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS} | derived


def device(args, several=False):
    """The torch device that --device asks for; of several processes, this one's. Raises UserError if it is not there,
    or where the program is for one process and `several` false.

    TF32 is set for convolutions only: the kernels need all of float32. On a CPU freed memory is kept.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(each for each in ("cuda", "mps", "cpu") if there[each]) if args.device == "auto" else args.device
    if not there[name]:
        raise UserError(f"--device {name}: this machine has none that torch {torch.__version__} can use")
    if ranks.count() > 1 and not several:
        raise UserError("runs in one process, not under torchrun")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names what has no such form
    allocator.keep_freed_memory(name == "cpu")
    return ranks.begin(name)


def autocast(device, precision):
    """A context for the networks' passes: bf16 where asked for, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def run(main, argv=None):
    """Call `main(argv)`; what the user can put right, or a stop, becomes one line and an exit code (2, 130)."""
    name, code = Path(sys.argv[0]).name, 2
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            main(sys.argv[1:] if argv is None else argv)
            return
        except UserError as error:
            message = f"error: {error}"
        except (torch.OutOfMemoryError, MemoryError):
            message = f"error: out of memory; give {' or '.join(dict.fromkeys([*_savings, '--precision bf16']))}"
        except OSError as error:
            message = f"error: {error.filename or 'system'}: {error.strerror or error}"
        except (Stopped, KeyboardInterrupt) as stop:
            message, code = str(stop) or "interrupted; the same command goes on from what is on disk", 130
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another rank has ended
        if ranks.first() or code == 2:
            which = f" (rank {ranks.rank()})" if ranks.count() > 1 else ""
            print(f"{name}{which}: {message}", file=sys.stderr, flush=True)
        sys.exit(code)
    finally:
        ranks.end()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number, frame):
    """SIGTERM does as SIGINT."""
    raise KeyboardInterrupt
