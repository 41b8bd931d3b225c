"""Device and precision of a run, and the settings of PyTorch that depend on them."""

import contextlib
import functools
import os
from pathlib import Path

import torch

from utils import allocator, distributed
from utils.errors import UserError

# From this number of outer steps on, networks are compiled on a GPU. On an H200, compiling takes
# more than half a minute, and as many steps of a small set take a minute (docs/speed.md).
COMPILED_STEPS = 10_000
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # exists if the driver is loaded


def add_device_flag(parser):
    """Add --device, for `resolve_device`."""
    parser.groups["device"].add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="device to run on (default: a GPU if available)",
    )


def add_device_flags(parser):
    """Add --device, --precision and --deterministic. `resolve_precision` completes them."""
    add_device_flag(parser)
    group = parser.groups["device"]
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="precision of the networks; tf32 is float32 with TF32 convolutions, on CUDA only "
        "(default: bf16 for KRR-ST, pre-training on its sets and fine-tuning after it, on a GPU "
        "or CPU that computes in bf16; otherwise fp32)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="use deterministic GPU kernels, which are slower",
    )


def resolve_precision(args, bf16_is_harmless=False):
    """Replace `--precision auto` in the parsed `args` by bf16 or fp32.

    Args:
        args: parsed flags.
        bf16_is_harmless: whether bf16 was measured not to change the results of this stage
            (`registry.bf16_is_harmless`). If so, it is chosen on a device that computes in it.

    Returns:
        `args`.
    """
    if args.precision == "auto":
        fast = bf16_is_harmless and computes_in_bf16(args.device)
        args.precision = "bf16" if fast else "fp32"
    return args


def computes_in_bf16(name):
    """Return whether the device of --device `name` has instructions for bf16 products."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "mps" or (name == "auto" and torch.backends.mps.is_available()):
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of x86
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def should_compile(args, device):
    """Return whether a method with a pool compiles its networks on `device`.

    Args:
        args: parsed flags, with `compile` and `outer_steps`.
        device: torch device.

    Raises:
        UserError: with --compile on, if torch.compile does not work on this machine.
    """
    pays = device.type == "cuda" and args.outer_steps >= COMPILED_STEPS
    if args.compile == "off" or (args.compile == "auto" and not pays):
        return False
    fault = find_compiler_fault(device)
    if fault and args.compile == "on":
        raise UserError(f"--compile on: torch.compile does not work here ({fault}); use off")
    return fault is None


@functools.cache
def find_compiler_fault(device):
    """Return why torch.compile does not work on `device`, in one line, or None if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as error:  # each compiler has its own
        return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return None


@contextlib.contextmanager
def restore_backends():
    """Context that restores the settings of PyTorch that `select_device` changes.

    It is also a decorator, of the main function of each stage.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def resolve_device(name):
    """Return the type of the device of --device `name`: cpu, cuda or mps.

    Raises:
        UserError: if the device is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        if not available["cuda"] and NVIDIA_DRIVER.exists() and not hides_gpus():
            raise UserError(
                f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it "
                f"({explain_missing_cuda()}); install a build of torch for its driver, or use "
                "--device cpu"
            )
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        raise UserError(
            f"--device {name}: torch {torch.__version__} finds no such device on this machine"
        )
    return name


def select_device(args, multi_process=False):
    """Return the torch device of --device; under torchrun, the device of this process.

    Also applies --precision and --deterministic until the end of `restore_backends`, and prints
    device and precision. TF32 is enabled for convolutions only, because ridge regression needs full
    float32. Without --deterministic, cuDNN selects the fastest of its algorithms by measuring. On a
    CPU, the process keeps freed memory.

    Args:
        args: parsed flags.
        multi_process: whether the program supports several processes.

    Raises:
        UserError: if the device is not available or does not support the precision, or under
            torchrun with several processes if the program does not support them.
    """
    name = resolve_device(args.device)
    if args.precision == "tf32" and name != "cuda":
        raise UserError(f"--precision tf32: not supported on {name}; use fp32")
    if distributed.world_size() > 1 and not multi_process:
        raise UserError("runs in one process, not under torchrun")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Warns about operations without a deterministic kernel.
        torch.use_deterministic_algorithms(True, warn_only=True)
    allocator.keep_freed_memory(name == "cpu")
    device = distributed.initialise(name)
    if distributed.is_main_process():
        print(f"device: {device_name(device)}, precision: {args.precision}")
    return device


def device_name(device):
    """Return the name of a torch device in results: that of the GPU, or cpu or mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def hides_gpus():
    """Return whether the user hides all GPUs from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def explain_missing_cuda():
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
