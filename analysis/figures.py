"""Figures of sets and results. Each command writes one PNG file.

    python -m analysis.figures images --out images.png \\
        --distilled runs/cifar100/krr_st/seed0/distilled.pt
    python -m analysis.figures tsne   --distilled runs/cifar100/krr_st/seed0/distilled.pt \\
        --target-network runs/cifar100/target/seed0/target.pt --out tsne.png
    python -m analysis.figures curves --out curves.png runs/cifar100/krr_st/seed0 ...
    python -m analysis.figures bars   --out bars.png runs     # Figure 3 of the paper
    python -m analysis.figures count  --out count.png runs    # accuracy by m
    python -m analysis.figures gain   --out gain.png runs/targets

images: initial and distilled images (Figures 2 and 4 to 6). tsne: g_phi(X_s), Y_s and g_phi(X_t) in
two dimensions (Figure 2; van der Maaten and Hinton, 2008). gain: the gain of KRR-ST over random
images with the target's features against the gain of all images of the source, with a point for
each target network of scripts/run_targets.sh. Without folders, bars, count and gain use the results
in analysis/. The colours are those of Okabe and Ito; markers, dashes and
hatches distinguish the series without colour.
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torchvision.utils import make_grid

from analysis import compare, tables
from analysis.tables import ORACLE
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled
from data.images import load_images, normalise, to_float
from distillers import registry
from evaluation import results
from experiments.tables import TABLES
from models.target import load_target
from utils import cli
from utils.errors import UserError
from utils.plots import (
    COLOURS,
    DASHES,
    HATCHES,
    INK,
    MARKERS,
    draw_legend,
    escape,
    label_axis,
    make_panels,
    save_figure,
)
from utils.run import read_log


def load_source(args, distilled):
    return load_images(
        args.source or distilled.meta["source"], "train", distilled.images.shape[-1], args.data_root
    )


def describe_origin(distilled):
    method = distilled.meta.get("method")
    return f"{registry.title(method)}, {distilled.meta.get('source')}"


def initial_and_distilled(distilled, source, most):
    """Return [(title, pixels (k, 3, S, S))] of the first `most` initial and distilled images.

    The initial images are left out if they or their `ImageSet` `source` are unknown, or if the
    images have not moved.
    """
    pixels, meta = distilled.pixels()[:most], distilled.meta
    initial = meta.get("initial")
    shown = [("distilled", pixels)]
    if initial is not None and source is not None and meta.get("distance_from_initial") != 0:
        shown.insert(0, ("initial", to_float(source.pixels[torch.tensor(initial[:most])])))
    return shown


def images(args):
    """Draw the first `args.most` distilled images, and their initial images if known."""
    distilled = load_distilled(args.distilled)
    count = len(distilled.images)
    most = min(args.most or count, count)
    known = distilled.meta.get("initial") is not None
    shown = initial_and_distilled(distilled, load_source(args, distilled) if known else None, most)
    across = min(most, 10 if most <= 100 else 25)
    down = -(-most // across)
    side = 0.55 if most <= 100 else 0.3
    figure, axes = plt.subplots(
        1,
        len(shown),
        squeeze=False,
        layout="constrained",
        figsize=(len(shown) * (side * across + 0.2), side * down + 0.7),
    )
    for axis, (title, part) in zip(axes[0], shown, strict=True):
        axis.imshow(make_grid(part, nrow=across, padding=2, pad_value=1.0).permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    origin = escape(describe_origin(distilled))
    figure.suptitle(f"{origin}: {most} of {count} images" if most < count else origin, fontsize=10)
    save_figure(figure, args.out)


def sample_features(source, target, count):
    """Return g_phi (count, d_y) of `count` fixed random images of the source."""
    index = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]
    return torch.cat([target.features_at(source, part) for part in index.split(512)])


def draw_tsne(distilled, source, target, real, size=(6.4, 5.6), title=""):
    """Draw a joint embedding of `real` = g_phi(X_t) (n, d_y), of g_phi(X_s), and of Y_s.

    `size` is in inches. Returns a matplotlib figure.
    """
    from sklearn.manifold import TSNE  # imported here, because it takes a second

    x_syn = normalise(
        distilled.images * distilled.std[:, None, None] + distilled.mean[:, None, None],
        source.mean,
        source.std,
    )
    made = torch.cat([target.features(part) for part in x_syn.split(512)])
    parts = [(r"$g_\phi(X_t)$, real images", real), (r"$g_\phi(X_s)$, distilled images", made)]
    if distilled.target_kind == "feature" and distilled.targets.shape[1] == real.shape[1]:
        parts.append((r"$Y_s$, learned targets", distilled.targets))
    features = torch.cat([part for _, part in parts])
    perplexity = min(30, (len(features) - 1) / 3)
    places = TSNE(2, init="pca", perplexity=perplexity, random_state=0).fit_transform(
        features.numpy()
    )
    looks = (
        dict(c="#AAAAAA", marker="o", s=9, linewidths=0),
        dict(c=COLOURS[0], marker="o", s=26, edgecolors="white", linewidths=0.5),
        dict(c=COLOURS[4], marker="^", s=30, edgecolors=INK, linewidths=0.5),
    )
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    for (name, part), where, look in zip(
        parts, torch.from_numpy(places).split([len(p) for _, p in parts]), looks, strict=False
    ):
        axis.scatter(*where.T.numpy(), label=f"{name} ({len(part):,})", **look)
    axis.set(xticks=[], yticks=[])
    if title:
        axis.set_title(escape(title))
    figure.legend(
        loc="outside lower center",
        ncols=len(parts) if size[0] > 5 else 1,
        frameon=False,
        fontsize=9,
    )
    return figure


def tsne(args):
    """Draw a joint t-SNE of features of real and distilled images and of the learned targets."""
    distilled = load_distilled(args.distilled)
    source = load_source(args, distilled)
    target = load_target(args.target_network, source, torch.device("cpu"), "fp32")
    real = sample_features(source, target, args.real)
    save_figure(
        draw_tsne(distilled, source, target, real, title=f"{describe_origin(distilled)}, t-SNE"),
        args.out,
    )


def read_curves(folders):
    """Return {(phase, scalar): {folder: [(step, value)]}} of the logs, with the loss first.

    Values that are not finite numbers are left out.
    """
    found = defaultdict(dict)
    for folder in folders:
        for line in read_log(folder):
            for name in line.keys() - {"phase", "step", "of", "seconds"}:
                if is_number(line[name]) and is_number(line["step"]):
                    found[str(line["phase"]), name].setdefault(folder, []).append(
                        (line["step"], line[name])
                    )
    phases = list(dict.fromkeys(phase for phase, _ in found))
    return {
        key: found[key]
        for key in sorted(found, key=lambda key: (phases.index(key[0]), key[1] != "loss", key[1]))
    }


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def draw_curves(axis, title, lines, names):
    """Draw `lines`, a dict of name to [(step, value)].

    The scale is logarithmic if the values span more than a factor of 20. The index of a name in
    `names` determines its style.
    """
    for name, points in lines.items():
        i = names.index(name)
        axis.plot(
            *zip(*points, strict=True),
            color=COLOURS[i % len(COLOURS)],
            label=escape(name),
            linewidth=1.4,
            linestyle=DASHES[i % len(DASHES)],
            marker="." if len(points) < 10 else "",
        )
    label_axis(axis, escape(title), "step")
    values = [value for points in lines.values() for _, value in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale("log")


def curves(args):
    """Draw all scalars of the logs by step, with a panel for each phase and scalar."""
    found = read_curves(args.folders)
    if not found:
        raise UserError(f"{', '.join(map(str, args.folders))}: no log.jsonl with numbers")
    figure, axes = make_panels(len(found))
    for axis, ((phase, scalar), lines) in zip(axes, found.items(), strict=True):
        draw_curves(axis, f"{phase}: {scalar}", lines, args.folders)
    if len(args.folders) > 1:
        draw_legend(figure, axes, columns=1)
    save_figure(figure, args.out)


def load_results(args):
    return tables.gather_results(args.folders) if args.folders else results.read(tables.RESULTS)


def bars(args):
    """Draw accuracy by method and data set, with a panel for each network (Figure 3)."""
    lines, chosen = load_results(args), []
    for table in tables.all_tables():
        if table.name in args.tables.split(","):
            chosen += [(table, *part) for part in tables.split_by_scale(table, lines)]
    if not chosen:
        raise UserError(f"no results for {args.tables} yet; see scripts/run_architectures.sh")
    methods = sorted({method for *_, rows in chosen for method, *_ in rows}, key=registry.order)
    figure, axes = make_panels(len(chosen), width=6.4, height=3.2, most=2)
    for axis, (_, settings, columns, rows) in zip(axes, chosen, strict=True):
        wide = 0.8 / len(rows)
        for i, (method, own, cells) in enumerate(rows):
            present = [j for j, column in enumerate(columns) if column in cells]
            values = [cells[columns[j]] for j in present]
            means, deviations = (list(map(f, values)) for f in (statistics.mean, statistics.pstdev))
            look = methods.index(method)
            axis.bar(
                [j + (i - (len(rows) - 1) / 2) * wide for j in present],
                means,
                wide,
                yerr=deviations,
                color=COLOURS[look % len(COLOURS)],
                hatch=HATCHES[look % len(HATCHES)],
                edgecolor=INK,
                linewidth=0.5,
                error_kw=dict(lw=0.8, capsize=1.5),
                label=registry.title(method) + (f" ({own})" if own else ""),
            )
        axis.set_xticks(range(len(columns)), [target for _, target in columns])
        label_axis(
            axis,
            columns[0][0] + ("" if settings is None else " (reduced scale)"),
            y="accuracy in %",
        )
    draw_legend(figure, axes)
    save_figure(figure, args.out)


def count(args):
    """Draw accuracy by the number of distilled images.

    There is a panel for each source, data set, network and protocol.
    """
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    levels = defaultdict(
        lambda: defaultdict(list)
    )  # without a number of images: no pre-training, and the oracle
    for line in load_results(args):
        if line["protocol"] in ("fid", "kd"):
            continue
        network = (line["arch"], line["width"], line["image_size"])
        panel = (line["dataset"], tables.other_column(line), network)
        if line["method"] == "scratch":
            levels[panel]["scratch"].append(line["accuracy"])
        elif line["method"] == ORACLE:
            levels[(line["source"], *panel)][ORACLE].append(line["accuracy"])
        elif line["num_images"]:
            found[(line["source"], *panel)][line["method"]][line["num_images"]].append(
                line["accuracy"]
            )
    drawn = sorted(
        key for key, methods in found.items() if any(len(points) > 1 for points in methods.values())
    )
    if not drawn:
        raise UserError(
            "no method has results for two numbers of images yet; see distill.py --num-images"
        )
    methods = sorted({method for key in drawn for method in found[key]}, key=registry.order)
    figure, axes = make_panels(len(drawn), most=2)
    for axis, key in zip(axes, drawn, strict=True):
        for method, points in sorted(found[key].items(), key=lambda item: registry.order(item[0])):
            look, x = methods.index(method), sorted(points)
            axis.errorbar(
                x,
                [statistics.mean(points[m]) for m in x],
                [statistics.pstdev(points[m]) for m in x],
                color=COLOURS[look % len(COLOURS)],
                marker=MARKERS[look % len(MARKERS)],
                capsize=2,
                linestyle=DASHES[look % len(DASHES)],
                label=registry.title(method),
            )
        for method, gap in (("scratch", 3), (ORACLE, 1)):
            if level := levels[key[1:]][method] or levels[key][method]:
                axis.axhline(
                    statistics.mean(level),
                    color=INK,
                    linewidth=1,
                    linestyle=(0, (1, gap)),
                    label=registry.title(method),
                )
        axis.set_xscale("log")
        ticks = sorted({m for points in found[key].values() for m in points})
        axis.set_xticks(ticks, map(str, ticks), minor=False)
        axis.minorticks_off()
        source, target, protocol, (arch, width, size) = key
        label_axis(
            axis,
            f"{source} to {target} ({protocol})",
            f"distilled images, {tables.label(arch, width)} at {size} px",
            "accuracy in %",
        )
    draw_legend(figure, axes)
    save_figure(figure, args.out)


def read_gains(lines, source):
    """Return {target network: {method: gains}} of a `Source` in the table `targets`.

    The gains are the differences of accuracy from random images with the target's features, means
    over data sets, for each distillation of krr_st and for each pre-training of full.
    """
    table = TABLES["targets"]
    probed = [each for each in lines if each["protocol"] == "linear"]
    probed = [line for line in probed if compare.describes(table, line)]
    found = compare.group_by_seeds(probed, by_target=True)
    means = {
        method: values
        for method, columns in found.items()
        for (_, dataset), values in columns.items()
        if dataset == compare.MEAN
    }
    gains = {}
    for target in source.targets:
        base = means.get(f"random_features.{target.name}", {})
        each = {
            method: compare.paired_differences(means.get(f"{method}.{target.name}", {}), base)
            for method in ("krr_st", ORACLE)
        }
        if all(each.values()):
            gains[target.name] = each
    return gains


def half_width(values):
    """Return half the width of the 95 % interval of the mean; 0 for one value."""
    low, high = compare.interval(values) or (0.0, 0.0)
    return (high - low) / 2


def gain(args):
    """Draw the gain of KRR-ST over random images against that of all images of the source."""
    (source,) = TABLES["targets"].sources
    stored = compare.results_file("targets")
    lines = tables.gather_results(args.folders) if args.folders else results.read(stored)
    gains = read_gains([line for line in lines if line["source"] == source.name], source)
    if not gains:
        raise UserError("no results yet; see scripts/run_targets.sh")
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for i, (name, each) in enumerate(gains.items()):
        means = [statistics.mean(each[method]) for method in (ORACLE, "krr_st")]
        errors = [half_width(each[method]) for method in (ORACLE, "krr_st")]
        axis.errorbar(
            means[0],
            means[1],
            xerr=errors[0],
            yerr=errors[1],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="",
            capsize=2,
            label=escape(name.replace("_", " ")),
        )
    axis.axhline(0, color=INK, linewidth=0.8)
    label_axis(
        axis,
        "linear probe, difference from random images with features",
        "all images of the source, in points",
        "KRR-ST, in points",
    )
    draw_legend(figure, [axis])
    save_figure(figure, args.out)


def main(argv):
    args = parse_args(argv)
    dict(images=images, tsne=tsne, curves=curves, bars=bars, count=count, gain=gain)[args.figure](
        args
    )


def parse_args(argv):
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(
        dest="figure", required=True, parser_class=lambda **kw: cli.Parser(__doc__)
    )
    for name in ("images", "tsne"):
        one = commands.add_parser(name)
        cli.add_data_root(one)
        one.add_argument(
            "--distilled", type=distilled_file, required=True, metavar="SET", help=DISTILLED_HELP
        )
        one.add_argument(
            "--source",
            help="data set or folder of the source (default: the one named in the set; required "
            "if that is a folder)",
        )
        if name == "images":
            one.add_argument(
                "--most",
                type=cli.non_negative_int,
                default=100,
                help="number of images to show; 0: all (default: 100)",
            )
        else:
            one.add_argument(
                "--target-network", type=Path, required=True, help="target.pt of the source"
            )
            one.add_argument(
                "--real",
                type=cli.positive_int,
                default=2000,
                help="number of real images (default: 2000)",
            )
    for name in ("curves", "bars", "count", "gain"):
        one = commands.add_parser(name)
        one.add_argument("folders", nargs="+" if name == "curves" else "*", type=Path)
        if name == "bars":
            one.add_argument(
                "--tables", default="table5,table6,table7,table8", help="default: %(default)s"
            )
    for one in commands.choices.values():
        one.add_argument("--out", type=Path, required=True, help="PNG file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
