"""Time outer steps of distill.py in several processes: `torchrun --nproc-per-node 2 -m
benchmarks.speed`.

Every process takes whole outer steps of the same size. On an ideal machine, R processes take as
long as one. Each round measures three times: one process while the others wait, all processes
without communication, and all processes as in distill.py, which exchanges the gradients once per
step. The ratio of the first to the second time is the cost of shared hardware (memory, caches,
clock). The ratio of the second to the third is the cost of the exchange. On a GPU, each time is the
mean of 20 steps after as many steps of warm-up.
"""

import statistics
import time

import torch

import models
from benchmarks.step import SETTINGS, make_step
from benchmarks.timing import GPU_STEPS, format_median, machine_name, peak_memory, synchronize
from utils import distributed, progress

LINKS = {"25 GB/s": 25e9, "900 GB/s": 900e9}  # a fast network; a GPU link
NUMBERS = (2, 4, 8, 16)


def time_steps(function, device):
    """Return the seconds per call. All ranks make the same number of calls."""
    calls = GPU_STEPS if device.type == "cuda" else 1
    for timed in (False, True):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls if timed or calls > 1 else 0):
            function()
        synchronize(device)
    return (time.perf_counter() - started) / calls


def slowest(took):
    """Return the largest time of all ranks in seconds."""
    return distributed.all_reduce_max(round(1e6 * took)) / 1e6


def measure(args, device):
    """Return the measurements as a dict of plain values for `format_result`."""
    step = make_step(False, args, device)

    def single():
        step(exchange=False)

    single()
    rounds = []
    for _ in progress.progress_bar(range(args.pairs), desc="rounds"):
        distributed.all_reduce_max(0)  # synchronises all processes
        alone = time_steps(single, device) if distributed.is_main_process() else 0.0
        took = dict(alone=slowest(alone))
        took["beside"] = slowest(time_steps(single, device))
        took["together"] = slowest(time_steps(step, device))
        shared = step.exchanged(torch.zeros((), device=device))
        took["exchange"] = slowest(
            time_steps(lambda shared=shared: distributed.all_reduce_mean(shared), device)
        )
        rounds.append(took)
    return dict(
        preset=args.preset,
        **{name: getattr(args, name) for name in SETTINGS},
        machine=machine_name(device),
        ranks=distributed.world_size(),
        torch=str(torch.__version__),
        memory_gib=peak_memory(device),
        rounds=rounds,
        bytes={"images": step.x_syn.nbytes, "targets": step.y_syn.nbytes},
    )


def format_result(result):
    """Format the result of `measure` as Markdown."""
    rounds, count = result["rounds"], result["ranks"]
    times = {name: format_median(each[name] for each in rounds) for name in rounds[0]}
    images, targets = (result["bytes"][name] for name in ("images", "targets"))
    network = models.label(result["arch"], result["width"])
    step = statistics.median(each["together"] for each in rounds)
    efficiency = format_median(each["alone"] / each["together"] for each in rounds)
    rows = []
    for number in NUMBERS:
        sent = 2 * (number - 1) / number * (images + targets + 4)
        cells = [
            f"{1e3 * sent / rate:.3g} ms ({sent / rate / step:.2g})" for rate in LINKS.values()
        ]
        rows.append(f"| {number} | {sent / 1e6:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            f"Preset {result['preset']} (m = {result['num_images']:,}, b = "
            f"{result['outer_batch']:,} per process, "
            f"{result['image_size']} px, {network}, {result['precision']}), {count} processes, "
            "each on "
            f"{result['machine']}, torch {result['torch']}. Median, minimum and maximum of "
            f"{len(rounds)} rounds.",
            "",
            "| outer step | s |",
            "|---|---:|",
            f"| one process, the others wait | {times['alone']} |",
            f"| {count} processes, without exchange | {times['beside']} |",
            f"| {count} processes, with exchange | {times['together']} |",
            f"| exchange alone | {times['exchange']} |",
            "",
            f"Efficiency: **{efficiency}**; "
            "without the exchange "
            f"{format_median(each['alone'] / each['beside'] for each in rounds)}.",
            "",
            f"A step exchanges {images / 1e6:.1f} MB for the images and {targets / 1e6:.1f} MB for "
            "the targets. This depends on neither the batch, the network nor the number of "
            "processes. In a ring of R processes, each process sends 2 (R - 1) / R times this "
            "amount. The table has "
            f"the calculated time, and in brackets its ratio to the {step:.3g} s above:",
            "",
            "| R | MB per step | " + " | ".join(f"at {name}" for name in LINKS) + " |",
            "|---:|---:|" + "---:|" * len(LINKS),
            *rows,
        ]
    )
