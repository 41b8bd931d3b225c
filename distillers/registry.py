"""The list of methods, used by the command line, the experiments, the tables and the docs.

To add a method, write a module in distillers/ with a `METHOD`, add an `Entry` here, and add its
settings to utils/presets.py. This module imports no method, so that it loads quickly.

A run folder is named after its method or variant. If a source has several target networks, a dot
and the name of the target network follow: `krr_st.encoder`.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """A method with changed settings.

    Args:
        name: name of its run folder.
        title: name in tables.
        settings: dict of setting to value.
        factors: dict of setting to a factor on the preset's value.
        precision: precision of distillation and of all later stages.
        targets: kind of targets of its sets, if it differs from the method's.
    """

    name: str
    title: str
    settings: dict = field(default_factory=dict)
    factors: dict = field(default_factory=dict)
    precision: str = ""
    targets: str = ""


@dataclass(frozen=True)
class Entry:
    """A method, or another way to obtain a pre-trained network.

    Args:
        name: name of its command and its run folder.
        title: name in tables.
        command: command in the table of methods.
        summary: what it does, in the table of methods.
        origin: its reference, in the table of methods.
        cost: its cost, in the table of methods.
        module: module with its `METHOD`; empty if it writes no distilled set.
        stage: key of its settings in utils/presets.py.
        targets: kind of targets of its sets, if the source has labels.
        labels: whether it needs the source's labels: "yes", "no" or "optional".
        target_network: whether it needs a target network.
        multi_process: whether several processes can share a run (torchrun).
        bf16: whether `--precision auto` may select bf16, from distillation to fine-tuning
            (docs/findings.md).
        variants: its `Variant`s.
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
    bf16: bool = False
    variants: tuple = ()


def distiller(name, title, **facts):
    """Return the `Entry` of a method that `python -m distillers NAME` runs."""
    return Entry(
        name, title, command=f"python -m distillers {name}", module=f"distillers.{name}", **facts
    )


def _of_size(name, title, *sizes, targets="", **settings):
    """Return a `Variant` for each number of images (or of plain images' worth) in `sizes`."""
    return tuple(
        Variant(
            f"{name}_m_{m}", f"{title}, m = {m}", dict(num_images=m, **settings), targets=targets
        )
        for m in sizes
    )


def _quarter(name, title, lr=1, **settings):
    """Return a `Variant` of KRR-ST with a quarter of the steps, which differ in more settings."""
    return Variant(
        f"krr_st_quarter{name}",
        f"KRR-ST, a quarter of the steps{title}",
        settings,
        factors=dict(outer_steps=0.25) | (dict(outer_lr=lr) if lr != 1 else {}),
    )


_LOW_RANK, _LOW_RANK_TITLE = dict(views="rotations"), "KRR-ST, low-rank with rotations"
_AS_RELEASED = dict(keep_pool_count=True, raw_init=True, augment_outer=True)

