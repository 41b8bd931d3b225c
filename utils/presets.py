"""All hyperparameters and their sources. They are the defaults of the scripts' flags.

Sources:
  [P]      the paper (arXiv 2310.06511), with the section
  [C]      the authors' released code, for values that the paper does not give
  [S]      solo-learn's CIFAR recipe for Barlow Twins, most likely that of the paper's target
           networks (neither paper nor code gives one)
  [DC]     the code of dataset condensation (DM, DSA)
  [MTT]    the code of trajectory matching
  [FRePo], [KIP], [MKDT]    papers and code of these methods
  [Boost]  Yu et al. 2025, in part as implemented by others
  [ours]   chosen for this project, for machines that are too small for the paper's settings
"""

SMALLEST_IMAGE_SIZE = 32  # VGG11 and ConvNet5 halve the image five times

TARGET = dict(  # pretrain_target.py; [P 4.1] Barlow Twins on ResNet18, nothing else is given
    arch="resnet18_target",  # [P 4.1] ResNet18; stem [C]
    width=1.0,
    epochs=1000,  # [S]
    batch_size=256,  # [S]
    lr=0.3,  # [S] LARS, for a batch of 256; scaled by batch/256
    weight_decay=1e-4,  # [S]
    warmup_epochs=10,  # [S]
    projector_dim=2048,  # [S] three layers of this width
    off_diagonal=0.0051,  # [S] and Zbontar et al. 2021, lambda
    loss_scale=0.1,  # [S]
    crop_min=0.08,  # [S] smallest share of the area
    jitter=0.8,  # [S] probability of colour jitter
    greyscale=0.2,  # [S] probability
    solarise=0.2,  # [S] probability, second view only
    flip=0.5,  # [S] probability
    weights="",  # file with pre-trained weights; empty trains a network
)

DISTILL = dict(  # distill.py
    num_images=1000,  # [P 4.1] m
    arch="convnet3",  # [P 4.1]
    width=1.0,
    outer_steps=160_000,  # [P 4.1]
    outer_lr=1e-3,  # [P 4.1] linear decay [P]; to 1/1000 of it [C]
    outer_batch=1024,  # [C] b
    pool_size=10,  # [P 4.1] l
    pool_steps=1000,  # [P 4.1] T
    pool_lr=0.1,  # [P 4.1] SGD, momentum 0.9
    pool_weight_decay=1e-3,  # [P 4.1]
    ridge=1e-6,  # [C] times the trace of the kernel; the paper gives no value
    ridge_per_image=False,  # [C] the trace is not divided by m
    bias_column=True,  # [C] a constant 1 is appended to the features
    keep_pool_count=False,  # [P, Algorithm 1 line 15] a reinitialised member counts from 0
    raw_init=False,  # [P, Algorithm 1 lines 3-4] images as the networks see them
    augment_outer=False,  # [P, Algorithm 1 line 9]
    pool_batch=0,  # [P, Algorithm 1 line 12] all images
    updates_per_batch=1,  # [P, Algorithm 1]
    averaged_steps=0,  # [P, Algorithm 1]
    source_images=0,  # [P] all images of the source
    random_targets=False,  # [P, Algorithm 1 line 4]; True is the other row of [P, appendix E]
    random_images=False,  # [P, Algorithm 1 line 3]
    bases=0,  # plain images; [Boost] 200
    target_bases=0,  # as many as bases [ours]; [Boost] 200
    base_size=16,  # [Boost]
    views="none",  # [Boost] rotations
    shift_width=4,  # [Boost] CIFAR-100; 16 at 64 px
)

# In a method's settings: use the value of distill.py for the source, else of pretrain_target.py.
INHERITED = object()
# distillers/random.py, random_features.py, kmeans.py, gaussian.py
RANDOM = dict(num_images=INHERITED)

