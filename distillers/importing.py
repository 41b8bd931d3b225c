"""A set that others distilled and released becomes a distilled.pt, which every later stage reads.

    python -m distillers import --source tinyimagenet --method krr_st_released --normalised none \\
                                --images x_syn.pt --targets y_syn.pt --target-kind feature
    python -m distillers import --source cifar100 --method mtt_released --normalised source \\
                                --images images_best.pt --targets labels_best.pt
    python -m distillers import --source cifar100 --method dsa_released --normalised source \\
                                --images res_DSA_CIFAR100_ConvNet_10ipc.pt --images-entry data.0.0
    python -m distillers import --source cifar100 --method kip_released --normalised source \\
                                --images kip.npz --target-kind soft

Reads what torch.save (any suffix) or NumPy (.npy, .npz) wrote, as data only. The images are the
file's one array of shape (m, 3, S, S) or (m, S, S, 3), floats or bytes; the targets lie beside them
or in a file of their own: class indices (m,), or (m, d) that --target-kind explains. What a file
cannot tell is asked for, never guessed: a missing answer is an error that says what was found.
STATS is `source` (the mean and standard deviation of the source's training images, which must then
be at hand), `imagenet`, or six numbers for pixels in [0, 1]: R,G,B/R,G,B.

Writes runs/<source>/<method>/seed<k>/distilled.pt and images.png, by which the answers can be
checked.
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
from utils.run import Run, versions

STATISTICS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # torchvision's
}
KIND_QUESTION = (
    "are they --target-kind feature (of a target network), soft (learned labels) or class "
    "(one-hot)?"
)
VALUES_QUESTION = (
    "are they --normalised none (pixels in [0, 1], used as they are), --normalised STATS "
    "(normalised already), or "
    "pixels to --normalise STATS? STATS: source, imagenet, or R,G,B/R,G,B"
)
# Of DC's lists of accuracies and of arrays that torch.save took as they were; they make numbers and
# arrays, no more.
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
    """Name -> tensor, for every array in a file; names are the keys and positions on the way there,
    `data.0.1`.

    Floats become float32, integers int64, bytes stay uint8. Raises UserError for a file that is not
    there or that holds more than data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix in (".npy", ".npz"):
        try:
            content = np.load(path, allow_pickle=False)
            content = dict(content) if path.suffix == ".npz" else content
        except Exception as error:  # whatever bytes that are no such file make the reader do
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
    """(name, tensor) of the entry asked for, or of the only one that `fits`. Raises UserError where
    there is none, or more than one."""
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
    """(name, tensor) of the images, (m, 3, S, S) float32 or uint8."""

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
    """The targets, (m,) or (m, d): of --targets, or those that lie beside the images."""
    beside = images_entry.rpartition(".")[0]
    path = args.targets or args.images

    def fits(name, tensor):
        near = args.targets or args.targets_entry is not None or name.rpartition(".")[0] == beside
        return near and tensor.ndim in (1, 2) and len(tensor) == m

    elsewhere = (
        "" if args.targets else ", give --targets FILE, or --target-kind none for the images alone"
    )
    wanted = f"targets for {m} images{elsewhere}"
    y = select_entry(read(path), args.targets_entry, fits, path, "--targets-entry", wanted)[1]
    return y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and not y.is_floating_point() else y


def class_indices(y, path):
    """Integers (m,) or one-hot rows (m, c) as int64 (m,). Raises UserError for anything else."""
    if y.ndim == 1:
        if not torch.equal(y, y.round() if y.is_floating_point() else y):
            raise UserError(
                f"{path}: targets of one dimension that are no class indices ({describe(y)})"
            )
        return y.long()
    if not (((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all()):
        raise UserError(
            f"{path}: targets that are not one-hot ({describe(y)}); give --target-kind soft or "
            "feature"
        )
    return y.argmax(1)


def describe(tensor):
    """Shape, type and range of a tensor; of images also mean and deviation of each channel."""
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
    """Mean and std (3,) that STATS stands for."""
    if answer == "source":
        source = load_images(args.source, "train", image_size, args.data_root)
        return source.mean, source.std
    return tuple(torch.tensor(each) for each in STATISTICS.get(answer, answer))


def parse_statistics(text):
    """An argparse type for STATS: none, source and imagenet as they are, R,G,B/R,G,B as
    ((r, g, b), (r, g, b))."""
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
    """The `Distilled` that the files and the answers make, without meta. Raises UserError for what
    does not fit or is missing."""
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
        raise UserError("--target-kind none: then give neither --targets nor --targets-entry")
    answer = args.normalise or args.normalised
    if answer is None:
        questions.append(f"images {describe(x)}: {VALUES_QUESTION}")
    if questions:
        raise UserError(f"{args.images}: the file cannot tell: {'; '.join(questions)}")
    if x.dtype == torch.uint8:
        if args.normalised not in (None, "none"):
            raise UserError(
                f"{args.images}: bytes are pixels; give --normalised none or --normalise STATS"
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
    """As load_images names a source; a plain name that is not at hand stays as it is."""
    if (
        name in ARCHIVES
        or in_data_root(name, root)
        or Path(name).is_dir()
        or Path(name).name != name
    ):
        return folder_name(name, root)
    return name


def main(argv, reserved=(), prog=None):
    """Import as `argv` says; `reserved` are names that --method may not be."""
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
        print(f"{run.artefact} is there already")
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
        versions=versions(),
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
        "--source", required=True, help="data set that the images were distilled from"
    )
    run.add_argument(
        "--method",
        required=True,
        help="name for the run's folder and for tables, such as dm_released",
    )
    parser.groups["method"].add_argument(
        "--preset",
        choices=[*PRESETS],
        default=name,
        help="settings of later stages (default: source)",
    )
    run.add_argument(
        "--seed",
        type=cli.non_negative_int,
        default=0,
        help="k of the folder, for several sets of one method",
    )
    data.add_argument("--images", type=Path, required=True, metavar="FILE", help="holds the images")
    data.add_argument(
        "--images-entry", metavar="NAME", help="which array of that file, such as data.0.0"
    )
    data.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help="holds the targets (default: beside the images)",
    )
    data.add_argument("--targets-entry", metavar="NAME", help="which array of that file")
    data.add_argument(
        "--target-kind", choices=[*TARGET_KINDS], help="what targets of two dimensions are"
    )
    values = data.add_mutually_exclusive_group()
    values.add_argument(
        "--normalised",
        type=parse_statistics,
        metavar="none|STATS",
        help="what the file's values are",
    )
    values.add_argument(
        "--normalise",
        type=parse_statistics,
        metavar="STATS",
        help="they are pixels; normalise them so",
    )
    return parser.parse_args(argv)
