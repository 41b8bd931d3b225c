"""Write one HTML page about all runs in a folder: settings, curves, images, t-SNE and tables.

    python -m analysis.report runs                    # writes runs/report.html
    python -m analysis.report runs --out page.html

The page also covers unfinished runs. It has the tables of `analysis.tables`. For each target
network and distilled set it has:
- its command, and links to its files;
- the settings that differ from the preset;
- the curves of the log;
- the initial and the distilled images;
- a t-SNE, for the first sets only, if the target network and the prepared source are on disk;
- the networks that were trained on it.

The page is complete without the linked files. Damaged files are listed and left out. The command
changes no run, prepares no data and downloads nothing. Ten sets take half a minute and less than 10
MB.
"""

import base64
import html
import io
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from analysis import figures, tables
from data.distilled import load_distilled
from data.images import load_prepared_images
from distillers import registry
from evaluation import results
from models.target import load_target
from utils import cli, files
from utils.errors import UserError
from utils.presets import PRESETS, PRETRAIN, deviations, preset_name
from utils.run import read_log, shareable_command

LINKED = ("distilled.pt", "target.pt", "images.png", "config.json", "log.jsonl")
ARTEFACTS = ("target.pt", "distilled.pt", "model.pt", "expert.pt")
MADE_BY = {"pretrain_target.py": "target", "finetune.py": "finetune", "kd.py": "kd"} | {
    entry.command.split()[-1]: entry.stage for entry in registry.ENTRIES if entry.module
}  # last word of a command -> stage of its settings
FEW_SETS = 12  # with at most so many sets, each has more images, a t-SNE, and is unfolded
FEW_FAULTS = 8  # with at most so many, they are unfolded
MOST_IMAGES, FEWER_IMAGES = 40, 10  # per set
MOST_PIXELS = 64  # side of an image
MOST_CURVES = 8  # per panel
MOST_POINTS = 400  # per part of a t-SNE
MEASURED = {
    "distance_from_initial": "distance of the images from the initial ones (root mean square, in "
    "standard deviations of the source)",
    "outer_loss_initial": "outer loss of the initial images",
    "outer_loss_distilled": "outer loss of the distilled images",
    "outer_loss_initial_others": "outer loss of the initial images on images that were left out",
    "outer_loss_distilled_others": "outer loss of the distilled images on images that were left "
    "out",
    "objective_initial": "objective of the initial images",
    "objective_distilled": "objective of the distilled images",
}
STYLE = """
:root { color-scheme: light dark;
        --ink: #222; --page: #fff; --faint: #666; --line: #ccc; --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --page: #161616; --faint: #999; --line: #444; --box: #222; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       margin: 0 auto;
       max-width: 1200px; padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.faint { color: var(--faint); font-size: .85rem; }
.wide { overflow-x: auto; margin: .5rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .7rem .2rem 0; text-align: left;
         vertical-align: top; }
.numbers td:nth-child(n+2), .numbers th { white-space: nowrap; overflow-wrap: normal; }
.numbers td:first-child { min-width: 9rem; overflow-wrap: normal; }
details { margin: .4rem 0; } summary { cursor: pointer; }
.set { border: 1px solid var(--line); border-radius: 6px; padding: .3rem .9rem; margin: .8rem 0; }
.set > summary { font-weight: 600; }
.state { font-weight: 400; color: var(--faint); }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin: .6rem 0; }
figure { margin: 0; max-width: 100%; } figcaption { font-size: .8rem; color: var(--faint); }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 3px; }
img.pixels { width: 520px; image-rendering: pixelated; }
img.plot { width: 340px; }
@media print {
  body { font-size: 11px; max-width: none; }
  .set { border: 0; padding: 0; } .wide { overflow: visible; }
  .numbers td, .numbers th { white-space: normal !important; }
  img.plot { width: 220px; } img.pixels { width: 320px; }
  figure, tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; }
}
"""


