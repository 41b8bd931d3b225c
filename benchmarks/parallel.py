"""What several processes do at a time on one run of distill.py: `torchrun --nproc-per-node 2 -m
benchmarks.speed`.

Each process takes whole outer steps of the same size, so an ideal machine takes as long for R of
them as for one. Three times are measured in turn: of the first process while the others wait, of
all at once without telling each other anything, and of all at once as distill.py does it, with one
exchange of the gradients a step. The first ratio shows what the machine's shared parts cost
(memory, caches, clock), the second what the exchange does.
"""

import statistics
import tempfile
from pathlib import Path

import torch

import models
from benchmarks.step import (
    Step,
    format_median,
    machine_name,
    make_inputs,
    num_source_images,
    peak_memory,
    time_call,
)
from utils import distributed, progress

LINKS = {"25 GB/s": 25e9, "900 GB/s": 900e9}  # a fast network; a link between GPUs
NUMBERS = (2, 4, 8, 16)


def slowest(took):
    """The largest of all ranks' seconds."""
    return distributed.all_reduce_max(round(1e6 * took)) / 1e6


def measure(args, device):
    """The result as a dict of plain values, which `markdown` prints."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(
            False, *make_inputs(args, num_source_images(args), device, Path(folder)), args, device
        )

        def single():
            step(exchange=False)

        single()
        rounds = []
        for _ in progress.bar(range(args.pairs), desc="rounds"):
            distributed.all_reduce_max(0)  # waits for all
            alone = time_call(single, device)[0] if distributed.is_main_process() else 0.0
            took = dict(alone=slowest(alone))
            took["beside"] = slowest(time_call(single, device)[0])
            took["together"] = slowest(time_call(step, device)[0])
            shared = step.exchanged(torch.zeros((), device=device))
            took["exchange"] = slowest(
                time_call(lambda shared=shared: distributed.all_reduce_mean(shared), device)[0]
            )
            rounds.append(took)
        names = ("arch", "width", "image_size", "num_images", "outer_batch", "precision", "chunk")
        return dict(
            preset=args.preset,
            **{name: getattr(args, name) for name in names},
            machine=machine_name(device),
            ranks=distributed.world_size(),
            torch=str(torch.__version__),
            memory_gib=peak_memory(device),
            rounds=rounds,
            bytes={"images": step.x_syn.nbytes, "targets": step.y_syn.nbytes},
        )


def markdown(result):
    """A `measure` as tables and the lines around them."""
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
            f"{result['outer_batch']:,} a process, "
            f"{result['image_size']} px, {network}, {result['precision']}), {count} processes, "
            "each on "
            f"{result['machine']}, torch {result['torch']}; {len(rounds)} rounds, median, smallest "
            "and largest.",
            "",
            "| an outer step | s |",
            "|---|---:|",
            f"| of one process, the others waiting | {times['alone']} |",
            f"| of {count} at a time, each for itself | {times['beside']} |",
            f"| of {count} at a time, with their exchange | {times['together']} |",
            f"| the exchange alone | {times['exchange']} |",
            "",
            f"Efficiency: **{efficiency}**; "
            "without the exchange "
            f"{format_median(each['alone'] / each['beside'] for each in rounds)}.",
            "",
            f"A step exchanges {images / 1e6:.1f} MB for the images and {targets / 1e6:.1f} MB for "
            "the targets, whatever "
            "the batch, the network and the number of processes. In a ring each of R sends 2 (R - "
            "1) / R of that; worked "
            f"out, as time and as a share of the {step:.3g} s above:",
            "",
            "| R | MB a step | " + " | ".join(f"at {name}" for name in LINKS) + " |",
            "|---:|---:|" + "---:|" * len(LINKS),
            *rows,
        ]
    )
