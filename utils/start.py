"""Where fine-tuning and distillation of knowledge start: a model.pt, or a network that nobody has trained."""

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
from utils.presets import differences, image_size, preset
from utils.run import versions


@dataclass
class Start:
    """The network in `saved` (`models.saved.content`), the folder that its results go to, and the run's seed."""

    saved: dict
    folder: Path
    digest: str
    seed: int

    def result(self, scale, device, started, **values):
        """A line of results.jsonl: what the network is, `values`, and what it took since the time `started`. To the
        scale of the stages before comes `scale`, that of this one."""
        meta = {name: self.saved["meta"].get(name) for name in ("source", "method", "distilled_seed", "num_images")}
        network = {name: self.saved[name] for name in ("arch", "width", "image_size")}
        return meta | network | {"seed": self.seed} | values | {"scale": self.scale | scale} | cost(device, started)

    @property
    def scale(self):
        """In what the stages that made the network differ from the paper's (`presets.differences`)."""
        return self.saved["meta"].get("scale", {})


def cost(device, started):
    """By what means a result came out: device, versions, seconds since `started` (of time.monotonic), and the peak
    memory of this process."""
    cuda = device.type == "cuda"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        versions=versions(),
        seconds=round(time.monotonic() - started, 1),
        peak_memory_mib=round(torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak),
    )


def add_flags(parser, argv):
    """--weights, --target, --seed; and --arch, --width, --image-size, which go with --weights none."""
    default = preset(cli.preset_name(cli.early("target", argv)), "distill")
    size = image_size(cli.preset_name(cli.early("target", argv)))
    parser.add_argument("--weights", required=True, help="model.pt of pretrain.py, or none")
    parser.add_argument("--target", required=True, help="labelled data set: a name or class folders")
    parser.add_argument("--seed", type=cli.count, help="default: that of the weights; 0 with --weights none")
    only = "only with --weights none"
    parser.add_argument("--arch", choices=[*models.ARCHITECTURES], help=f"{only} (default: {default['arch']})")
    parser.add_argument("--width", type=cli.amount, metavar="X", help=f"{only} (default: {default['width']})")
    parser.add_argument("--image-size", type=cli.pixels, help=f"{only} (default: {size})")
    parser.set_defaults(fresh=dict(arch=default["arch"], width=default["width"], image_size=size))


def load(args):
    """The `Start` that the flags name. Raises UserError for a bad file, or for flags that contradict it."""
    given = {name: getattr(args, name) for name in args.fresh if getattr(args, name) is not None}
    if args.weights == "none":
        network = args.fresh | given
        seed = args.seed or 0
        torch.manual_seed(seed)
        name = f"{models.label(network['arch'], network['width'])}_{network['image_size']}px"
        content = saved.fresh(**network)
        content["meta"]["scale"] = differences(cli.preset_name(args.target), "distill", {"width": network["width"]})
        return Start(content, args.run_root / "scratch" / name, "none", seed)
    content = saved.load_model(args.weights)
    for name, value in given.items():
        if value != content[name]:
            raise UserError(f"--{name.replace('_', '-')} {value}: the weights are of {content[name]}")
    path = Path(args.weights)
    seed = content["meta"].get("seed", 0) if args.seed is None else args.seed
    return Start(content, path.parent, files.digest(path), seed)


def trained(start, run, network, num_outputs, train, **meta):
    """`network` after a call of `train`, kept as the run's model.pt with the start's meta and `meta`; or the network
    that is there, when the run ended between that file and its line in results.jsonl."""
    if run.finished:
        return saved.rebuild(saved.load_model(run.artefact)).to(network.fc.weight.device)
    train()
    content = (start.saved[name] for name in ("arch", "width", "image_size"))
    run.finish("model", saved.content(network, *content, num_outputs, start.saved["meta"] | meta))
    return network


def settings(args, start, **derived):
    """`cli.settings` with the network's facts in place of the flags that may name it."""
    network = {name: start.saved[name] for name in ("arch", "width", "image_size")}
    flags = {name: value for name, value in cli.settings(args).items() if name not in ("fresh", "target")}
    return flags | network | dict(weights=start.digest, seed=start.seed) | derived
