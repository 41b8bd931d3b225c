"""The list of methods: the command line, the experiments, the tables and the docs read it.

To add a method: write a module in distillers/ that has a `METHOD`, add an `Entry` here, and put its
settings into utils/presets.py. This file imports no method, so reading it takes no time.

A run folder has the name of its method or variant. Where a source has more than one target network,
the name of the target network follows after a dot: `krr_st.encoder`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """A method with other settings than usual.

    `name`: of its run folder. `settings`: setting -> value. `factors`: setting -> factor on the
    usual value. `precision`: of every stage, from the distillation on. `targets`: the kind of
    targets of its sets, where it is not the method's.
    """

    name: str
    title: str
    settings: dict = field(default_factory=dict)
    factors: dict = field(default_factory=dict)
    precision: str = ""
    targets: str = ""


@dataclass(frozen=True)
class Entry:
    """A method, or another way to arrive at a pre-trained network.

    `name`: of its command and its run folder. `title`: in tables. `module`: of its `METHOD`; empty
    for those that make no distilled set. `stage`: of its settings in utils/presets.py. `targets`:
    the kind of targets of its sets where the source has labels. `labels`: whether it needs the
    source's labels: "yes", "no" or "if there". `target_network`: whether it needs one.
    `multi_process`: whether several processes can share a run (torchrun). `command`, `summary`,
    `origin` and `cost` are for the documentation.
    """

    name: str
    title: str
    command: str
    summary: str
    origin: str = ""
    cost: str = "none"
    module: str = ""
    stage: str = "random"
    targets: str = ""
    labels: str = "no"
    target_network: bool = False
    multi_process: bool = False
    variants: tuple = ()


def distiller(name, title, **facts):
    """The `Entry` of a method that `python -m distillers NAME` runs."""
    return Entry(
        name, title, command=f"python -m distillers {name}", module=f"distillers.{name}", **facts
    )


_AS_RELEASED = dict(keep_pool_count=True, raw_init=True, augment_outer=True)

ENTRIES = (  # in the order of the tables' rows
    Entry(
        "scratch",
        "no pre-training",
        command="finetune.py --weights none",
        summary="no pre-training",
    ),
    distiller(
        "gaussian",
        "Gaussian noise",
        summary="noise, drawn anew at each step of `kd.py --weights none --lr 1e-3`: the "
        "lowest row of Table 4",
        origin="the paper",
        targets="none",
    ),
    distiller(
        "random",
        "random real images",
        summary="random real images with their labels, as many of each class",
        targets="class",
        labels="yes",
    ),
    distiller(
        "random_features",
        "random real images with the target's features",
        summary="random real images with the target network's features: what KRR-ST starts from",
        targets="feature",
        target_network=True,
    ),
    distiller(
        "kmeans",
        "k-means",
        summary="the real image nearest to each k-means centroid of the target network's "
        "features, by class where there are labels",
        origin="DC-BENCH, Cui et al. 2022",
        cost="minutes",
        targets="class",
        labels="if there",
        target_network=True,
        variants=(
            Variant(
                "kmeans_features",
                "k-means images with the target's features",
                settings=dict(ignore_labels=True),
                targets="feature",
            ),
        ),
    ),
    distiller(
        "high_loss",
        "highest-loss images with the target's features",
        summary="the real images whose target features networks fit worst after one epoch: what "
        "MKDT starts from",
        origin="Joshi et al., ICLR 2025",
        cost="100 networks of one epoch",
        stage="high_loss",
        targets="feature",
        target_network=True,
    ),
    distiller(
        "dsa",
        "DSA",
        summary="the gradient of each class's loss equals the real images'",
        origin="Zhao and Bilen, ICML 2021",
        cost="a gradient of a gradient for each class and step; among the slowest",
        stage="dsa",
        targets="class",
        labels="yes",
    ),
    distiller(
        "dm",
        "DM",
        summary="the mean features of each class equal the real images', under untrained networks",
        origin="Zhao and Bilen, WACV 2023",
        cost="256 real images a class and step; the cheapest method that learns images",
        stage="dm",
        targets="class",
        labels="yes",
    ),
    distiller(
        "mtt",
        "MTT",
        summary="training on the images leads where epochs on the real ones led; trains "
        "experts first, which later runs reuse",
        origin="Cazenavette et al., CVPR 2022",
        cost="100 experts of 21 epochs (41 for TinyImageNet), then 20 gradients of gradients a"
        " step",
        stage="mtt",
        targets="class",
        labels="yes",
    ),
    distiller(
        "mkdt",
        "MKDT",
        summary="as MTT, but networks are fitted to the target network's features; learns images, "
        "targets and a learning rate from the highest-loss images",
        origin="Joshi et al., ICLR 2025",
        cost="100 experts of 3 epochs, then 40 gradients of gradients a step",
        stage="mkdt",
        targets="feature",
        target_network=True,
    ),
    distiller(
        "kip",
        "KIP",
        summary="kernel ridge regression with the exact tangent kernel of an infinitely wide "
        "network, in float64; `--kernel fc` or `conv` (without pooling)",
        origin="Nguyen et al., ICLR and NeurIPS 2021",
        cost="(b + m) m kernel values a step; at 32 px each takes 2 microseconds (fc) or 0.2 "
        "ms (conv) of one CPU core",
        stage="kip",
        targets="soft",
        labels="yes",
    ),
    distiller(
        "frepo",
        "FRePo",
        summary="a ridge head over a pool's features predicts real labels; learns images and "
        "soft labels",
        origin="Zhou et al., NeurIPS 2022",
        cost="a step costs as much as KRR-ST's; 500,000 steps at full size",
        stage="frepo",
        targets="soft",
        labels="yes",
    ),
    distiller(
        "ssl_bilevel",
        "bilevel SSL",
        summary="equation 1 as it stands: Barlow Twins on the images, unrolled, leads to a low"
        " Barlow Twins loss on real images; what the paper argues against",
        origin="the paper",
        cost="about 2 K passes forward and back a step, a third of them twice",
        stage="ssl_bilevel",
        targets="none",
    ),
    Entry(
        "krr_st",
        "KRR-ST",
        command="python distill.py",
        summary="KRR-ST: learns images and target features on which a ridge head over a pool's"
        " features predicts the target network's features",
        origin="the paper",
        cost="160,000 steps at the paper's size",
        module="distill",
        stage="distill",
        targets="feature",
        target_network=True,
        multi_process=True,
        variants=(
            Variant(
                "krr_st_random_targets",
                "KRR-ST, targets at random",
                settings=dict(random_targets=True),
            ),
            Variant(
                "krr_st_d1", "KRR-ST, D1: a tenth of the learning rate", factors=dict(outer_lr=0.1)
            ),
            Variant(
                "krr_st_d2", "KRR-ST, D2: ridge divided by m", settings=dict(ridge_per_image=True)
            ),
            Variant("krr_st_d3", "KRR-ST, D3: no bias column", settings=dict(bias_column=False)),
            Variant(
                "krr_st_d5",
                "KRR-ST, D5: pool that never resets",
                settings=dict(keep_pool_count=True),
            ),
            Variant("krr_st_d7", "KRR-ST, D7: pixels as they are", settings=dict(raw_init=True)),
            Variant(
                "krr_st_d8", "KRR-ST, D8: augmented outer batch", settings=dict(augment_outer=True)
            ),
            Variant(
                "krr_st_as_released",
                "KRR-ST, D1, D5, D7 and D8: as released",
                settings=_AS_RELEASED,
                factors=dict(outer_lr=0.1),
            ),
            Variant("krr_st_pool_of_1", "KRR-ST, a pool of one member", settings=dict(pool_size=1)),
            Variant("krr_st_T_5", "KRR-ST, T = 5", settings=dict(pool_steps=5)),
            Variant("krr_st_T_80", "KRR-ST, T = 80", settings=dict(pool_steps=80)),
            Variant("krr_st_m_50", "KRR-ST, m = 50", settings=dict(num_images=50)),
            Variant("krr_st_m_200", "KRR-ST, m = 200", settings=dict(num_images=200)),
            Variant(
                "krr_st_low_rank",
                "KRR-ST, low-rank with rotations",
                settings=dict(bases=200, views="rotations"),
            ),
            Variant("krr_st_bf16", "KRR-ST, from distillation on in bf16", precision="bf16"),
        ),
    ),
    Entry(
        "full",
        "full source (oracle)",
        command="python pretrain.py --source",
        summary="pre-training on every image of the source with the target network's features "
        "(the oracle)",
        cost="as many optimiser steps as pre-training on the distilled set",
        stage="pretrain",
        targets="feature",
        target_network=True,
        variants=(
            Variant(
                "full_10x", "full source (oracle), ten times the steps", factors=dict(steps=10)
            ),
        ),
    ),
)

METHODS = {entry.name: entry for entry in ENTRIES}
SETS = tuple(entry.name for entry in ENTRIES if entry.module)  # methods that make a set
COMMANDS = tuple(name for name in SETS if METHODS[name].module.startswith("distillers."))
VARIANTS = {variant.name: variant for entry in ENTRIES for variant in entry.variants}
_ENTRY_OF = {variant.name: entry for entry in ENTRIES for variant in entry.variants} | METHODS
_ROWS = [*METHODS, *VARIANTS]
TITLES = {name: entry.title for name, entry in METHODS.items()} | {
    v.name: v.title for v in VARIANTS.values()
}
RESERVED = (
    "target",
    *(entry.name for entry in ENTRIES if not entry.module),
)  # names that no set can have


def entry_of(name):
    """The `Entry` of a run's name: a method's or a variant's, with or without target network."""
    return _ENTRY_OF[base(name)]


