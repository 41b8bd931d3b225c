"""Convert a released distilled set to a distilled.pt that all later stages read.

    python -m distillers import --source tinyimagenet --method krr_st_released --normalised none \\
                                --images x_syn.pt --targets y_syn.pt --target-kind feature
    python -m distillers import --source cifar100 --method mtt_released --normalised source \\
                                --images images_best.pt --targets labels_best.pt
    python -m distillers import --source cifar100 --method dsa_released --normalised source \\
                                --images res_DSA_CIFAR100_ConvNet_10ipc.pt --images-entry data.0.0
    python -m distillers import --source cifar100 --method kip_released --normalised source \\
                                --images kip.npz --target-kind soft

Reads files of torch.save (any suffix) and NumPy (.npy, .npz). No code in these files is executed.
The images are the only array of shape (m, 3, S, S) or (m, S, S, 3) in the file, as floats or bytes.
The targets are in the same file or in a separate one. They are class indices (m,), or an array
(m, d) that --target-kind describes. The command never guesses a fact that the files do not contain.
If a flag is missing, the error says what was found and names the flag.

STATS is one of:
- `source`, the mean and standard deviation of the source's training images, which must be on disk;
- `imagenet`;
- six numbers R,G,B/R,G,B, the mean and standard deviation of pixels in [0, 1].

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png. Check the flags by looking at
images.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from data.archives import ARCHIVES
from data.distilled import TARGET_KINDS, Distilled
from data.images import load_images, normalise
from data.prepare import folder_name
from data.raw import in_data_root
from distillers.method import check_name, save_picture
from utils import cli, files
from utils.errors import UserError
from utils.presets import PRESETS, deviations, preset_name
from utils.run import Run, package_versions

STATISTICS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's
}
KIND_QUESTION = (
    "are they --target-kind feature (of a target network), soft (learned labels) or class "
    "(one-hot)?"
)
VALUES_QUESTION = (
    "are they --normalised none (pixels in [0, 1], used without normalisation), "
    "--normalised STATS (already normalised), or pixels to --normalise STATS? "
    "STATS: source, imagenet, or R,G,B/R,G,B"
)
# NumPy types in files that DC wrote with torch.save. They only construct numbers and arrays.
NUMPY = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
] + [
    (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
    for name, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(1)))
    for core in ("core", "_core")  # NumPy 1 and 2
]


def read(path):
    """Return all arrays of a file as a dict of name to tensor.

    A name joins the keys and positions of the array by dots: `data.0.1`. Floats are converted to
    float32 and integers to int64; bytes remain uint8. Raises UserError if the file does not exist
    or contains anything other than data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix in (".npy", ".npz"):
        try:
            content = np.load(path, allow_pickle=False)
            content = dict(content) if path.suffix == ".npz" else content
        except Exception as error:  # NumPy raises many types for an invalid file
            raise UserError(
                f"{path}: not a NumPy file of plain arrays ({str(error)[:120]})"
            ) from error
    else:
        with torch.serialization.safe_globals(NUMPY):
            content = files.read_data(path, "torch file")
    return dict(_arrays(content, ()))


def _arrays(content, place):
    if isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _arrays(value, (*place, str(key)))
    elif isinstance(content, np.ndarray) and content.ndim and content.dtype.kind in "fiub":
        kind = (
            np.float32
            if content.dtype.kind == "f"
            else np.uint8
            if content.dtype == np.uint8
            else np.int64
        )
        yield ".".join(place), torch.from_numpy(content.astype(kind))
    elif torch.is_tensor(content) and content.ndim and not content.is_complex():
        kind = (
            torch.float32
            if content.is_floating_point()
            else torch.uint8
            if content.dtype == torch.uint8
            else None
        )
        yield ".".join(place), content.detach().to(kind or torch.int64).contiguous()


def select_entry(found, entry, fits, path, flag, wanted):
    """Return (name, tensor) of `entry`, or of the only array for which `fits(name, tensor)` holds.

    Args:
        found: dict of name to tensor.
        entry: a name in `found`, or None.
        fits: predicate of name and tensor.
        path, flag, wanted: file, flag and description for the error message.

    Raises:
        UserError: no array fits, or more than one.
    """
    names = (
        [entry]
        if entry in found
        else [name for name in found if entry is None and fits(name, found[name])]
    )
    if len(names) == 1 and fits(names[0], found[names[0]]):
        return names[0], found[names[0]]
    listed = [f"{name or 'the tensor'} {tuple(found[name].shape)}" for name in names or found][:10]
    fault = (
        f"{len(names)} arrays could be the {wanted}; choose one by {flag}"
        if len(names) > 1
        else f"no {wanted}"
    )
    fault += f" at {flag} {entry}" if entry is not None else ""
    raise UserError(f"{path}: {fault} (found: {', '.join(listed) or 'no array'})")