FREPO = dict(  # distillers/frepo.py; KRR-ST's release lists no settings of its re-run
    num_images=INHERITED,
    arch=INHERITED,
    width=INHERITED,
    outer_steps=500_000,  # [FRePo]
    outer_lr=3e-4,  # [FRePo] LAMB, cosine to a tenth
    outer_batch=1024,  # [FRePo]
    pool_size=10,  # [FRePo]
    pool_steps=100,  # [FRePo]
    pool_lr=3e-4,  # [FRePo] Adam
    pool_batch=1000,  # [FRePo]
    ridge=1e-6,  # [FRePo] times the mean of the kernel's diagonal
)

KIP = dict(  # distillers/kip.py
    num_images=INHERITED,
    kernel="conv",  # [KIP] but without its pooling [ours]
    depth=3,  # [KIP]
    outer_steps=1000,  # [KIP] of its published sets
    outer_lr=4e-2,  # [KIP] Adam
    outer_batch=5000,  # [KIP]
    ridge=1e-6,  # [KIP] times the mean of the kernel's diagonal
    learn_labels=False,  # [KIP] its published sets come with and without
)

DM = dict(  # distillers/dm.py
    num_images=INHERITED,
    arch="dc_convnet3",  # [DC]
    width=INHERITED,
    outer_steps=20_000,  # [DC]
    outer_lr=1.0,  # [DC]
    real_batch=256,  # [DC]
)

DSA = dict(  # distillers/dsa.py
    num_images=INHERITED,
    arch="dc_convnet3",  # [DC]
    width=INHERITED,
    networks=1000,  # [DC]
    outer_loops=0,  # [DC] as many as images per class
    inner_epochs=0,  # [DC] a table, by images per class
    outer_lr=0.1,  # [DC]
    real_batch=256,  # [DC]
    inner_lr=0.01,  # [DC]
    inner_batch=256,  # [DC]
)

MTT = dict(  # distillers/mtt.py; [MTT] CIFAR-100, 10 images per class, without ZCA
    num_images=INHERITED,
    arch="dc_convnet3",  # [MTT]
    width=INHERITED,
    outer_steps=5_000,  # [MTT]
    outer_lr=1e3,  # [MTT]
    rate_lr=1e-5,  # [MTT]
    inner_steps=20,  # [MTT] N
    inner_batch=0,  # [MTT] all
    match_epochs=2,  # [MTT] M
    max_start=20,  # [MTT]
    experts=100,  # [MTT]
    expert_lr=0.01,  # [MTT]
    expert_momentum=0.0,  # [MTT]
    expert_weight_decay=0.0,  # [MTT]
    expert_batch=256,  # [MTT]
)

EXPERTS = dict(  # distillers/experts.py, for high_loss and mkdt; [MKDT]
    arch="dc_convnet3",
    width=INHERITED,
    experts=100,
    expert_lr=0.1,
    expert_momentum=0.9,
    expert_weight_decay=1e-4,
    expert_batch=256,
)

HIGH_LOSS = dict(num_images=INHERITED, **EXPERTS)  # distillers/high_loss.py

MKDT = dict(  # distillers/mkdt.py; [MKDT] 2 % of CIFAR
    num_images=INHERITED,
    **EXPERTS,
    outer_steps=5_000,  # [MKDT]
    outer_lr=1e3,  # [MKDT] 1e4 for 5 % of CIFAR
    target_lr=1.0,  # [MKDT]
    rate_lr=1e-4,  # [MKDT]
    inner_steps=40,  # [MKDT] N
    inner_batch=256,  # [MKDT]
    match_epochs=2,  # [MKDT] M
    max_start=2,  # [MKDT] 5 for 5 % of CIFAR
)

