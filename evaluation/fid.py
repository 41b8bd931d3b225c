"""Frechet distance (FID) between a distilled set and its source in a network's feature space.

    python -m evaluation.fid --distilled runs/cifar100/krr_st/seed0/distilled.pt
    python -m evaluation.fid --distilled runs/cifar100/krr_st/seed0/distilled.pt \\
                             --network runs/cifar100/target/seed0/target.pt

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
NeurIPS 2017. The reference set is the source's whole training split. By default, the features are
those of the standard Inception network from the package torch-fidelity (`pip install
torch-fidelity`), which downloads the weights unless --inception-weights is given. Distances in the
feature spaces of different networks are not comparable, so each result names its network.

Prints the distance and appends it to results.jsonl in the folder of the set; for an exported set,
in <run root>/<source>/<name of the set>/seed<k>. On a CPU, this takes minutes with a small target
network and hours with Inception.
"""

import time
from pathlib import Path

import torch

import models
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled, results_folder
from data.images import load_images, normalise
from evaluation import results, starting_weights
from evaluation.probes import evaluation_mode
from models import saved
from models.target import load_target
from utils import cli, files, progress
from utils.device import add_device_flag, select_device
from utils.errors import UserError
from utils.moments import Moments
from utils.run import settings_digest

BATCH = 256


def square_root(c):
    """Return the positive semi-definite square root of a positive semi-definite matrix (d, d).

    Eigenvalues below the rounding error count as 0.
    """
    values, vectors = torch.linalg.eigh(c)
    noise = len(c) * torch.finfo(c.dtype).eps * values.abs().max()
    return (vectors * torch.where(values > noise, values, 0.0).sqrt()) @ vectors.T


def frechet_distance(mean1, cov1, mean2, cov2):
    """Compute the squared Frechet distance of two Gaussians, in float64.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). This needs no
    inverse and no complex root, so the covariances may be singular (fewer images than features).

    Args:
        mean1, mean2: (d,).
        cov1, cov2: (d, d).

    Returns:
        float.
    """
    mean1, cov1, mean2, cov2 = (each.double() for each in (mean1, cov1, mean2, cov2))
    cross = torch.linalg.svdvals(square_root(cov1) @ square_root(cov2)).sum()
    return (
        ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)
        .clamp(min=0)
        .item()
    )


def load_inception(weights, device):
    """Load the Inception network of the original FID.

    Args:
        weights: path of its weights; None downloads them.
        device: torch device.

    Returns:
        Function from pixels (b, 3, S, S) in [0, 1] to features (b, 2048).

    Raises:
        UserError: if torch-fidelity is not installed or the weights are not available.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "the standard FID needs the package torch-fidelity (pip install torch-fidelity); or "
            "use the features of another network: --network runs/<source>/target/seed0/target.pt"
        ) from error
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        ).to(device)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot load the weights of the Inception network ({str(error)[:120]}); pass a "
            "weights file with --inception-weights, or use another network: --network target.pt"
        ) from error
    return lambda pixels: network((255 * pixels).round().to(torch.uint8))[0]


def load_network(path, source, device):
    """Load the network of a target.pt or model.pt.

    Args:
        path: path of the file.
        source: `ImageSet`, whose statistics normalise the images.
        device: torch device.

    Returns:
        The network's name, and a function from pixels (b, 3, S, S) in [0, 1] to features (b, d).

    Raises:
        UserError: if the file is neither, or has another image size.
    """
    content = files.read_data(path, "network file") if path.is_file() else None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "target" and "features" in content:
        target = load_target(path, source, device, "fp32")
        name = f"{target.name}, {target.digest[:6]}"
        return name, lambda pixels: target.features(normalise(pixels, source.mean, source.std))
    if kind == "model":
        content = saved.load_model(path)
        network, origin = saved.rebuild(content), content["meta"].get("method")
    else:
        content = files.load(
            path, "target", required=("network", "arch", "width", "image_size", "source")
        )
        network, origin = (
            models.build(content["arch"], content["image_size"], 0, content["width"]),
            content["source"],
        )
        network.load_state_dict(content["network"])
    if content["image_size"] != source.image_size:
        raise UserError(
            f"{path}: a network for {content['image_size']} px, but the images have "
            f"{source.image_size} px"
        )
    network = network.to(device)

    def features(pixels):
        with evaluation_mode(network):
            return network.embed(normalise(pixels, source.mean, source.std))

    name = (
        f"{models.label(content['arch'], content['width'])} of {origin}, {files.digest(path)[:6]}"
    )
    return name, features


def measure_fid(distilled, source, features, device):
    """Return the Frechet distance between the images of a `Distilled` and of an `ImageSet`.

    `features` maps pixels (b, 3, S, S) in [0, 1] to features (b, d).
    """
    sets = Moments(), Moments()
    pixels = distilled.pixels()
    with torch.no_grad():
        for index in torch.arange(len(pixels)).split(BATCH):
            sets[0].add(features(pixels[index].to(device)))
        for index in progress.progress_bar(
            torch.arange(len(source)).split(BATCH), desc="features of the source"
        ):
            sets[1].add(features(source.raw(index, device)))
    return frechet_distance(*(each for s in sets for each in (s.mean(), s.covariance())))


def main(argv):
    args = parse_args(argv)
    device, started = select_device(args), time.monotonic()
    distilled = load_distilled(args.distilled)
    if len(distilled.images) < 2:
        raise UserError(f"{args.distilled}: FID needs at least two images")
    source = load_images(
        args.source or distilled.meta["source"], "train", distilled.images.shape[-1], args.data_root
    )
    if args.network == "inception":
        name, features = "inception", load_inception(args.inception_weights, device)
    else:
        name, features = load_network(Path(args.network), source, device)
    value = measure_fid(distilled, source, features, device)
    meta = {key: distilled.meta.get(key) for key in ("source", "method")}
    facts = dict(
        network=name, distilled=files.digest(args.distilled), fingerprint=source.fingerprint
    )
    line = (
        meta
        | dict(
            distilled_seed=distilled.meta.get("seed"),
            num_images=distilled.num_images,
            image_size=distilled.images.shape[-1],
            dataset=source.name,
            protocol="fid",
            name=f"fid_{Path(args.network).stem}",
            network=name,
            fid=float(f"{value:.6g}"),
            deviations=distilled.meta.get("deviations", {}) | source.deviations,
            digest=settings_digest(facts),
        )
        | starting_weights.measure_cost(device, "fp32", started)
    )
    results.append(results_folder(args.distilled, distilled, args.run_root), line)
    print(f"{meta['method']} {meta['source']}: FID {value:.2f} with the features of {name}")


def parse_args(argv):
    parser = cli.folder_parser(__doc__)
    data, method = parser.groups["data"], parser.groups["method"]
    data.add_argument(
        "--distilled", type=distilled_file, required=True, metavar="SET", help=DISTILLED_HELP
    )
    data.add_argument(
        "--source",
        help="data set or folder of the source (default: the one named in the set; required if "
        "that is a folder)",
    )
    method.add_argument(
        "--network",
        default="inception",
        metavar="FILE",
        help="target.pt, model.pt or inception (default: inception)",
    )
    method.add_argument(
        "--inception-weights",
        metavar="FILE",
        help="weights file to use instead of the download by torch-fidelity",
    )
    add_device_flag(parser)
    parser.set_defaults(precision="fp32", deterministic=False)  # for `select_device`
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