def read_images(path, entry):
    """Return (name, tensor) of the images, (m, 3, S, S) float32 or uint8."""

    def fits(name, tensor):
        return tensor.ndim == 4 and 3 in (tensor.shape[1], tensor.shape[3])

    name, x = select_entry(
        read(path),
        entry,
        fits,
        path,
        "--images-entry",
        "images of shape (m, 3, S, S) or (m, S, S, 3)",
    )
    return name, x if x.shape[1] == 3 else x.permute(0, 3, 1, 2).contiguous()


def read_targets(args, images_entry, m):
    """Return the targets (m,) or (m, d), from --targets or from the file of the images."""
    beside = images_entry.rpartition(".")[0]
    path = args.targets or args.images

    def fits(name, tensor):
        near = args.targets or args.targets_entry is not None or name.rpartition(".")[0] == beside
        return near and tensor.ndim in (1, 2) and len(tensor) == m

    elsewhere = (
        ""
        if args.targets
        else "; give --targets FILE, or --target-kind none for a set without targets"
    )
    wanted = f"targets for {m} images{elsewhere}"
    y = select_entry(read(path), args.targets_entry, fits, path, "--targets-entry", wanted)[1]
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and not y.is_floating_point() else y


def class_indices(y, path):
    """Return integers (m,) or one-hot rows (m, c) as int64 (m,). Raises UserError otherwise."""
    if y.ndim == 1:
        if not torch.equal(y, y.round() if y.is_floating_point() else y):
            raise UserError(
                f"{path}: one-dimensional targets must be class indices ({describe(y)})"
            )
        return y.long()
    if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
        raise UserError(
            f"{path}: targets are not one-hot ({describe(y)}); give --target-kind soft or feature"
        )
    return y.argmax(1)


def describe(tensor):
    """Describe shape, type and range of a tensor; for images also mean and std per channel."""
    text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel():
        text += f", {tensor.min():.4g} to {tensor.max():.4g}"
    if tensor.ndim == 4:
        for name, values in (
            ("mean", tensor.double().mean((0, 2, 3))),
            ("std", tensor.double().std((0, 2, 3))),
        ):
            text += f", {name} " + " ".join(f"{value:.3f}" for value in values)
    return text


def resolve_statistics(answer, args, image_size):
    """Return the mean and std (3,) that STATS denotes."""
    if answer == "source":
        source = load_images(args.source, "train", image_size, args.data_root)
        return source.mean, source.std
    return tuple(torch.tensor(each) for each in STATISTICS.get(answer, answer))


def parse_statistics(text):
    """Parse STATS, as an argparse type.

    Returns none, source and imagenet unchanged, and R,G,B/R,G,B as ((r, g, b), (r, g, b)).
    """
    if text in (*STATISTICS, "source"):
        return text
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean = std = ()
    if (
        len(mean) != 3
        or len(std) != 3
        or not all(0 <= value <= 1 for value in mean)
        or not all(0 < value <= 1 for value in std)
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not STATS: source, imagenet, or R,G,B/R,G,B for pixels in [0, 1]"
        )
    return mean, std


def build_distilled(args):
    """Return the `Distilled` of the files and flags, without meta.

    Raises UserError if a flag is missing or contradicts the files.
    """
    entry, x = read_images(args.images, args.images_entry)
    kind, y, questions = args.target_kind, torch.empty(len(x), 0), []
    if kind != "none":
        y = read_targets(args, entry, len(x))
        if y.ndim == 1:
            if kind not in (None, "class"):
                raise UserError(
                    f"{args.targets or args.images}: targets {describe(y)} are class indices, not "
                    f"{kind}"
                )
            kind = "class"
        elif kind is None:
            questions.append(f"targets {describe(y)}: {KIND_QUESTION}")
    elif args.targets or args.targets_entry:
        raise UserError("--target-kind none cannot be combined with --targets or --targets-entry")
    answer = args.normalise or args.normalised
    if answer is None:
        questions.append(f"images {describe(x)}: {VALUES_QUESTION}")
    if questions:
        raise UserError(f"{args.images}: the file does not say: {'; '.join(questions)}")
    if x.dtype == torch.uint8:
        if args.normalised not in (None, "none"):
            raise UserError(
                f"{args.images}: bytes are pixels: use --normalised none or --normalise STATS"
            )
        x = x.float() / 255
    if kind != "none":
        y = class_indices(y, args.targets or args.images) if kind == "class" else y.float()
    mean, std = resolve_statistics(answer, args, x.shape[-1])
    x = normalise(x.float(), mean, std) if args.normalise else x.float()
    result = Distilled(x, y, kind, mean, std, {})
    if fault := result.find_fault():
        raise UserError(f"{args.images}: {fault}")
    return result