SSL_BILEVEL = dict(  # distillers/ssl_bilevel.py; the paper tried it (3.1) and gives no settings
    num_images=INHERITED,
    arch=INHERITED,
    width=INHERITED,
    outer_steps=INHERITED,
    outer_lr=INHERITED,
    outer_batch=INHERITED,
    inner_steps=10,  # [ours] K
    inner_lr=0.1,  # [ours]
    inner_batch=256,  # [S] as the target's batch
    projector_dim=INHERITED,
    off_diagonal=INHERITED,
    crop_min=INHERITED,
    jitter=INHERITED,
    greyscale=INHERITED,
    solarise=INHERITED,
    flip=INHERITED,
)

PRETRAIN = {  # pretrain.py, by the kind of targets
    "feature": dict(  # [P 4.1]; no augmentation, constant rate [C]
        loss="mse",
        optimizer="sgd",
        lr=0.1,
        weight_decay=1e-3,
        schedule="constant",
        warmup=0,
        batch_size=256,
        epochs=1000,
        steps=0,
        augment=False,
    ),
    "class": dict(  # [C]
        loss="cross_entropy",
        optimizer="sgd",
        lr=0.01,
        weight_decay=5e-4,
        schedule="halfway",
        warmup=0,
        batch_size=256,
        epochs=1000,
        steps=0,
        augment=True,
    ),
    "soft": dict(  # [C]
        loss="half_squared",
        optimizer="adamw",
        lr=3e-4,
        weight_decay=0.0,
        schedule="cosine",
        warmup=500,
        batch_size=500,
        epochs=0,
        steps=10_000,
        augment=True,
    ),
}

FINETUNE = dict(  # finetune.py
    lr=0.01,  # [P 4.1] SGD, momentum 0.9, cosine to 0
    weight_decay=5e-4,  # [P 4.1]
    batch_size=256,  # [P 4.1]
    steps=5_000,  # [P 4.1] Aircraft, Cars, CUB2011, Dogs, Flowers; [C] ImageNette
    flip=True,  # [C] random crop with padding 4 and horizontal flip
)

KD = dict(  # kd.py
    lr=1e-4,  # [P 4.3] AdamW
    weight_decay=0.0,  # [C]
    batch_size=512,  # [P 4.3]
    epochs=1000,  # [P 4.3] cosine, one step an epoch [C]
    augment=True,  # [C] differentiable augmentation of the distilled images, for every method
)

_LONG = dict(finetune=dict(steps=10_000))  # [P 4.1] for CIFAR-10, CIFAR-100 and TinyImageNet
_AT_64 = dict(arch="convnet4", outer_lr=1e-5, shift_width=16)  # [P 4.1], [Boost]
_INSTANCE_NORM = ("dm", "dsa", "mtt", "high_loss", "mkdt")  # stages with networks of [DC]
_DC_AT_64 = {stage: dict(arch="dc_convnet4") for stage in _INSTANCE_NORM}  # [ours]
# [ours] of the table less_work (docs/speed.md); T is a quarter of the steps of pre-training
_LESS_WORK = dict(outer_steps=1000, outer_lr=0.03, outer_batch=256, pool_size=3)
_FEW_EXPERTS = dict(experts=10)  # [ours] for two CPU cores
_DIGITS_EXPERTS = dict(experts=4, expert_batch=64)  # [ours]

