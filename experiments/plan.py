"""Turn the description of a table into commands, as a user would type them."""

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import models
from distillers import registry
from experiments.scheduler import TaskList
from experiments.tables import PROBES, Protocol, Table, runs_of
from utils import cli
from utils.errors import UserError
from utils.presets import image_size, preset


@dataclass
class Choice:
    """The parts of a `Table` selected on the command line; None selects the table's default."""

    quick: bool = False
    sources: list | None = None
    methods: list | None = None
    datasets: list | None = None
    archs: list | None = None
    protocols: list | None = None
    oracle: bool = False
    probes: bool = False
    head: bool = False
    seeds: list | None = None
    distill_seeds: list | None = None
    run_root: Path = Path("runs")
    data_root: Path | None = None
    flags: tuple = ()


def to_flags(settings):
    """Convert {"outer_lr": 0.1, "raw_init": True} to ["--outer-lr", "0.1", "--raw-init"]."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def narrow(flag, wanted, known):
    """Return the values of a flag, or all known ones by default. Raises UserError if unknown."""
    for word in wanted or ():
        if word not in known:
            raise UserError(f"{flag} {word}: not one of {', '.join(known) or '(none)'}")
    return [*(known if wanted is None else wanted)]


class Plan:
    """The `tasks` of a table for a `Choice`.

    Raises:
        UserError: a name or a flag that the table does not have.
    """

    def __init__(self, table: Table, choice: Choice):
        quick = choice.quick and table.quick
        self.table, self.scale = table, table.quick if quick else table.scale
        self.choice = choice
        self.runs = choice.run_root / self.scale.folder
        self.data_root = choice.data_root or Path(os.environ.get("DATA_ROOT", "datasets"))
        self.roots = ["--run-root", self.runs]
        self.roots += ["--data-root", choice.data_root] if choice.data_root else []
        self.extra = [*self.roots, *choice.flags]

        sources = (table.quick_sources if quick else ()) or table.sources
        known = {source.name: source for source in sources}
        allowed = known | {s.name: s for s in (table.more_sources if quick else ())}
        names = narrow("--sources", choice.sources, [*allowed]) if choice.sources else known
        self.sources = [allowed[name] for name in names]
        self.methods = narrow("--methods", choice.methods, table.methods)
        self.methods += ["full"] if choice.oracle and "full" not in self.methods else []
        archs = table.networks or {self._preset(s, "distill")["arch"] for s in self.sources}
        self.archs = narrow("--archs", choice.archs, [*archs]) if choice.archs else table.networks
        datasets = (table.quick_datasets if quick else ()) or table.datasets
        self.datasets = choice.datasets or datasets
        self.seeds = table.seeds if choice.seeds is None else choice.seeds
        if table.paired_seeds and choice.distill_seeds is not None:
            raise UserError(
                "--distill-seeds: in this table, distillations use the seeds of --seeds"
            )
        seeds = self.seeds if table.paired_seeds else table.distill_seeds
        self.distill_seeds = seeds if choice.distill_seeds is None else choice.distill_seeds
        protocols = {protocol.key: protocol for protocol in table.protocols}
        keys = narrow("--protocols", choice.protocols, [*protocols])
        self.protocols = [protocols[key] for key in keys]
        more = dict(oracle=choice.oracle, probes=choice.probes, head=choice.head)
        if any(more.values()) and not any(each.name == "full" for each in table.protocols):
            flags = " ".join(f"--{name}" for name, wanted in more.items() if wanted)
            raise UserError(f"{flags}: not available for {table.name}")
        self.protocols += PROBES if choice.probes else ()
        self.protocols += [Protocol("head")] if choice.head else []
        self._list = TaskList()
        self._add_all()

    @property
    def tasks(self):
        return self._list.tasks

    def _add_all(self):
        self._prepare_data()
        for output, words in self.table.first:
            self._list.add(self._filled(words), *self._filled(output))
        for source in self.sources:
            for protocol in self.protocols:
                for dataset in self.datasets if protocol.teacher else ():
                    self._teacher(source, protocol, dataset)
            for seed in self.distill_seeds:
                for method in self._methods_on(source):
                    for name, target in runs_of(method, source):
                        self._make_set(source, name, target, seed)
        for source in self.sources:
            for distill_seed, seed in self._seed_pairs():
                for arch in self.archs or [self._preset(source, "distill")["arch"]]:
                    for method in self._methods_on(source):
                        for name, target in runs_of(method, source):
                            run = _Pretraining(source, name, target, distill_seed, arch, seed)
                            self._pretrain(run)
                            for protocol in self.protocols:
                                self._evaluate(run, protocol)
        for words in self.table.last:
            self._list.add(self._filled(words))

    def _filled(self, text):
        """Return the words of `text`, with the placeholders of `Table.last` filled in."""
        filled = []
        for word in text.split():
            filled += (
                self._flags("device", "precision")
                if word == "{device}"
                else [word.format(runs=self.runs, data=self.data_root)]
            )
        return filled

    def _flags(self, *names):
        """Return the flags `names` that the user or the table's scale sets for all stages."""
        words = []
        for name in names:
            value = cli.peek_flag(name, self.choice.flags, getattr(self.scale, name, ""))
            words += [f"--{name}", value] if value else []
        return words

    def _methods_on(self, source):
        return [each for each in self.methods if (source.name, each) not in self.table.without]

    def _seed_pairs(self):
        """Return the pairs of (distillation, pre-training) seeds."""
        if self.table.paired_seeds:
            return [*zip(self.distill_seeds, self.seeds, strict=True)]
        return [(k, seed) for k in self.distill_seeds for seed in self.seeds]

    def _run(self, words, *outputs):
        """Add a command of a stage. It needs the data sets that it names to be prepared."""
        words = [*words, *self.extra]
        reads = [
            self._prepared_file(name, self._size(source))
            for flag, name in pairwise(words)
            for source in self.sources
            if flag in ("--source", "--dataset")
        ]
        self._list.add(words, *outputs, reads=reads)

    def _prepared_file(self, name, size):
        return self.data_root / "prepared" / f"{name}-{size}px" / "test.json"

    def _preset_name(self, source):
        return self.scale.preset.format(source=source.name)

    def _preset(self, source, stage, *kind):
        return preset(self._preset_name(source), stage, *kind)

    def _size(self, source):
        return self.scale.image_size or image_size(self._preset_name(source))

    def _width(self, source):
        return self.scale.width or self._preset(source, "distill")["width"]

    def _source_flags(self, source):
        words = ["--source", source.name]
        if (name := self._preset_name(source)) != source.name:
            words += ["--preset", name]
        return words + (
            to_flags(dict(image_size=self._size(source))) if self.scale.image_size else []
        )

    def _precision(self, name):
        variant = registry.VARIANTS.get(registry.base(name))
        precision = (variant and variant.precision) or self.scale.precision
        return ["--precision", precision] if precision else []

    def _prepare_data(self):
        """Prepare data sets first if partial ones are allowed, because this needs --partial."""
        if self.scale.partial:
            for source in self.sources:
                for name in (source.name, *self.datasets):
                    size = self._size(source)
                    words = ["-m", "data.prepare", name, "--size", size, "--partial"]
                    words += ["--data-root", self.data_root]
                    self._list.add(words, self._prepared_file(name, size))

    def _target_network(self, source, target):
        """Add the task of a target network, and return its file."""
        path = self.runs / source.name / target.name / "seed0" / "target.pt"
        words = ["pretrain_target.py", *self._source_flags(source)]
        words += ["--name", target.name] if target.name != "target" else []
        self._run([*words, *to_flags(self.scale.target | target.settings)], path)
        return path

    def _set(self, source, name, seed):
        return self.runs / source.name / name / f"seed{seed}" / "distilled.pt"

    def _settings(self, source, name):
        """Return the settings of a set that differ from its preset."""
        entry, variant = registry.entry_of(name), registry.VARIANTS.get(registry.base(name))
        own = self.scale.sets | self.scale.methods.get(entry.name, {}) | source.sets
        if variant:
            usual = self._preset(source, entry.stage) | own
            own |= variant.settings
            own |= {key: factor * usual[key] for key, factor in variant.factors.items()}
            own |= self.scale.methods.get(variant.name, {})
        return own

    def _make_set(self, source, name, target, seed):
        entry = registry.entry_of(name)
        network = ["--target-network", self._target_network(source, target)] if target else []
        if not entry.module:
            return
        in_distillers = entry.module.startswith("distillers.")
        words = ["-m", "distillers", entry.name] if in_distillers else [f"{entry.module}.py"]
        words += ["--name", name] if name != entry.name else []
        words += [*network, *self._source_flags(source)]
        words += ["--seed", seed] if seed else []
        words += [*self._precision(name), *to_flags(self._settings(source, name))]
        self._run(words, self._set(source, name, seed))
        for protocol in self.protocols:
            if protocol.name == "fid":
                self._fid(source, name, seed)
        if registry.base(name) in self.table.pictures and seed == self.distill_seeds[0]:
            self._draw(source, name, target, seed)

    def _weights(self, run):
        """Return the folder of a pre-trained network, or of an untrained one."""
        arch = models.label(run.arch, self._width(run.source))
        if run.starts_untrained:
            return self.runs / "scratch" / f"{arch}_{self._size(run.source)}px"
        return (
            self.runs
            / run.source.name
            / run.name
            / f"seed{run.set_seed}"
            / arch
            / f"seed{run.seed}"
        )

    def _fresh(self, source, arch):
        """Return the flags of an untrained network."""
        words = ["none", "--arch", arch, "--image-size", self._size(source)]
        width = self._width(source)
        return words + (to_flags(dict(width=width)) if width != 1 else [])

    def _pretrain(self, run):
        entry = registry.entry_of(run.name)
        if run.starts_untrained or "fid" in [each.name for each in self.protocols]:
            return
        if entry.module:
            words = ["--distilled", self._set(run.source, run.name, run.set_seed)]
            kind = registry.targets_of(run.name)
        else:
            target = self._target_network(run.source, run.target)
            words = [*self._source_flags(run.source), "--target-network", target]
            words += ["--name", run.name] if run.name != entry.name else []
            kind = "source"
        own = dict(self.scale.pretrain.get(kind, {}))
        if kind == "source" and (variant := registry.VARIANTS.get(registry.base(run.name))):
            usual = self._preset(run.source, "pretrain", kind, run.arch) | own
            own |= {key: factor * usual[key] for key, factor in variant.factors.items()}
        words += ["--arch", run.arch]
        words += to_flags(dict(width=self.scale.width)) if self.scale.width else []
        words += ["--seed", run.seed, *to_flags(own), *self._precision(run.name)]
        self._run(["pretrain.py", *words], self._weights(run) / "model.pt")

    def _evaluate(self, run, protocol):
        if protocol.name == "kd":
            for dataset in self.datasets:
                self._distill_knowledge(run, protocol, dataset)
        elif protocol.name in ("head", "r2"):  # of networks with such targets, on their source
            kinds = ("feature",) if protocol.name == "r2" else ("class", "soft")
            if registry.targets_of(run.name) in kinds:
                self._fine_tune(run, protocol, run.source.name)
        elif protocol.name != "fid":
            for dataset in self.datasets:
                self._fine_tune(run, protocol, dataset)

    def _start(self, run):
        if run.starts_untrained:
            return self._fresh(run.source, run.arch)
        return [self._weights(run) / "model.pt"]

    def _fine_tune(self, run, protocol, dataset):
        """Add finetune.py; one command covers all numbers of labels if the features are frozen."""
        labels = protocol.labels
        groups = [[each] for each in labels] if protocol.name == "full" else [labels]
        for group in groups:
            words = ["finetune.py", "--weights", *self._start(run), "--dataset", dataset]
            words += ["--seed", run.seed]
            words += ["--protocol", protocol.name] if protocol.name != "full" else []
            if protocol.name == "r2":
                words += ["--target-network", self._target_network(run.source, run.target)]
            flags = [flag for _, flag in group if flag]
            words += [flags[0][0], *(f"{value:g}" for _, value in flags)] if flags else []
            if protocol.name == "full":
                changed = self.scale.finetune | self.scale.networks.get(run.arch, {})
                words += to_flags(changed | protocol.settings)
            outputs = [
                f"{self._weights(run)}/results.jsonl#{dataset}_{protocol.name}{end}_seed{run.seed}"
                for end, _ in group
            ]
            self._run([*words, *self._precision(run.name)], *outputs)

    def _teacher(self, source, protocol, dataset):
        """Add the teacher of kd.py, trained from scratch with seed 0, and return its weights."""
        run = _Pretraining(source, "scratch", None, 0, protocol.teacher, 0)
        self._fine_tune(run, Protocol("full"), dataset)
        return self._weights(run) / f"{dataset}_full_seed0" / "model.pt"

    def _distill_knowledge(self, run, protocol, dataset):
        words = ["kd.py", "--weights", *self._start(run), "--dataset", dataset]
        words += ["--distilled", self._set(run.source, run.name, run.set_seed)]
        words += ["--seed", run.seed, "--teacher", self._teacher(run.source, protocol, dataset)]
        # The released code uses learning rate 1e-3 for noise.
        own = dict(lr=1e-3) if run.name == "gaussian" else {}
        words += to_flags(own | self.scale.kd | protocol.settings)
        name = f"{dataset}_kd_{run.name}_seed{run.seed}"
        self._run(words, f"{self._weights(run)}/results.jsonl#{name}")

    def _fid(self, source, name, seed):
        network = "inception"
        if self.scale.own_fid:
            network = self._target_network(source, source.targets[0])
        images = self._set(source, name, seed)
        words = ["-m", "evaluation.fid", "--distilled", images, "--network", network]
        output = f"{images.parent}/results.jsonl#fid_{Path(network).stem}"
        words += ["--data-root", self.data_root, *self._flags("device")]
        self._list.add(words, output)

    def _draw(self, source, name, target, seed):
        """Add the figures of a set: images, t-SNE and curves."""
        images = self._set(source, name, seed)
        plots = self.runs / "figures"
        for kind in ("images", "tsne"):
            out = plots / f"{source.name}-{kind}.png"
            words = ["-m", "analysis.figures", kind, "--distilled", images, "--out", out]
            if kind == "tsne":
                words += ["--target-network", self._target_network(source, target)]
            self._list.add([*words, "--data-root", self.data_root], out)
        out = plots / f"{source.name}-curves.png"
        self._list.add(["-m", "analysis.figures", "curves", "--out", out, images.parent])


@dataclass(frozen=True)
class _Pretraining:
    """A pre-training of `arch` with `seed` on the set `name` distilled with `distill_seed`."""

    source: object
    name: str
    target: object
    distill_seed: int
    arch: str
    seed: int

    @property
    def starts_untrained(self):
        """Whether nothing is pre-trained, because there is no set or it has no targets."""
        entry = registry.entry_of(self.name)
        return entry.name == "scratch" or registry.targets_of(self.name) == "none"

    @property
    def set_seed(self):
        """The seed in the set's folder; 0 for entries without a distilled set."""
        return self.distill_seed if registry.entry_of(self.name).module else 0