def with_variants(name):
    """A method's name and those of its variants."""
    return [name, *(variant.name for variant in METHODS[name].variants)]


def base(name):
    """A run's name without its target network."""
    return name.partition(".")[0]


def title(name):
    """What a row of a table is called; an unknown name (of an imported set) stays as it is."""
    method, _, target = name.partition(".")
    return TITLES.get(method, method) + (f", target {target}" if target else "")


def order(name):
    """A sort key: rows in the order of the registry, variants after methods, other names last."""
    method = base(name)
    return (_ROWS.index(method) if method in _ROWS else len(_ROWS), name)


def targets_of(name):
    """The kind of targets of a run's set where the source has labels."""
    variant = VARIANTS.get(base(name))
    return (variant and variant.targets) or entry_of(name).targets


def own_settings(name):
    """The settings that make a variant, as `presets.differences` names them; empty for a method.

    `num_images` is left out: rows of other sizes are told apart by it.
    """
    variant = VARIANTS.get(base(name))
    changed = {*variant.settings, *variant.factors} - {"num_images"} if variant else ()
    return {f"{entry_of(name).stage}.{setting}" for setting in changed}


def markdown():
    """The methods as a Markdown table, for the documentation."""
    rows = [
        "| command | what it does | from | labels | target network | cost |",
        "|---|---|---|:-:|:-:|---|",
    ]
    for entry in sorted(ENTRIES, key=lambda entry: (entry.name != "krr_st", not entry.module)):
        labels = entry.labels.replace("no", "")
        target = "yes" if entry.target_network else ""
        cells = [f"`{entry.command}`", entry.summary, entry.origin, labels, target, entry.cost]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(rows)