@dataclass
class Folder:
    """A run.

    Attributes:
        path: its folder.
        name: its path relative to the run root.
        config: content of config.json; None if damaged.
        artefact: name of its artefact; None if unfinished.
        last: last line of its log, or {}.
        below: runs on its artefact.
    """

    path: Path
    name: str
    config: dict | None
    artefact: str | None
    last: dict
    below: list = field(default_factory=list)

    @property
    def settings(self):
        return (self.config or {}).get("settings", {})

    @property
    def state(self):
        if self.artefact:
            return "finished"
        if not self.last:
            return "unfinished, no log yet"
        of = f" of {number(self.last.get('of'))}" if "of" in self.last else ""
        return f"unfinished: {self.last['phase']}, step {number(self.last['step'])}{of}"

    def changes(self, default):
        """Return the settings that differ from the preset: {setting: [value, preset's value]}.

        `default` is the preset of runs whose settings name none.
        """
        command = [*map(str, (self.config or {}).get("command", [])), "", ""]
        made_by = command[1] if command[0] == "python -m distillers" else Path(command[0]).name
        settings, kind = self.settings, None
        stage, name = MADE_BY.get(made_by), settings.get("preset") or default
        if made_by == "pretrain.py":
            stage = "pretrain"
            losses = {recipe["loss"]: kind for kind, recipe in PRETRAIN.items()}
            kind = "source" if settings.get("source") else losses.get(settings.get("loss"))
        elif stage in ("finetune", "kd"):
            name = preset_name(settings.get("dataset"))
        if not stage or name not in PRESETS or (stage == "pretrain" and not kind):
            return {}
        found = deviations(name, stage, settings, kind, settings.get("arch"))
        return {key.removeprefix(f"{stage}."): pair for key, pair in found.items()}


def number(value):
    return f"{value:,}" if figures.is_number(value) else str(value)


def text(value):
    return html.escape(str(value))


