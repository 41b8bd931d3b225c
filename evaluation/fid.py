"""Frechet distance between a distilled set and its source in a network's feature space.

    python -m evaluation.fid --distilled runs/cifar100/krr_st/seed0/distilled.pt
    python -m evaluation.fid --distilled runs/cifar100/krr_st/seed0/distilled.pt \\
                             --network runs/cifar100/target/seed0/target.pt

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
NeurIPS 2017. The reference is all of the source's training split. Without --network the features
are the standard Inception network's, which the package torch-fidelity has (`pip install
torch-fidelity`; it downloads the weights, or --inception-weights FILE names them). Numbers of other
networks cannot be compared with those: every result says whose features it was. Prints the distance
and adds it to results.jsonl beside the set; for an exported set, in <run root>/<source>/<name of
the set>/seed<k>. Minutes on a CPU for a small network of ours, hours for Inception.
"""

import time
from pathlib import Path

import torch

import models
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled, results_folder
from data.images import load_images, normalise
from evaluation import results, starting_weights
from evaluation.probes import evaluating
from models import saved
from models.target import load_target
from utils import cli, files, progress
from utils.device import add_device_flags, resolve_precision, select_device
from utils.errors import UserError
from utils.moments import Moments
from utils.run import settings_digest

BATCH = 256


def square_root(c):
    """The positive semi-definite square root of such a matrix (d, d); eigenvalues that rounding
    made are taken as 0."""
    values, vectors = torch.linalg.eigh(c)
    noise = len(c) * torch.finfo(c.dtype).eps * values.abs().max()
    return (vectors * torch.where(values > noise, values, 0.0).sqrt()) @ vectors.T


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians, in float64: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1
    C2)^(1/2)).

    Means (d,), covariances (d, d), which may be singular (fewer images than features): the trace of
    (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2), which needs no inverse and
    no complex root.
    """
    mean1, cov1, mean2, cov2 = (each.double() for each in (mean1, cov1, mean2, cov2))
    cross = torch.linalg.svdvals(square_root(cov1) @ square_root(cov2)).sum()
    return (
        ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)
        .clamp(min=0)
        .item()
    )


def load_inception(weights, device):
    """Inception features (b, 2048) of pixels (b, 3, S, S) in [0, 1], as in the original measure."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "the standard FID needs the package torch-fidelity (pip install torch-fidelity); or "
            "measure in the feature "
            "space of a network of yours: --network runs/<source>/target/seed0/target.pt"
        ) from error
    try:
        network = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        ).to(device)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of the Inception network cannot be had ({str(error)[:120]}); give their "
            "file with "
            "--inception-weights, or use a network of yours: --network target.pt"
        ) from error
    return lambda pixels: network((255 * pixels).round().to(torch.uint8))[0]


def load_network(path, source, device):
    """Its name, and features (b, d) of pixels in [0, 1], by the network in a target.pt or model.pt;
    images are normalised by the `ImageSet` source. Raises UserError when it is neither, or of
    another image size."""
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
            f"{path}: a network for {content['image_size']} px, the images have "
            f"{source.image_size} px"
        )
    network = network.to(device)

    def features(pixels):
        with evaluating(network):
            return network.embed(normalise(pixels, source.mean, source.std))

    name = (
        f"{models.label(content['arch'], content['width'])} of {origin}, {files.digest(path)[:6]}"
    )
    return name, features


def measure_fid(distilled, source, features, device):
    """Frechet distance between the pixels of a `Distilled` and those of the `ImageSet` source."""
    sets = Moments(), Moments()
    pixels = distilled.pixels()
    with torch.no_grad():
        for index in torch.arange(len(pixels)).split(BATCH):
            sets[0].add(features(pixels[index].to(device)))
        for index in progress.bar(
            torch.arange(len(source)).split(BATCH), desc="features of the source"
        ):
            sets[1].add(features(source.raw(index, device)))
    return frechet_distance(*(each for s in sets for each in (s.mean(), s.covariance())))


def main(argv):
    args = parse_args(argv)
    device, started = select_device(args), time.monotonic()
    distilled = load_distilled(args.distilled)
    if len(distilled.images) < 2:
        raise UserError(f"{args.distilled}: one image has no covariance; FID takes two at least")
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
            num_images=len(distilled.images),
            image_size=distilled.images.shape[-1],
            dataset=source.name,
            protocol="fid",
            name=f"fid_{Path(args.network).stem}",
            network=name,
            fid=float(f"{value:.6g}"),
            deviations=distilled.meta.get("deviations", {}) | source.deviations,
            digest=settings_digest(facts),
        )
        | starting_weights.cost(device, started)
    )
    results.append(results_folder(args.distilled, distilled, args.run_root), line)
    print(f"{meta['method']} {meta['source']}: FID {value:.2f} by the features of {name}")


def parse_args(argv):
    parser = cli.folder_parser(__doc__)
    data, method = parser.groups["data"], parser.groups["method"]
    data.add_argument(
        "--distilled", type=distilled_file, required=True, metavar="SET", help=DISTILLED_HELP
    )
    data.add_argument(
        "--source", help="data set or folder that it was distilled from (default: as it says)"
    )
    method.add_argument(
        "--network", default="inception", metavar="FILE", help="target.pt or model.pt, or inception"
    )
    method.add_argument(
        "--inception-weights", metavar="FILE", help="weights that torch-fidelity would download"
    )
    add_device_flags(parser)
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
