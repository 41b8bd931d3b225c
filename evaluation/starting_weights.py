"""Initial weights of fine-tuning and knowledge distillation: a model.pt or an untrained network."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import models
from models import saved
from utils import cli, files
from utils.device import device_name
from utils.errors import UserError
from utils.presets import deviations, image_size, preset, preset_name
from utils.run import package_versions


@dataclass
class StartingWeights:
    """Initial weights of a run.

    Attributes:
        saved: content of the network's file (`models.saved.make_content`).
        folder: folder of the results.
        digest: `files.digest` of the file, or "none".
        seed: seed of the run.
    """

    saved: dict
    folder: Path
    digest: str
    seed: int

    @property
    def deviations(self):
        """Deviations of earlier stages from the paper's settings (`presets.deviations`)."""
        return self.saved["meta"].get("deviations", {})

    def result_line(self, changed, device, precision, started, **values):
        """Return a line of results.jsonl.

        Args:
            changed: deviations of this stage; those of earlier stages are added.
            device: torch device.
            precision: as --precision.
            started: start time (time.monotonic).
            values: further entries of the line.
        """
        names = ("source", "method", "distilled_seed", "num_images")
        meta = {name: self.saved["meta"].get(name) for name in names}
        network = {name: self.saved[name] for name in ("arch", "width", "image_size")}
        line = meta | network | {"seed": self.seed} | values
        return (
            line
            | {"deviations": self.deviations | changed}
            | measure_cost(device, precision, started)
        )


def measure_cost(device, precision, started):
    """Return the facts about a process: device, precision, versions, time and peak memory in MiB.

    The time is that since `started` (time.monotonic).
    """
    cuda = device.type == "cuda"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(
        device=device_name(device),
        precision=precision,
        versions=package_versions(),
        seconds=round(time.monotonic() - started, 1),
        peak_memory_mib=round(torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak),
    )


def default_network(dataset):
    """Return arch, width and image_size of the untrained network for a data set."""
    name = preset_name(dataset)
    settings = preset(name, "distill")
    return dict(arch=settings["arch"], width=settings["width"], image_size=image_size(name))


def add_flags(parser, argv):
    """Add --weights, --dataset and --seed, and for --weights none --arch, --width, --image-size."""
    default = default_network(cli.peek_flag("dataset", argv))
    data, method = parser.groups["data"], parser.groups["method"]
    data.add_argument("--dataset", required=True, help="labelled data set: name or class folders")
    data.add_argument(
        "--weights", required=True, help="model.pt of pretrain.py, or none for an untrained network"
    )
    parser.groups["run"].add_argument(
        "--seed",
        type=cli.seed,
        help="random seed (default: that of the weights; 0 with --weights none)",
    )
    only = "only with --weights none"
    method.add_argument(
        "--arch",
        choices=[*models.ARCHITECTURES],
        help=f"network, {only} (default: {default['arch']})",
    )
    method.add_argument(
        "--width",
        type=cli.non_negative_float,
        metavar="X",
        help=f"factor on the network's hidden widths, {only} (default: {default['width']})",
    )
    data.add_argument(
        "--image-size",
        type=cli.pixels,
        help=f"height and width in pixels, {only} (default: {default['image_size']})",
    )


def load(args):
    """Return the `StartingWeights` that the flags select.

    Raises:
        UserError: if the file is invalid or contradicts the flags.
    """
    default = default_network(args.dataset)
    given = {name: getattr(args, name) for name in default if getattr(args, name) is not None}
    if args.weights == "none":
        network = default | given
        seed = args.seed or 0
        torch.manual_seed(seed)
        name = f"{models.label(network['arch'], network['width'])}_{network['image_size']}px"
        content = saved.build_untrained(**network)
        content["meta"]["deviations"] = deviations(
            preset_name(args.dataset), "distill", {"width": network["width"]}
        )
        return StartingWeights(content, args.run_root / "scratch" / name, "none", seed)
    content = saved.load_model(args.weights)
    for name, value in given.items():
        if value != content[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: the weights have {content[name]}")
    path = Path(args.weights)
    seed = content["meta"].get("seed", 0) if args.seed is None else args.seed
    return StartingWeights(content, path.parent, files.digest(path), seed)


def train_or_load(start, run, network, num_outputs, train, **meta):
    """Train a network and save it as the run's model.pt, or load it if the run has finished.

    Args:
        start: `StartingWeights`.
        run: `Run`.
        network: `Network` that `train()` trains in place.
        num_outputs: number of its outputs.
        train: function without arguments.
        meta: entries added to the meta of `start`.

    Returns:
        The trained `Network`.
    """
    if run.finished:
        return saved.rebuild(saved.load_model(run.artefact)).to(network.fc.weight.device)
    train()
    content = (start.saved[name] for name in ("arch", "width", "image_size"))
    meta = start.saved["meta"] | meta
    run.finish("model", saved.make_content(network, *content, num_outputs, meta))
    return network


def run_settings(args, start, **derived):
    """Return `cli.run_settings` with properties of the network in place of the flags for it."""
    network = {name: start.saved[name] for name in ("arch", "width", "image_size")}
    flags = {name: value for name, value in cli.run_settings(args).items() if name != "dataset"}
    return flags | network | dict(weights=start.digest, seed=start.seed) | derived
