"""Which part of the protocol decides whether KRR-ST is above random images?

    python -m experiments.protocols runs/small                # takes 2 hours on one CPU core
    python -m experiments.protocols runs/small --collect      # adds the results to the stored ones
    python -m experiments.protocols runs/small --successors   # sets of scripts/run_successors.sh

The results published with MKDT (Joshi et al., ICLR 2025) put KRR-ST below random images with target
features. The KRR-ST paper has no such row. The two papers evaluate differently. This experiment
evaluates the same sets with all combinations of:

- steps of pre-training: 80 (20 epochs of 4 batches, as in MKDT) or 600 (of all images)
- weight decay of pre-training: 1e-4 (MKDT) or 1e-3 (KRR-ST)
- network: `dc_convnet3` with instance norm (MKDT) or `convnet3` with batch norm (KRR-ST)
- probe: 20 iterations of L-BFGS on features that are not standardised (MKDT), or a converged
  classifier on standardised features (finetune.py)
- images of KRR-ST: normalised, or as pixels in [0, 1]; the data set is normalised in both cases

The sets of `random_features`, `high_loss` and `krr_st` in the run root are used, which
scripts/run_small.sh makes. One network is pre-trained on each distilled set, with the seed of the
set, and evaluated on CIFAR-10 with 100 labels per class.

--successors evaluates the sets of the table `successors` with two of these combinations only, which
are the protocols of the two papers (`PAPERS`). In that of MKDT, a set with a learned learning rate
is pre-trained with it. An epoch of a low-rank set has more steps than one of plain images with the
same storage, so low-rank sets are also evaluated with as many steps (`Case.equal_steps`).

The networks and the results, protocols.jsonl, are in <run root>/protocols. Rerun the command to
resume. Sets that do not exist are left out. --collect replaces the results of the same networks in
experiments/protocols.jsonl.
"""

import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import models
from data.distilled import load_distilled
from data.images import load_images
from data.subsets import few_labels
from evaluation import probes, results
from evaluation.starting_weights import measure_cost
from experiments.tables import TABLES
from models import saved
from pretrain import pretrain
from utils import cli, files
from utils.device import add_device_flags, resolve_precision, restore_backends, select_device
from utils.errors import UserError
from utils.presets import preset
from utils.run import Run, settings_digest
from utils.sampling import Randomness

NAME = "protocols.jsonl"  # not results.jsonl, because its lines fit no table of analysis.tables
STORED = Path(__file__).parent / NAME
SOURCE, DATASET, LABELS_PER_CLASS = "imagenette", "cifar10", 100
WIDTH, SIZE = 0.25, 32
SEEDS = (0, 1, 2)
SETS = ("random_features", "high_loss", "krr_st")
STEPS = {80: dict(epochs=20, batch_size=25), 600: dict(epochs=600, batch_size=100)}
WEIGHT_DECAYS = (1e-4, 1e-3)
NETWORKS = ("dc_convnet3", "convnet3")
PAPERS = {
    "MKDT": dict(arch="dc_convnet3", steps=80, weight_decay=1e-4, probe="20 iterations"),
    "KRR-ST": dict(arch="convnet3", steps=600, weight_decay=1e-3, probe="converged"),
}


def unconverged_accuracy_of(features, labels, tests, test_labels, num_classes):
    """Compute the accuracy, in percent, of a linear classifier after 20 iterations of L-BFGS.

    L-BFGS with learning rate 1 minimises the mean cross-entropy plus 1e-3 / 2 times the squared
    norm of the weights. The features are not standardised.

    Args:
        features: (n, d), with `labels` (n,) in 0..num_classes-1.
        tests: (t, d), with `test_labels` (t,).
    """
    weight = torch.zeros(features.shape[1], num_classes, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=20)

    def closure():
        fit.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + 5e-4 * weight.square().sum()
        loss.backward()
        return loss

    fit.step(closure)
    predicted = (tests @ weight + bias).argmax(1)
    return 100 * (predicted == test_labels).float().mean().item()


