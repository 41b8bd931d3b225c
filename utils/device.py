"""The device and the precision that a run computes with."""

import contextlib
import os

import torch

from utils import allocator, distributed
from utils.errors import UserError


def add_device_flags(parser):
    """--device, --precision and --deterministic; `resolve_precision` completes what they say."""
    group = parser.groups["device"]
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to compute (default: a GPU if there is one)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="precision of the networks (default: bf16 on a GPU that supports it, else fp32)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU: use deterministic kernels, which are slower",
    )


def resolve_precision(args):
    """Replace `--precision auto` in the parsed `args` by the precision for the device.

    auto is bf16 on a GPU that supports it, else fp32; the reference step (`--reference`) is in
    fp32. Returns `args`.
    """
    if args.precision == "auto":
        use_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
        fast = use_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if fast and not getattr(args, "reference", False) else "fp32"
    return args


def select_device(args, multi_process=False):
    """The torch device that `--device` names; under torchrun, the one of this process.

    Sets TF32 for convolutions only, since the kernels need full float32. On a CPU, freed memory is
    kept by the process. Raises UserError where the device is not available, or where torchrun has
    started several processes of a program for one (`multi_process` false).
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = args.device
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds no such device on this machine"
        )
    if distributed.world_size() > 1 and not multi_process:
        raise UserError("runs in one process, not under torchrun")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(
            True, warn_only=True
        )  # warns where there is no such kernel
    allocator.keep_freed_memory(name == "cpu")
    return distributed.initialise(name)


def autocast(device, precision):
    """A context for the networks' passes: bf16 where `precision` says so, else nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
