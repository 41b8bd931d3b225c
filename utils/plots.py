"""Shared style of all figures. The colours are those of Okabe and Ito."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#F0E442",
    "#555555",
    "#BBBBBB",
)
MARKERS = "os^Dv<>Px"
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "\\\\\\", "...", "xxx", "---", "ooo", "|||", "+++", "***", "//..")
INK = "#333333"


def save_figure(figure, out):
    """Write a PNG file, byte-identical for equal data, and close the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Software": None})
    plt.close(figure)
    print(f"wrote {out}")


def make_panels(count, width=4.6, height=3.4, most=3):
    """Return a figure and its `count` axes of `width` x `height` inches, at most `most` per row."""
    columns = min(count, most)
    rows = -(-count // columns)
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def label_axis(axis, title=None, x=None, y=None):
    """Set title and labels, draw horizontal grid lines and remove the top and right spines."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def escape(text):
    """Escape dollar signs, so that matplotlib does not read `text` as mathematics."""
    return str(text).replace("$", r"\$")


def draw_legend(figure, axes, columns=3):
    """Draw one legend below all `axes`, with each label once."""
    handles = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