PROBES = {"20 iterations": unconverged_accuracy_of, "converged": probes.linear_accuracy_of}


@dataclass(frozen=True)
class Case:
    """A network to evaluate.

    Args:
        method: name of the set; scratch for a network that is not pre-trained.
        seed: seed of the set, the pre-training and the labels.
        arch: architecture.
        steps: number of steps of pre-training, a key of `STEPS`.
        weight_decay: weight decay of pre-training.
        raw: pre-train on pixels in [0, 1] instead of normalised pixels.
        equal_steps: pre-train a low-rank set for as many steps as plain images with the same
            storage, instead of as many epochs.
    """

    method: str
    seed: int
    arch: str
    steps: int = 0
    weight_decay: float = 0.0
    raw: bool = False
    equal_steps: bool = False

    @property
    def name(self):
        if self.method == "scratch":
            return f"scratch_{self.arch}_seed{self.seed}"
        raw = "_raw" if self.raw else ""
        decay = f"{self.weight_decay:g}"
        equal = "_equal_steps" if self.equal_steps else ""
        return f"{self.method}{raw}_{self.arch}_{self.steps}_{decay}{equal}_seed{self.seed}"


def list_cases():
    """Return all `Case`s, those of one seed after those of another."""
    cases = []
    for seed in SEEDS:
        cases += [Case("scratch", seed, arch) for arch in NETWORKS]
        for method, raw in (*((name, False) for name in SETS), ("krr_st", True)):
            factors = itertools.product(NETWORKS, STEPS, WEIGHT_DECAYS)
            cases += [Case(method, seed, *factor, raw) for factor in factors]
    return cases


def list_successors():
    """Return the `Case`s of the table `successors`: each set with the protocols of `PAPERS`."""
    return [
        Case(
            method,
            seed,
            *(paper[name] for name in ("arch", "steps", "weight_decay")),
            equal_steps=equal_steps,
        )
        for method in TABLES["successors"].methods
        for equal_steps in ((False, True) if method.startswith("krr_st_low_rank") else (False,))
        for seed in SEEDS
        for paper in PAPERS.values()
    ]


def find_set(case, args):
    """Return the file of the set of a `Case`, or None if the network is not pre-trained."""
    if case.method == "scratch":
        return None
    return args.runs / SOURCE / case.method / f"seed{case.seed}" / "distilled.pt"


def select_cases(args):
    """Return the `Case`s whose sets exist, and print how many sets are missing.

    Raises UserError if no set exists.
    """
    cases = list_successors() if args.successors else list_cases()
    paths = {case: find_set(case, args) for case in cases}
    sets = {path for path in paths.values() if path}
    missing = {path for path in sets if not path.is_file()}
    command = (
        "bash scripts/run_successors.sh"
        if args.successors
        else f"bash scripts/run_small.sh --sources {SOURCE} --datasets {DATASET} --seeds 0 "
        f"--methods {' '.join(SETS)} --protocols linear_0.01_0.1"
    )
    if missing == sets:
        raise UserError(f"{args.runs / SOURCE}: none of the sets exists; to make them: {command}")
    if missing:
        print(
            f"{len(missing)} of {len(sets)} sets are missing and left out; to make them: {command}"
        )
    return [case for case, path in paths.items() if path not in missing]


