"""The training steps of all stages and methods, three of each, on a device without values.

`STEPS` holds functions of (source, device, precision, guard): `source` is the digits at 32 px, and
`guard()` is a context around each loop of steps. They raise `Finished` after the last step.
"""

import contextlib
import importlib
from functools import partial
from types import SimpleNamespace

import torch

import finetune
import kd
import models
import pretrain
import pretrain_target
from data.distilled import Distilled
from distillers import matching, method, registry
from distillers.experts import Learner
from distillers.labelled import build_untrained
from distillers.unroll import flatten_parameters
from utils.presets import preset
from utils.sampling import Randomness


class Finished(Exception):
    """Raised at the end of a loop, because what follows may read values."""


class Run:
    """Stands in for `Run`: three steps, no files."""

    limits, folder, done = {}, None, {}

    def __init__(self, guard=contextlib.nullcontext):
        self.guard = guard

    def resume(self, *args, **kwargs):
        pass

    def steps(self, phase, total):
        with self.guard():
            yield from range(min(total, 3))
        if phase != "initialise pool":
            raise Finished

    def log(self, step, **scalars):
        assert any(torch.is_tensor(each) for each in scalars.values())


class Target:
    """Stands in for a `Target` with stored features."""

    digest, deviations, feature_dim, name, path = "0", {}, 8, "", "target.pt"

    def __init__(self, n, device):
        self.device, self.table = device, torch.randn(n, self.feature_dim)

    def features_of(self, source):
        return self.table

    def features_at(self, source, index):
        return self.table[index].to(self.device)

    def features(self, x):
        return x.flatten(1)[:, : self.feature_dim]

    def require_network(self):
        pass


def network(outputs, device, arch="convnet3"):
    return models.build(arch, 32, outputs, 0.125).to(device)


def settings(stage, precision, **changed):
    return SimpleNamespace(**(preset("digits", stage) | dict(precision=precision) | changed))


def pre_train(source, device, precision, guard, kind="feature", augment=False):
    targets = torch.randn(20, 8) if kind == "feature" else torch.arange(20) % 8
    facts = dict(size=32, outputs=8, kind=kind, folder=None, identity={}, meta={})
    images = torch.randn(20, 3, 32, 32).to(device)
    data = pretrain.TrainingData(
        images, targets.to(device), lambda x: x, **facts, deviations={}, num_images=20
    )
    recipe = preset("digits", "pretrain", kind, "convnet3") | dict(augment=augment, steps=3)
    args, run = SimpleNamespace(**recipe, precision=precision), Run(guard)
    pretrain.pretrain(network(8, device), data, args, run, Randomness(0, device), device)


def fine_tune(source, device, precision, guard):
    args, start = settings("finetune", precision), network(10, device)
    finetune.finetune(start, source, args, Run(guard), Randomness(0, device), device)


def barlow_twins(source, device, precision, guard):
    args = settings("target", precision, seed=0)
    pretrain_target.train(network(0, device, "resnet18_target"), source, args, Run(guard), device)


def distil_knowledge(source, device, precision, guard):
    images = torch.randn(20, 3, 32, 32), torch.randn(20, 8)
    distilled = Distilled(*images, "feature", torch.zeros(3), torch.ones(3), {})
    pair = network(10, device), network(10, device)
    args, randomness = settings("kd", precision), Randomness(0, device)
    kd.train_student(*pair, distilled, args, Run(guard), randomness, device)


def parse(name, precision, *extra):
    words = ["--source", "digits", "--num-images", "20", "--precision", precision, *extra]
    made_by = importlib.import_module(registry.METHODS[name].module).METHOD
    return made_by, method.parse_args(made_by, words)


def distil(source, device, precision, guard, name, *extra):
    made_by, args = parse(name, precision, *extra)
    chosen, target = made_by.choose(source, 20, 0), Target(len(source), device)
    made_by.distill(source, chosen, target, args, Run(guard), device)


def match(source, device, precision, guard, name):
    """The steps of mtt or mkdt on the distilled set; `train_expert` has those of the experts."""
    _, args = parse(name, precision)
    outputs, kind = dict(mtt=(10, "class"), mkdt=(8, "feature"))[name]
    experts = SimpleNamespace(
        network=build_untrained(args, source, outputs, device),
        learner=SimpleNamespace(source=source, augment=name == "mtt"),
    )
    epochs, size = args.max_start + args.match_epochs, flatten_parameters(experts.network).numel()
    experts.trajectories = [torch.randn(epochs, size)]
    y = torch.zeros(20, dtype=torch.long) if kind == "class" else torch.randn(20, outputs)
    x = torch.randn(20, 3, 32, 32).to(device)
    matching.learn(experts, x, y.to(device), kind, args, Run(guard), device)


def train_expert(source, device, precision, guard):
    """The step of an expert of mtt; those of mkdt are those of high_loss."""
    _, args = parse("mtt", precision)
    learner = Learner(source, source.labels, 10, args, device, augment=True)
    with guard():
        learner.begin(1)
        learner.step()
    raise Finished


STEPS = {
    "pre-training, features": pre_train,
    "pre-training, classes": partial(pre_train, kind="class"),
    "pre-training, augmented": partial(pre_train, augment=True),
    "fine-tuning": fine_tune,
    "Barlow Twins": barlow_twins,
    "knowledge distillation": distil_knowledge,
    "krr_st": partial(distil, name="krr_st"),
    "krr_st, augmented": lambda *where: distil(*where, "krr_st", "--augment-outer"),
    "dm": partial(distil, name="dm"),
    "dsa": partial(distil, name="dsa"),
    "frepo": partial(distil, name="frepo"),
    "frepo, part of the set": lambda *where: distil(*where, "frepo", "--pool-batch", "10"),
    "high_loss": partial(distil, name="high_loss"),
    "kip": partial(distil, name="kip"),
    "ssl_bilevel": partial(distil, name="ssl_bilevel"),
    "mtt": partial(match, name="mtt"),
    "mkdt": partial(match, name="mkdt"),
    "expert": train_expert,
}