def source_name(name, root):
    """Return the name that load_images gives a source; a source not on disk keeps its name."""
    if (
        name in ARCHIVES
        or in_data_root(name, root)
        or Path(name).is_dir()
        or Path(name).name != name
    ):
        return folder_name(name, root)
    return name


def main(argv, reserved=(), prog=None):
    """Run the import with the command line `argv`; --method must not be one of `reserved`."""
    args = parse_args(argv, prog)
    check_name("--method", args.method, reserved)
    result = build_distilled(args)
    digests = {
        name: files.digest(path) if (path := getattr(args, name)) else None
        for name in ("images", "targets")
    }
    values = dict(
        source=source_name(args.source, args.data_root),
        mean=result.mean.tolist(),
        std=result.std.tolist(),
    )
    run = Run(
        args.run_root / values["source"] / args.method / f"seed{args.seed}",
        "distilled.pt",
        cli.run_settings(args, **digests, **values),
    )
    if run.finished:
        print(f"{run.artefact} already exists")
        return
    changed = deviations(
        args.preset,
        "distill",
        dict(num_images=len(result.images), image_size=result.images.shape[-1]),
    )
    names = [path.name for path in (args.images, args.targets) if path]
    result.meta |= dict(
        source=values["source"],
        method=args.method,
        seed=args.seed,
        preset=args.preset,
        imported=names,
        deviations=changed,
        settings=run.settings,
        versions=package_versions(),
    )
    save_picture(run.folder / "images.png", result)
    run.finish("distilled", result.content())
    pixels = result.images * result.std[:, None, None] + result.mean[:, None, None]
    outside = 100 * ((pixels < 0) | (pixels > 1)).float().mean()
    print(
        f"wrote {run.artefact} and images.png: {describe(pixels)} as pixels, {outside:.1f} % "
        "outside [0, 1]; "
        f"targets: {result.target_kind} {tuple(result.targets.shape)}"
    )


def parse_args(argv, prog=None):
    parser = cli.folder_parser(__doc__, prog)
    data, run = parser.groups["data"], parser.groups["run"]
    name = preset_name(cli.peek_flag("preset", argv, cli.peek_flag("source", argv)))
    data.add_argument(
        "--source", required=True, help="data set from which the images were distilled"
    )
    run.add_argument(
        "--method",
        required=True,
        help="name of the run folder and of the row in tables, such as dm_released",
    )
    parser.groups["method"].add_argument(
        "--preset",
        choices=[*PRESETS],
        default=name,
        help="preset of later stages (default: that of the source)",
    )
    run.add_argument(
        "--seed",
        type=cli.non_negative_int,
        default=0,
        help="k in the folder name, for several sets of one method",
    )
    data.add_argument(
        "--images", type=Path, required=True, metavar="FILE", help="file with the images"
    )
    data.add_argument(
        "--images-entry", metavar="NAME", help="name of the images' array, such as data.0.0"
    )
    data.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help="file with the targets (default: the file of the images)",
    )
    data.add_argument("--targets-entry", metavar="NAME", help="name of the targets' array")
    data.add_argument(
        "--target-kind", choices=[*TARGET_KINDS], help="kind of two-dimensional targets"
    )
    values = data.add_mutually_exclusive_group()
    values.add_argument(
        "--normalised",
        type=parse_statistics,
        metavar="none|STATS",
        help="how the images in the file are normalised",
    )
    values.add_argument(
        "--normalise",
        type=parse_statistics,
        metavar="STATS",
        help="the images are pixels; normalise them by STATS",
    )
    return parser.parse_args(argv)