class Page:
    """The page of a run root.

    `faults` lists the reasons for what is left out. `page_folder` is the folder of the HTML file.
    """

    def __init__(self, root, data_root, page_folder):
        self.root, self.data_root, self.page_folder = root, data_root, page_folder
        self.faults, self._real = [], {}

    def attempt(self, function, *arguments):
        """Call a function; on UserError or OSError, record the fault and return None."""
        try:
            return function(*arguments)
        except (UserError, OSError) as error:
            self.faults.append(str(error))

    def runs(self):
        """Return all `Folder`s by name. Runs on another's artefact are also in its `below`."""
        found = {}
        for config in sorted(
            self.root.rglob("config.json"), key=lambda path: tables.natural_key(str(path))
        ):
            path = config.parent
            content = self.attempt(files.read_json, config, "settings file")
            content = content if content and isinstance(content.get("settings"), dict) else None
            artefact = next((name for name in ARTEFACTS if (path / name).is_file()), None)
            log = [
                line
                for line in self.attempt(read_log, path) or []
                if figures.is_number(line["step"])
            ]
            run = Folder(
                path, str(path.relative_to(self.root)), content, artefact, log[-1] if log else {}
            )
            found[run.name] = run
            above = [found[str(each)] for each in Path(run.name).parents if str(each) in found]
            if above:
                above[-1].below.append(run)  # the outermost run
        return found

    def results(self):
        """Yield the valid lines of all results.jsonl."""
        for path in sorted(self.root.rglob("results.jsonl")):
            for line in self.attempt(results.read, path) or ():
                if fault := find_fault(line):
                    self.faults.append(f"{path}: result with {fault}")
                else:
                    yield line

    def panels(self, found):
        """Yield an image for each panel of `found`, {title: {name: [(step, value)]}}."""
        for title, lines in found.items():
            shown = dict(itertools.islice(lines.items(), MOST_CURVES))
            figure, axis = plt.subplots(figsize=(3.6, 2.7), layout="constrained")
            figures.draw_curves(axis, title, shown, [*shown])
            axis.title.set_size(10)
            if len(shown) > 1:
                axis.legend(frameon=False, fontsize=7)
            more = f" ({len(shown)} of {len(lines)} runs)" if len(lines) > len(shown) else ""
            yield image_html(render_figure(figure), f"{title}{more}", more)

    def networks(self, runs, default):
        """Yield loss curves for each kind of run on a set, and a table with a row for each run."""
        losses = {}
        for run in runs:
            kind = re.sub(r"seed\d+", "seed*", run.name)
            for (phase, scalar), lines in (
                self.attempt(figures.read_curves, [run.path]) or {}
            ).items():
                if scalar == "loss":
                    own = " ".join(re.findall(r"seed\d+", run.name)[-1:]) or run.path.name
                    title = short_title(kind, phase)
                    losses.setdefault(title, {})[own if own not in losses[title] else run.name] = (
                        lines[run.path]
                    )
        yield f'<div class="pictures">{"".join(self.panels(losses))}</div>'
        rows = []
        for run in runs:
            changed = ", ".join(
                f"{key} {here} ({there})" for key, (here, there) in run.changes(default).items()
            )
            loss = run.last.get("loss")
            rows.append(
                [run.name, run.state, f"{loss:.4g}" if figures.is_number(loss) else "", changed]
            )
        yield plain_table(
            ["run", "state", "last loss", "settings that differ from the preset (preset's)"], rows
        )

    def set(self, run, many):
        """Yield the section of a target network or distilled set; `many`: for many sections."""
        default = preset_name(Path(run.name).parts[0])
        changed = run.changes(default)
        yield from self.files(run)
        if run.config is None:
            yield "<p>Its settings cannot be read.</p>"
        elif changed:
            preset = text(run.settings.get("preset", default))
            yield f"<p>Settings that differ from the preset {preset}:</p>"
            yield plain_table(
                ["setting", "run", "preset"], [[key, *pair] for key, pair in changed.items()]
            )
        elif run.artefact in (None, "distilled.pt", "target.pt"):
            preset = text(run.settings.get("preset", default))
            yield f"<p>All settings are those of the preset {preset}.</p>"
        others = [[key, value] for key, value in run.settings.items() if key not in changed]
        if others:
            inside = plain_table(["setting", "value"], others)
            summary = f"{len(others)} {'other ' if changed else ''}settings"
            yield f"<details><summary>{summary}</summary>{inside}</details>"
        log = self.attempt(figures.read_curves, [run.path]) or {}
        curves = {
            f"{phase}: {scalar}": {"": lines[run.path]} for (phase, scalar), lines in log.items()
        }
        yield f'<div class="pictures">{"".join(self.panels(curves))}</div>'
        if run.artefact == "distilled.pt":
            if distilled := self.attempt(load_distilled, run.path / run.artefact):
                yield from self.images(run, distilled, many)
        elif (run.path / "images.png").is_file() and (
            shown := self.attempt(shrink_png, run.path / "images.png")
        ):
            yield image_html(shown, *["images so far"] * 2, look="pixels")
        if run.below:
            inside = "".join(self.networks(run.below, run.settings.get("preset") or default))
            yield f"<details><summary>{len(run.below)} runs on it</summary>{inside}</details>"

    def files(self, run):
        """Yield the command of a run, and links to its files relative to the page."""
        if run.config and (command := self.attempt(shareable_command, run.path)):
            yield f"<p><code>{text(command)}</code></p>"
        place = quote(Path(os.path.relpath(run.path, self.page_folder)).as_posix())
        names = [name for name in LINKED if (run.path / name).is_file()]
        if names:
            links = ", ".join(f'<a href="{place}/{name}">{name}</a>' for name in names)
            yield f'<p class="faint">Files: {links}</p>'

    def images(self, run, distilled, many):
        """Yield the measurements of a distilled set, its images, and its t-SNE."""
        meta, size = distilled.meta, distilled.images.shape[-1]
        rows = [
            ["images", len(distilled.images)],
            ["image size in pixels", size],
            ["targets", distilled.target_kind],
        ]
        rows += [
            [said, f"{meta[name]:.4f}"]
            for name, said in MEASURED.items()
            if figures.is_number(meta.get(name))
        ]
        yield plain_table(["", ""], rows)
        source, why = None, ""
        try:
            source = load_prepared_images(str(meta.get("source")), size, self.data_root)
            if source.fingerprint != run.settings.get("fingerprint"):
                source, why = None, f"{source.name} has changed since the set was distilled"
        except (UserError, OSError) as error:
            why = str(error)
        if meta.get("initial") is None and "fingerprint" not in run.settings:
            why = ""
        pictures = []
        for title, pixels in figures.initial_and_distilled(
            distilled, source, FEWER_IMAGES if many else MOST_IMAGES
        ):
            title = (
                f"{title} ({len(pixels)} of {len(distilled.images)})"
                if len(pixels) < len(distilled.images)
                else title
            )
            pictures.append(image_html(image_grid(pixels), title, title, look="pixels"))
        if source and distilled.target_kind == "feature" and not many:
            try:
                pictures.append(
                    image_html(self.tsne(run, distilled, source), *["t-SNE of the features"] * 2)
                )
            except (UserError, OSError) as error:
                why = str(error)
        yield f'<div class="pictures">{"".join(pictures)}</div>'
        if why:
            left_out = "Initial images or t-SNE left out"
            yield f'<p class="faint">{left_out}: {text(why)}.</p>'

    def tsne(self, run, distilled, source):
        """Return a t-SNE plot as PNG bytes, with the target network of the set."""
        home, wanted = run.path.parents[1], run.settings.get("target_network")
        path = next(
            (each for each in sorted(home.glob("*/*/target.pt")) if files.digest(each) == wanted),
            None,
        )
        if path is None:
            raise UserError(f"{home}: target network not found")
        target = load_target(path, source, torch.device("cpu"), "fp32")
        if wanted not in self._real:
            self._real[wanted] = figures.sample_features(source, target, MOST_POINTS)
        few = type(distilled)(
            **vars(distilled)
            | {name: getattr(distilled, name)[:MOST_POINTS] for name in ("images", "targets")}
        )
        return render_figure(
            figures.draw_tsne(few, source, target, self._real[wanted], size=(3.6, 3.9))
        )

    def body(self):
        """Yield the body of the page after its heading."""
        lines, runs = [*self.results()], self.runs()
        if not runs and not lines:
            raise UserError(f"{self.root}: contains no runs (no config.json, no results.jsonl)")
        below = {each.name for run in runs.values() for each in run.below}
        sets, rest = (
            {},
            {},
        )  # by the first part of the name; other runs by their parent folder
        for run in runs.values():
            if (
                run.artefact in ("target.pt", "distilled.pt")
                or {"num_images", "projector_dim"} & run.settings.keys()
            ):
                sets.setdefault(str(Path(run.name).parents[1]), []).append(run)
            elif run.name not in below:
                rest.setdefault(str(Path(run.name).parent), []).extend([run, *run.below])
        count = sum(map(len, sets.values()))
        tables_shown, sections = [table(*each[1:]) for each in tables.make_blocks(lines)], []
        for source, these in sets.items():
            sections.append(f"<h2>{text(source)}</h2>")
            for run in sorted(
                these,
                key=lambda run: (
                    Path(run.name).parts[-2] != "target",
                    tables.natural_key(run.name),
                ),
            ):
                label = Path(run.name).parts[-2]
                title = text(registry.title(label))
                title += f" <span class=state>{text(run.name)}, {text(run.state)}</span>"
                opened = " open" if count <= FEW_SETS else ""
                inside = "".join(self.set(run, count > FEW_SETS))
                sections.append(
                    f'<details class="set"{opened}><summary>{title}</summary>{inside}</details>'
                )
        if rest:
            sections.append("<h2>Networks without a distilled set</h2>")
        for folder, these in rest.items():
            inside = "".join(
                self.networks(these, preset_name(Path(folder).parts[0] if folder != "." else None))
            )
            sections.append(
                f'<details class="set"><summary>{text(folder)} <span class=state>{len(these)} '
                "runs</span>"
                f"</summary>{inside}</details>"
            )
        unfinished = [run for run in runs.values() if not run.artefact]
        counts = f"{len(runs)} runs ({len(unfinished)} unfinished), {len(lines)} results."
        yield f"<p>{counts}</p>"
        if self.faults:
            faults = [*dict.fromkeys(self.faults)]
            named = "".join(f"<li>{text(fault)}</li>" for fault in faults)
            opened = " open" if len(faults) <= FEW_FAULTS else ""
            yield f"<h2>Left out</h2><details{opened}><summary>{len(faults)} faults</summary>"
            yield f"<ul>{named}</ul></details>"
        yield "<h2>Results</h2>" + ("".join(tables_shown) or "<p>None yet.</p>")
        yield from sections