def pretrained_network(case, args, device):
    """Return the `Network` of a `Case`; pre-train it if needed.

    Raises UserError if the set has changed since the pre-training.
    """
    torch.manual_seed(case.seed)
    if not (path := find_set(case, args)):
        return models.build(case.arch, SIZE, 0, WIDTH).to(device)
    distilled, digest = load_distilled(path), files.digest(path)
    images = distilled.pixels() if case.raw else distilled.images
    recipe = preset("other", "pretrain", "feature", case.arch) | STEPS[case.steps]
    recipe |= dict(weight_decay=case.weight_decay, precision=args.precision)
    if case.equal_steps:
        recipe["steps"] = recipe["epochs"] * -(-distilled.num_images // recipe["batch_size"])
    if case.arch == PAPERS["MKDT"]["arch"] and "learned_rate" in distilled.meta:
        recipe["lr"] = distilled.meta["learned_rate"]
    run = Run(
        args.runs / "protocols" / case.name, "model.pt", asdict(case) | recipe | dict(set=digest)
    )
    if not run.finished:
        x_syn, y_syn = images.to(device), distilled.targets.to(device)
        data = SimpleNamespace(images=x_syn, targets=y_syn, preprocess=lambda x: x)
        randomness = Randomness(case.seed, device)
        network = models.build(case.arch, SIZE, distilled.num_outputs, WIDTH).to(device)
        pretrain(network, data, SimpleNamespace(**recipe), run, randomness, device)
        meta = dict(method=case.method, source=SOURCE, seed=case.seed)
        content = saved.make_content(network, case.arch, WIDTH, SIZE, distilled.num_outputs, meta)
        run.finish("model", content)
    return saved.rebuild(saved.load_model(run.artefact)).to(device)


def evaluate(case, network, train, test, args, device):
    """Yield (probe, accuracy in percent) of a `Network` for each of `PROBES`."""
    index = few_labels(train, LABELS_PER_CLASS, 0.0, torch.Generator().manual_seed(case.seed))
    chosen = train.subset(index)
    features, tests = (
        probes.compute_outputs(network.embed, images, device, args.precision, train.mean, train.std)
        for images in (chosen, test)
    )
    labels, truth = chosen.labels.to(device), test.labels.to(device)
    for name, accuracy_of in PROBES.items():
        yield name, accuracy_of(features, labels, tests, truth, len(train.classes))


def collect(lines):
    """Add results to the stored ones, in the order of the cases. Return all stored results."""
    names = [case.name for case in [*list_cases(), *list_successors()]]
    position = {name: index for index, name in enumerate(dict.fromkeys(names))}

    def identity(line):
        name = line["name"]
        return position.get(name, len(position)), name, [*PROBES].index(line["probe"])

    return results.merge(STORED, lines, identity)


@restore_backends()
def main(argv):
    args = parse_args(argv)
    device, cases = select_device(args), select_cases(args)
    train, test = (
        load_images(DATASET, split, SIZE, args.data_root, labels=True)
        for split in ("train", "test")
    )
    folder = args.runs / "protocols"
    known = {line["digest"] for line in results.read(folder / NAME)}
    for case in cases:
        path = find_set(case, args)
        facts = asdict(case) | dict(width=WIDTH, image_size=SIZE, labels_per_class=LABELS_PER_CLASS)
        facts |= dict(source=SOURCE, dataset=DATASET, set=files.digest(path) if path else "none")
        keys = {
            probe: settings_digest(facts | dict(probe=probe, precision=args.precision))
            for probe in PROBES
        }
        if known.issuperset(keys.values()):
            continue
        started = time.monotonic()
        network = pretrained_network(case, args, device)
        for probe, accuracy in evaluate(case, network, train, test, args, device):
            line = facts | dict(name=case.name, probe=probe, accuracy=round(accuracy, 4))
            line |= dict(digest=keys[probe]) | measure_cost(device, args.precision, started)
            results.append(folder, line, NAME)
            print(f"{case.name}, probe {probe}: {accuracy:.2f} %")
    if args.collect:
        print(f"{STORED}: {len(collect(results.read(folder / NAME)))} results")


def parse_args(argv):
    parser = cli.Parser(__doc__)
    cli.add_data_root(parser)
    add_device_flags(parser)
    parser.add_argument("runs", type=Path, help="run root with the sets, such as runs/small")
    parser.add_argument(
        "--successors",
        action="store_true",
        help="evaluate the sets of scripts/run_successors.sh with the protocols of the two papers",
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="add the results to those in experiments/protocols.jsonl",
    )
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
