"""Time, floating-point operations and memory of a call, and the limit of a device."""

import math
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from utils.device import restore_backends

SECONDS = 1.0  # least duration of the timing, and of the warm-up on a GPU
GPU_STEPS = 20  # least number of timed steps on a GPU
TRIAL_SECONDS = 0.2  # as `SECONDS`, for the products that measure the limit
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIZES = {  # of the products that measure the limit, by device type
    "cuda": dict(products=(2048, 4096, 8192), convolutions=((512, 128, 16), (512, 256, 8))),
    "cpu": dict(products=(1024, 2048, 4096), convolutions=((128, 128, 16), (256, 256, 8))),
}


class Stopwatch:
    """Times the steps of a loop: `for step in Stopwatch(device).steps(): ...`.

    The first step is not timed: it allocates memory, and compiles or chooses kernels. On a GPU,
    further steps follow for `seconds`, so that the clocks rise. Then steps are timed for at least
    `seconds`; on a GPU at least `GPU_STEPS` of them, between two CUDA events.

    Attributes:
        seconds_per_step: mean time of the timed steps.
        num_steps: number of timed steps.
    """

    def __init__(self, device, seconds=SECONDS):
        self.device, self.seconds = device, seconds
        self.seconds_per_step = self.num_steps = None

    def steps(self):
        """Yield the numbers of all steps."""
        yield 0
        yield from self._on_gpu() if self.device.type == "cuda" else self._on_host()

    def _on_host(self):
        synchronize(self.device)
        step, start, took = 1, time.perf_counter(), 0.0
        while took < self.seconds:
            yield step
            synchronize(self.device)
            step, took = step + 1, time.perf_counter() - start
        self.seconds_per_step, self.num_steps = took / (step - 1), step - 1

    def _on_gpu(self):
        synchronize(self.device)
        step, began, last = 1, time.perf_counter(), 0.0
        while last - began < self.seconds:
            before = time.perf_counter()
            yield step
            synchronize(self.device)
            step, last = step + 1, time.perf_counter()
        count = max(GPU_STEPS, math.ceil(self.seconds / (last - before)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield from range(step, step + count)
        end.record()
        end.synchronize()
        self.seconds_per_step, self.num_steps = start.elapsed_time(end) / 1000 / count, count


def synchronize(device):
    """Wait until the device has done its work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def time_call(function, device, seconds=SECONDS):
    """Return (seconds per call, number of timed calls), as a `Stopwatch` measures them."""
    watch = Stopwatch(device, seconds)
    for _ in watch.steps():
        function()
    return watch.seconds_per_step, watch.num_steps


def count_flop(function):
    """Return the floating-point operations of a call, in matrix products and convolutions."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_rates(device, precision):
    """Return the best rates in FLOP/s as {"matrix product": ..., "convolution": ...}.

    They are the best of square matrix products and of 3x3 convolutions with as many output as input
    channels, in `precision` (fp32, tf32 or bf16) and of the sizes in `SIZES`. A convolution may
    exceed the arithmetic units' rate where a library saves operations (Winograd).
    """
    sizes, dtype = SIZES["cuda" if device.type == "cuda" else "cpu"], DTYPES[precision]
    options, trials = dict(device=device, dtype=dtype), []
    for n in sizes["products"]:
        a, out = torch.randn(n, n, **options), torch.empty(n, n, **options)
        trials.append(("matrix product", lambda a=a, out=out: torch.mm(a, a, out=out), 2 * n**3))
    for batch, channels, size in sizes["convolutions"]:
        x = torch.randn(batch, channels, size, size, **options)
        w = torch.randn(channels, channels, 3, 3, **options)
        x, w = (each.contiguous(memory_format=torch.channels_last) for each in (x, w))
        operations = 2 * x.numel() * channels * 9
        trials.append(("convolution", lambda x=x, w=w: F.conv2d(x, w, padding=1), operations))
    rates = {"matrix product": 0.0, "convolution": 0.0}
    with restore_backends(), torch.no_grad():
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for name, product, operations in trials:
            took, _ = time_call(product, device, TRIAL_SECONDS)
            rates[name] = max(rates[name], operations / took)
    return rates


def find_limit(rates):
    """Return the limit of a device in FLOP/s: the higher of `peak_rates`."""
    return max(rates.values())


def peak_memory(device):
    """Return the peak memory in GiB of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine_name(device):
    """Return the name of the machine for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    )
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {name}"


def format_median(values, digits=2):
    """Return the median as text, with minimum and maximum if there is more than one value."""
    values = [*values]
    numbers = statistics.median(values), min(values), max(values)
    median, low, high = (f"{each:,.{digits}f}" for each in numbers)
    return f"{median} ({low} to {high})" if len(values) > 1 else median