def find_fault(line):
    """Describe why a dict is not a valid result; None if it is valid."""
    fid, kd = line.get("protocol") == "fid", line.get("protocol") == "kd"
    words = ["method", "dataset", "protocol", *(["network", "source"] if fid else ["arch"])]
    numbers = ["fid"] if fid else ["accuracy", "width", "image_size"]
    optional = {"source": str} | dict.fromkeys(
        ("num_images", "distilled_seed", "labels_per_class", "label_draws"), int
    )
    images, changed = line.get("images", {}), line.get("deviations", {})
    faults = [name for name in words if not isinstance(line.get(name), str)]
    faults += [name for name in numbers if not figures.is_number(line.get(name))]
    faults += [
        name
        for name, kind in optional.items()
        if not isinstance(line.get(name), (kind, type(None)))
    ]
    faults += ["label_fraction"] if not figures.is_number(line.get("label_fraction") or 0) else []
    if not isinstance(changed, dict) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in changed.values()
    ):
        faults.append("deviations")
    whole = isinstance(images, dict) and {"source", "method", "seed", "num_images"} <= images.keys()
    if (kd or "images" in line) and not (whole and isinstance(images["method"], str)):
        faults.append("images")
    needed = ["source", "distilled_seed", "num_images"]  # required, but may be null
    faults += [name for name in needed if name not in line and name not in faults]
    return f"missing or invalid {', '.join(faults)}" if faults else None