ENTRIES = (  # in the order of rows in tables
    Entry(
        "scratch",
        "no pre-training",
        command="python finetune.py --weights none",
        summary="no pre-training",
    ),
    distiller(
        "gaussian",
        "Gaussian noise",
        summary="noise, redrawn at each step of `kd.py --weights none --lr 1e-3`; the row "
        "without images in Table 4",
        origin="the paper",
        targets="none",
    ),
    distiller(
        "random",
        "random real images",
        summary="random real images, the same number from each class",
        targets="class",
        labels="yes",
    ),
    distiller(
        "random_features",
        "random real images with the target's features",
        summary="random real images with the target network's features; KRR-ST starts from these",
        targets="feature",
        target_network=True,
        variants=_of_size(
            "random_features", "random real images with the target's features", 50, 200
        ),
    ),
    distiller(
        "kmeans",
        "k-means",
        summary="the real image nearest to each k-means centroid of the target network's "
        "features; per class if the source has labels",
        origin="DC-BENCH, Cui et al. 2022",
        cost="minutes",
        targets="class",
        labels="optional",
        target_network=True,
        variants=(
            Variant(
                "kmeans_features",
                "k-means images with the target's features",
                settings=dict(ignore_labels=True),
                targets="feature",
            ),
            *_of_size(
                "kmeans_features",
                "k-means images with the target's features",
                50,
                200,
                targets="feature",
                ignore_labels=True,
            ),
        ),
    ),
    distiller(
        "high_loss",
        "highest-loss images with the target's features",
        summary="the real images whose target features are fitted worst by networks after one "
        "epoch; MKDT starts from these",
        origin="Joshi et al., ICLR 2025",
        cost="100 networks, each trained for one epoch",
        stage="high_loss",
        targets="feature",
        target_network=True,
        variants=_of_size("high_loss", "highest-loss images with the target's features", 50, 200),
    ),
    distiller(
        "dsa",
        "DSA",
        summary="matches the gradient of the loss for each class to that of the real images",
        origin="Zhao and Bilen, ICML 2021",
        cost="a second-order gradient per class and step; one of the slowest methods",
        stage="dsa",
        targets="class",
        labels="yes",
    ),
    distiller(
        "dm",
        "DM",
        summary="matches the mean features of each class to those of the real images, under "
        "untrained networks",
        origin="Zhao and Bilen, WACV 2023",
        cost="256 real images per class and step; the cheapest method that learns images",
        stage="dm",
        targets="class",
        labels="yes",
    ),
    distiller(
        "mtt",
        "MTT",
        summary="matches training trajectories: a few steps on the distilled images lead where "
        "epochs on the real images lead; first trains experts, which later runs reuse",
        origin="Cazenavette et al., CVPR 2022",
        cost="100 experts of 21 epochs (41 for TinyImageNet), then 20 second-order gradients "
        "per step",
        stage="mtt",
        targets="class",
        labels="yes",
    ),
    distiller(
        "mkdt",
        "MKDT",
        summary="MTT with networks fitted to the target network's features; learns images, "
        "targets and a learning rate; starts from the highest-loss images",
        origin="Joshi et al., ICLR 2025",
        cost="100 experts of 3 epochs, then 40 second-order gradients per step",
        stage="mkdt",
        targets="feature",
        target_network=True,
        variants=_of_size("mkdt", "MKDT", 50, 200),
    ),
    distiller(
        "kip",
        "KIP",
        summary="kernel ridge regression with the exact tangent kernel of an infinitely wide "
        "network, in float64; `--kernel fc` or `conv` (without pooling)",
        origin="Nguyen et al., ICLR and NeurIPS 2021",
        cost="(b + m) m kernel entries per step; at 32 px, 2 microseconds (fc) or 0.2 ms (conv) "
        "each on one CPU core",
        stage="kip",
        targets="soft",
        labels="yes",
    ),
    distiller(
        "frepo",
        "FRePo",
        summary="ridge regression on the features of a pool predicts the labels; learns images "
        "and soft labels",
        origin="Zhou et al., NeurIPS 2022",
        cost="per step as KRR-ST; 500,000 steps at full size",
        stage="frepo",
        targets="soft",
        labels="yes",
    ),
    distiller(
        "ssl_bilevel",
        "bilevel SSL",
        summary="solves equation 1 directly: unrolled Barlow Twins training on the images "
        "minimises the Barlow Twins loss on real ones; the approach that the paper argues against",
        origin="the paper",
        cost="about 2 K forward and backward passes per step, a third of them twice",
        stage="ssl_bilevel",
        targets="none",
    ),
    Entry(
        "krr_st",
        "KRR-ST",
        command="python distill.py",
        summary="KRR-ST: learns images and target features; ridge regression on the features of a "
        "pool predicts the target network's features",
        origin="the paper",
        cost="160,000 steps at the paper's size",
        module="distill",
        stage="distill",
        targets="feature",
        target_network=True,
        multi_process=True,
        bf16=True,
        variants=(
            Variant(
                "krr_st_random_targets",
                "KRR-ST, random targets",
                settings=dict(random_targets=True),
            ),
            Variant(
                "krr_st_from_noise",
                "KRR-ST, images from noise",
                settings=dict(random_images=True),
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
            Variant("krr_st_d7", "KRR-ST, D7: raw pixels", settings=dict(raw_init=True)),
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
            *_of_size("krr_st", "KRR-ST", 50, 200),
            Variant(
                "krr_st_long_m_50",
                "KRR-ST, five times the steps, m = 50",
                settings=dict(num_images=50),
                factors=dict(outer_steps=5),
            ),
            Variant(
                "krr_st_n_1000", "KRR-ST, 1,000 source images", settings=dict(source_images=1000)
            ),
            Variant(
                "krr_st_n_1000_d8",
                "KRR-ST, 1,000 source images, D8: augmented outer batch",
                settings=dict(source_images=1000, augment_outer=True),
            ),
            Variant(
                "krr_st_n_3000", "KRR-ST, 3,000 source images", settings=dict(source_images=3000)
            ),
            Variant(
                "krr_st_n_10000",
                "KRR-ST, 10,000 source images",
                settings=dict(source_images=10_000),
            ),
            Variant(
                "krr_st_low_rank",
                _LOW_RANK_TITLE,
                settings=_LOW_RANK | dict(bases=200),
            ),
            *_of_size("krr_st_low_rank", _LOW_RANK_TITLE, 50, **_LOW_RANK, bases=100),
            *_of_size("krr_st_low_rank", _LOW_RANK_TITLE, 200, **_LOW_RANK, bases=400),
            _quarter("", ""),
            _quarter("_lr_3", ", 3 x learning rate", lr=3),
            _quarter("_lr_10", ", 10 x learning rate", lr=10),
            _quarter("_averaged", ", 3 x learning rate, last 250 averaged", 3, averaged_steps=250),
            _quarter("_pool_batch", ", 3 x learning rate, pool batch 50", 3, pool_batch=50),
            _quarter("_b_64", ", 3 x learning rate, b = 64", 3, outer_batch=64),
            _quarter("_updates", ", 4 updates per batch", updates_per_batch=4),
            _quarter("_l_3", ", 3 x learning rate, l = 3", 3, pool_size=3),
            _quarter("_T_40", ", 3 x learning rate, T = 40", 3, pool_steps=40),
            _quarter("_narrow", ", 3 x learning rate, half the width", 3, width=0.125),
            Variant(
                "krr_st_half_l_3",
                "KRR-ST, half of the steps, 3 x learning rate, l = 3",
                dict(pool_size=3),
                factors=dict(outer_steps=0.5, outer_lr=3),
            ),
            Variant("krr_st_bf16", "KRR-ST, bf16 from distillation onwards", precision="bf16"),
        ),
    ),
    Entry(
        "full",
        "full source (oracle)",
        command="python pretrain.py --source",
        summary="the oracle: pre-training on all images of the source with the target network's "
        "features",
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
TITLES = {name: entry.title for name, entry in METHODS.items()} | {
    v.name: v.title for v in VARIANTS.values()
}
_ROWS = [
    name for entry in ENTRIES for name in (entry.name, *(each.name for each in entry.variants))
]
RESERVED = (
    "target",
    *(entry.name for entry in ENTRIES if not entry.module),
)  # names that no set may have


def entry_of(name):
    """Return the `Entry` of a method or variant; `name` may include a target network."""
    return _ENTRY_OF[base(name)]


def with_variants(name):
    """Return the names of a method and of its variants."""
    return [name, *(variant.name for variant in METHODS[name].variants)]


def base(name):
    """Return the name of a run without its target network."""
    return name.partition(".")[0]


def title(name):
    """Return the title of a run in tables; an unknown name, of an imported set, is unchanged."""
    method, _, target = name.partition(".")
    return TITLES.get(method, method) + (f", target {target}" if target else "")


def order(name):
    """Sort key of a run: methods in registry order, each before its variants."""
    method = base(name)
    return (_ROWS.index(method) if method in _ROWS else len(_ROWS), name)


def targets_of(name):
    """Return the kind of targets of a run's set, if the source has labels."""
    variant = VARIANTS.get(base(name))
    return (variant and variant.targets) or entry_of(name).targets


def bf16_is_harmless(name):
    """Return `Entry.bf16` of a run; False for the unknown name of another set, or None."""
    entry = _ENTRY_OF.get(base(name or ""))
    return entry is not None and entry.bf16


def own_settings(name):
    """Return the settings that define a variant, named as `presets.deviations` names them.

    The result is empty for a method. It excludes `num_images`, which distinguishes rows of
    different sizes, and the precision.
    """
    variant = VARIANTS.get(base(name))
    changed = {*variant.settings, *variant.factors} - {"num_images"} if variant else ()
    return {f"{entry_of(name).stage}.{setting}" for setting in changed}


def markdown():
    """Return the methods as a Markdown table, for the documentation."""
    rows = [
        "| command | what it does | reference | labels | target network | cost |",
        "|---|---|---|:-:|:-:|---|",
    ]
    for entry in sorted(ENTRIES, key=lambda entry: (entry.name != "krr_st", not entry.module)):
        labels = entry.labels.replace("no", "")
        target = "yes" if entry.target_network else ""
        cells = [f"`{entry.command}`", entry.summary, entry.origin, labels, target, entry.cost]
        rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(rows)
