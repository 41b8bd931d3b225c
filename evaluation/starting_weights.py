"""Where fine-tuning and knowledge distillation start: a model.pt, or an untrained network."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import models
from models import saved
from utils import cli, files
from utils.errors import UserError
from utils.presets import deviations, image_size, preset, preset_name
from utils.run import versions


@dataclass
class StartingWeights:
    """A network and what its results are stored under.

    `saved` is the content of its file (`models.saved.content`), `folder` where results go,
    `digest` that of the file or "none", `seed` the seed of the run that starts from it.
    """

    saved: dict
    folder: Path
    digest: str
    seed: int

    @property
    def deviations(self):
        """How the stages that made the network deviate from the paper (`presets.deviations`)."""
        return self.saved["meta"].get("deviations", {})

    def result_line(self, changed, device, started, **values):
        """A line of results.jsonl: the network, `values`, and the cost since the time `started`.

        `changed` holds the deviations of this stage; those of earlier stages are added.
        """
        names = ("source", "method", "distilled_seed", "num_images")
        meta = {name: self.saved["meta"].get(name) for name in names}
        network = {name: self.saved[name] for name in ("arch", "width", "image_size")}
        line = meta | network | {"seed": self.seed} | values
        return line | {"deviations": self.deviations | changed} | cost(device, started)


def cost(device, started):
    """Device, versions, seconds since `started` (of time.monotonic), and peak memory in MiB."""
    cuda = device.type == "cuda"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        versions=versions(),
        seconds=round(time.monotonic() - started, 1),
        peak_memory_mib=round(torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak),
    )


def default_network(dataset):
    """Settings of the untrained network for a data set: arch, width and image_size."""
    name = preset_name(dataset)
    settings = preset(name, "distill")
    return dict(arch=settings["arch"], width=settings["width"], image_size=image_size(name))


def add_flags(parser, argv):
    """--weights, --dataset and --seed; --arch, --width and --image-size for --weights none."""
    default = default_network(cli.peek_flag("dataset", argv))
    data, method = parser.groups["data"], parser.groups["method"]
    data.add_argument("--dataset", required=True, help="labelled data set: a name or class folders")
    data.add_argument("--weights", required=True, help="model.pt of pretrain.py, or none")
    parser.groups["run"].add_argument(
        "--seed",
        type=cli.non_negative_int,
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
        help=f"factor on its hidden widths, {only} (default: {default['width']})",
    )
    data.add_argument(
        "--image-size",
        type=cli.pixels,
        help=f"height and width in pixels, {only} (default: {default['image_size']})",
    )


def load(args):
    """The `StartingWeights` that the flags name.

    Raises UserError for a bad file, and for flags that contradict it.
    """
    default = default_network(args.dataset)
    given = {name: getattr(args, name) for name in default if getattr(args, name) is not None}
    if args.weights == "none":
        network = default | given
        seed = args.seed or 0
        torch.manual_seed(seed)
        name = f"{models.label(network['arch'], network['width'])}_{network['image_size']}px"
        content = saved.untrained(**network)
        content["meta"]["deviations"] = deviations(
            preset_name(args.dataset), "distill", {"width": network["width"]}
        )
        return StartingWeights(content, args.run_root / "scratch" / name, "none", seed)
    content = saved.load_model(args.weights)
    for name, value in given.items():
        if value != content[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value}: the weights are of {content[name]}")
    path = Path(args.weights)
    seed = content["meta"].get("seed", 0) if args.seed is None else args.seed
    return StartingWeights(content, path.parent, files.digest(path), seed)


def train_or_load(start, run, network, num_outputs, train, **meta):
    """`network` after calling `train()`, saved as the run's model.pt with the meta of `start` and
    `meta`; where the run has finished already, the network in its file."""
    if run.finished:
        return saved.rebuild(saved.load_model(run.artefact)).to(network.fc.weight.device)
    train()
    content = (start.saved[name] for name in ("arch", "width", "image_size"))
    meta = start.saved["meta"] | meta
    run.finish("model", saved.content(network, *content, num_outputs, meta))
    return network


def run_settings(args, start, **derived):
    """`cli.run_settings` with the facts about the network in place of the flags that name it."""
    network = {name: start.saved[name] for name in ("arch", "width", "image_size")}
    flags = {name: value for name, value in cli.run_settings(args).items() if name != "dataset"}
    return flags | network | dict(weights=start.digest, seed=start.seed) | derived