PRESETS = {  # changes to the values above
    "cifar100": dict(image_size=32, **_LONG),  # [P 4.1]
    # [DC] DM's outer_lr for 100 or more images per class
    "cifar10": dict(image_size=32, dm=dict(outer_lr=10.0), **_LONG),
    "tinyimagenet": dict(
        image_size=64,  # [P 4.1]
        distill=dict(**_AT_64, num_images=2000),  # [P 4.1]
        pretrain={"soft": dict(steps=40_000), ("soft", "mobilenet"): dict(batch_size=256)},  # [C]
        dm=dict(arch="dc_convnet4"),  # [DC]
        dsa=dict(arch="dc_convnet4"),  # [DC]
        high_loss=dict(arch="dc_convnet4"),  # [MKDT]
        mkdt=dict(arch="dc_convnet4", outer_steps=10_000, outer_lr=1e5, inner_steps=10),  # [MKDT]
        mtt=dict(
            arch="dc_convnet4", outer_lr=1e4, rate_lr=1e-4, max_start=40, inner_batch=200
        ),  # [MTT]
        **_LONG,
    ),
    "imagenet": dict(image_size=64, distill=_AT_64, **_DC_AT_64),  # [P 4.1]
    "imagenette": dict(  # [P, appendix D]
        image_size=224,
        target=dict(arch="resnet50_target", weights="hub"),  # [C] Barlow Twins on ImageNet, 2048-d
        distill=dict(arch="convnet5", num_images=10, outer_lr=1e-5),  # [C]
        pretrain=dict(soft=dict(steps=1_000, batch_size=10)),  # [C]
        # [ours] as deep as KRR-ST's
        **{stage: dict(arch="dc_convnet5") for stage in _INSTANCE_NORM},
    ),
    "digits": dict(  # [ours] sized for the quick start on two CPU cores
        image_size=32,
        target=dict(
            width=0.125,
            epochs=30,
            batch_size=128,
            warmup_epochs=2,
            projector_dim=256,
            crop_min=0.3,
            greyscale=0.0,
            flip=0.0,  # a flipped digit is not the same digit
        ),
        distill=dict(
            num_images=30,
            width=0.25,
            outer_steps=300,
            outer_lr=0.02,
            outer_batch=256,
            pool_size=5,
            pool_steps=60,
        ),
        frepo=dict(
            outer_steps=150,
            outer_lr=0.02,
            outer_batch=256,
            pool_size=5,
            pool_steps=40,
            pool_lr=3e-3,
        ),
        kip=dict(kernel="fc", outer_steps=200, outer_batch=500),
        dm=dict(outer_steps=60, real_batch=64),
        dsa=dict(networks=8, outer_loops=4, inner_epochs=5, real_batch=64),
        mtt=dict(
            outer_steps=30,
            outer_lr=500.0,
            inner_steps=5,
            max_start=2,
            match_epochs=1,
            experts=2,
            expert_batch=64,
        ),
        high_loss=_DIGITS_EXPERTS,
        mkdt=_DIGITS_EXPERTS | dict(outer_steps=30, rate_lr=1e-2, inner_steps=10, match_epochs=1),
        ssl_bilevel=dict(outer_steps=15, outer_batch=128, inner_steps=5),
        pretrain={
            "feature": dict(epochs=300),
            "soft": dict(steps=200, warmup=20),
            "class": dict(epochs=200),
        },
        finetune=dict(steps=100, flip=False),
        kd=dict(lr=1e-3, epochs=200),
    ),
    "small": dict(  # [ours] any folder of images, on two CPU cores
        image_size=64,
        target=dict(
            arch="resnet10",
            width=0.25,
            epochs=20,
            batch_size=128,
            warmup_epochs=2,
            projector_dim=256,
        ),
        distill=dict(
            arch="convnet4",
            num_images=100,
            width=0.25,
            pool_steps=150,
            # 0.1 is tuned for a mean over 512 target features; these targets have 128.
            pool_lr=0.05,
            **_LESS_WORK,
        ),
        **_DC_AT_64
        | dict(
            high_loss=_FEW_EXPERTS | dict(arch="dc_convnet4"),
            mkdt=_FEW_EXPERTS | dict(arch="dc_convnet4", outer_steps=100),
        ),
        pretrain={"feature": dict(epochs=600, lr=0.05)},
    ),
    # [ours] any other set or folder
    "other": dict(image_size=64, distill=_AT_64 | dict(outer_lr=1e-3), **_DC_AT_64),
}