def short_title(kind, phase):
    """Return the title of a loss panel: the last two parts of the path without seeds."""
    parts = [part for part in Path(kind).parts if part != "seed*"]
    return f"{' '.join(parts[-2:]).replace('_seed*', '')}: {phase}"


def table(heading, rows):
    """Return rows of `tables.Cell`s as an HTML table with a heading."""
    said = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text(heading))
    cells = [
        [f"<strong>{text(cell.text)}</strong>" if cell.best else text(cell.text) for cell in row]
        for row in rows
    ]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    lines = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:]
    )
    inside = f'<table class="numbers"><tr>{head}</tr>{lines}</table>'
    return f'<p>{said}</p><div class="wide">{inside}</div>'


def plain_table(heads, rows):
    head = "".join(f"<th>{text(each)}</th>" for each in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{text(each)}</td>" for each in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table>{f"<tr>{head}</tr>" if any(heads) else ""}{lines}</table></div>'
    )


def image_html(content, alt, caption="", look="plot"):
    """Return PNG bytes as an embedded HTML image."""
    data = base64.b64encode(content).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    source = f"data:image/png;base64,{data}"
    return f'<figure><img class="{look}" alt="{text(alt)}" src="{source}">{below}</figure>'


def render_figure(figure):
    """Return a matplotlib figure as PNG bytes, reproducibly."""
    out = io.BytesIO()
    figure.savefig(out, dpi=130, metadata={"Software": None})
    plt.close(figure)
    out.seek(0)
    return compress_png(Image.open(out).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE))


def compress_png(image):
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def image_grid(pixels):
    """Return images (k, 3, S, S) in [0, 1] as PNG bytes, ten per row.

    Images larger than `MOST_PIXELS` are reduced.
    """
    if pixels.shape[-1] > MOST_PIXELS:
        pixels = F.interpolate(pixels, size=(MOST_PIXELS, MOST_PIXELS), mode="area")
    return compress_png(
        to_pil_image(make_grid(pixels, nrow=min(10, len(pixels)), padding=1, pad_value=1.0))
    )


def shrink_png(path):
    """Return a picture on disk as PNG bytes, reduced to the width shown."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
            image.thumbnail((520, 520))
            return compress_png(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable picture") from error


def render_page(root, data_root, folder):
    """Return the page as HTML text, with links relative to its `folder`.

    Raises UserError if the run root contains no runs.
    """
    title = text(f"Runs in {root}")
    body = "\n".join(Page(root, data_root, folder).body())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def main(argv):
    args = parse_args(argv)
    if not args.run_root.is_dir():
        raise UserError(f"{args.run_root}: no such folder")
    out = args.out or args.run_root / "report.html"
    content = render_page(args.run_root, args.data_root, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, content)
    print(f"wrote {out} ({len(content) / 1e6:.1f} MB)")


def parse_args(argv):
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "run_root",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="folder of runs (default: runs)",
    )
    parser.add_argument(
        "--out", type=Path, help="HTML file to write (default: RUN_ROOT/report.html)"
    )
    cli.add_data_root(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
