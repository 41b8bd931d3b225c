"""Device and precision of a run."""

import contextlib
import os
from pathlib import Path

import torch

from utils import allocator, distributed
from utils.errors import UserError

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # exists if the driver is loaded


def add_device_flags(parser):
    """Add --device, --precision and --deterministic. `resolve_precision` completes them."""
    group = parser.groups["device"]
    group.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="device to run on (default: a GPU if available)",
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
        help="use deterministic GPU kernels, which are slower",
    )


def resolve_precision(args):
    """Replace `--precision auto` in the parsed `args` by the precision for the device.

    The precision is bf16 on a GPU that supports it, else fp32. With --reference it is fp32.

    Returns:
        `args`.
    """
    if args.precision == "auto":
        use_gpu = args.device in ("auto", "cuda") and torch.cuda.is_available()
        fast = use_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if fast and not getattr(args, "reference", False) else "fp32"
    return args


def select_device(args, multi_process=False):
    """Return the torch device of --device; under torchrun, the device of this process.

    Also applies --precision and --deterministic. TF32 is enabled for convolutions only, because
    ridge regression needs full float32. On a CPU, the process keeps freed memory.

    Args:
        args: parsed flags.
        multi_process: whether the program supports several processes.

    Raises:
        UserError: if the device is not available, or under torchrun with several processes if the
            program does not support them.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = args.device
    if name == "auto":
        if not available["cuda"] and NVIDIA_DRIVER.exists():
            raise UserError(
                f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it "
                f"({why_no_cuda()}); install a build of torch for its driver, or use --device cpu"
            )
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
        # Warns about operations without a deterministic kernel.
        torch.use_deterministic_algorithms(True, warn_only=True)
    allocator.keep_freed_memory(name == "cpu")
    return distributed.initialise(name)


def why_no_cuda():
    """Return the first line of PyTorch's reason why CUDA is not available."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        return str(error).strip().splitlines()[0]
    return "no device found"


def autocast(device, precision):
    """Return the context for forward passes of networks: autocast to bf16, or no change."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