_QUICK = dict(  # [ours] --quick of scripts/run_*.sh: a table in under three hours on two CPU cores
    image_size=32,
    target=dict(width=0.25, epochs=10, warmup_epochs=1, projector_dim=512),
    distill=dict(pool_steps=60, **_LESS_WORK),
    dm=dict(outer_steps=200, real_batch=16),
    dsa=dict(networks=10, outer_loops=2, inner_epochs=5, real_batch=16),
    mtt=dict(
        outer_steps=80, inner_steps=10, inner_batch=100, max_start=2, match_epochs=1, experts=2
    ),
    high_loss=_FEW_EXPERTS,
    mkdt=_FEW_EXPERTS | dict(outer_steps=100),
    frepo=dict(
        outer_steps=700, outer_lr=5e-3, outer_batch=512, pool_size=8, pool_steps=40, pool_lr=3e-3
    ),
    kip=dict(kernel="fc", outer_steps=200, outer_batch=500),
    pretrain={
        "feature": dict(epochs=120),
        "class": dict(epochs=120),
        "soft": dict(steps=240, warmup=20),
    },
)
_QUICK_SETS = {  # the paper's networks, narrower; m is a multiple of the number of classes
    "cifar100": dict(arch="convnet3", width=0.25, num_images=300),
    "tinyimagenet": dict(arch="convnet4", width=0.5, num_images=400),
    "imagenet": dict(arch="convnet4", width=0.5, num_images=1000),
    "imagenette": dict(arch="convnet5", width=0.5, num_images=10),
}
PRESETS |= {
    f"quick-{name}": _QUICK | dict(distill=_QUICK["distill"] | values)
    for name, values in _QUICK_SETS.items()
}

STAGES = {
    "target": TARGET,
    "distill": DISTILL,
    "random": RANDOM,
    "dm": DM,
    "dsa": DSA,
    "mtt": MTT,
    "high_loss": HIGH_LOSS,
    "mkdt": MKDT,
    "frepo": FREPO,
    "kip": KIP,
    "ssl_bilevel": SSL_BILEVEL,
    "finetune": FINETUNE,
    "kd": KD,
}


def preset(name, stage, kind=None, arch=None):
    """Return the settings of a stage under a preset, as a new dict.

    Args:
        name: key of `PRESETS`.
        stage: key of `STAGES`, or pretrain.
        kind: for pretrain, the kind of targets. The kind "source", all images of a source, has the
            recipe for features, with the number of optimiser steps for m distilled images.
        arch: for pretrain, the architecture.
    """
    changes = PRESETS[name].get(stage, {})
    # [ours] all images of a source: only the images differ from a distilled set's
    if stage == "pretrain" and kind == "source":
        recipe, m = preset(name, stage, "feature", arch), preset(name, "distill")["num_images"]
        return recipe | dict(epochs=0, steps=recipe["epochs"] * -(-m // recipe["batch_size"]))
    if stage == "pretrain":
        return PRETRAIN[kind] | changes.get(kind, {}) | changes.get((kind, arch), {})
    values = STAGES[stage] | changes
    same = (
        {} if INHERITED not in values.values() else preset(name, "target") | preset(name, "distill")
    )
    return {key: same[key] if value is INHERITED else value for key, value in values.items()}


def preset_name(name):
    """Return the name of a data set's preset: its own name, or "other"."""
    return name if name in PRESETS else "other"


def image_size(name):
    """Return the height and width of the images, in pixels, under a preset."""
    return PRESETS[name]["image_size"]


def deviations(name, stage, settings, kind=None, arch=None):
    """Compare settings with a preset.

    Args:
        name, stage, kind, arch: as in `preset`.
        settings: dict, name -> value.

    Returns:
        {"stage.setting": [value, value in the preset]} of the settings that differ, which is stored
        with every result. Settings that several stages share are named without the stage. The
        precision is compared with fp32.
    """
    expected = preset(name, stage, kind, arch)
    expected |= dict(image_size=image_size(name), precision="fp32")
    shared = {"image_size"} if stage == "target" else {"image_size", "num_images", "width"}
    return {
        key if key in shared else f"{stage}.{key}": [settings[key], value]
        for key, value in expected.items()
        if settings.get(key, value) != value
    }
