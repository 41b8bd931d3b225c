"""Stage 0: train the target network g_phi on the unlabelled source with Barlow Twins.

    python pretrain_target.py --source tinyimagenet
    python pretrain_target.py --source imagenette --weights resnet50.pth    # take a network trained elsewhere

Writes runs/<source>/target/seed0/target.pt: the network, its settings, the source's statistics, and the accuracy of
a nearest-neighbour classifier on its frozen features where the source has labels and a test split (a check only; no
label is used in training). The paper's setting (1,000 epochs of ResNet18) takes hours to days on one GPU; the digits
preset takes two minutes on two CPU cores.
"""

import torch

import models
from data.augment import barlow_twins_view
from data.images import load_images, normalise, unit
from data.loading import Loader
from models.barlow_twins import barlow_twins_loss, projector
from models.sync_batch_norm import synchronised
from utils import cli, evaluate, files, optim, ranks
from utils.errors import UserError
from utils.presets import differences, preset
from utils.run import Run
from utils.sampling import Batches, Randomness

HELP = dict(
    arch="network of the target, one of models.ARCHITECTURES",
    width="factor on the network's hidden widths",
    epochs="passes over the source",
    batch_size="images in a batch",
    lr="LARS learning rate for a batch of 256",
    weight_decay="weight decay",
    warmup_epochs="epochs of linear warm-up",
    projector_dim="width of the projector's three layers",
    off_diagonal="weight lambda of the off-diagonal terms",
    loss_scale="factor on the loss",
    crop_min="smallest share of the image that a crop keeps",
    jitter="probability of colour jitter",
    greyscale="probability of greyscale",
    solarise="probability of solarisation in the second view",
    flip="probability of a horizontal flip",
    weights="take the backbone from this state dict instead of training; 'hub' fetches the ImageNet ResNet50 of "
    "facebookresearch/barlowtwins; empty trains",
)


def train(network, source, args, run, device):
    """Barlow Twins for `args.epochs` epochs; `network` is left trained."""
    head = projector(network.feature_dim, args.projector_dim).to(device)
    randomness = Randomness(args.seed, device)
    batches = Batches(len(source), args.batch_size, randomness.cpu, drop_last=True, shared=True)
    weights = [*network.parameters(), *head.parameters()]
    lars = optim.optimizer("lars", weights, args.lr * batches.batch_size / 256, args.weight_decay)
    total = args.epochs * batches.per_epoch
    scheduler = optim.schedule(lars, "cosine", total, args.warmup_epochs * batches.per_epoch)
    run.resume(
        device,
        dict(network=network, head=head, batches=batches, optimizer=lars, scheduler=scheduler, randomness=randomness),
    )
    loader = Loader([source.pixels], batches, device)
    network.train()
    with synchronised(network, head):
        for step in run.steps("train target", total):
            x = unit(*loader.next())  # (b, 3, S, S)
            randomness.part()
            views = [barlow_twins_view(x, randomness.device, args, solarise) for solarise in (0.0, args.solarise)]
            with cli.autocast(device, args.precision):
                z1, z2 = (head(network.embed(normalise(seen, source.mean, source.std))) for seen in views)
            lars.zero_grad()
            loss = ranks.backward(barlow_twins_loss(z1, z2, args.off_diagonal, args.loss_scale), weights)
            run.log(step, loss=loss, gradient=optim.gradient_norm(weights))
            lars.step()
            scheduler.step()


def load_backbone(network, weights):
    """Load a torchvision-style state dict (a file, or 'hub') into `network.features`; a head in it is left out.

    'hub' runs the code of facebookresearch/barlowtwins on GitHub; a file is read as data only.
    """
    if weights == "hub":
        try:
            state = torch.hub.load("facebookresearch/barlowtwins:main", "resnet50", trust_repo=True).state_dict()
        except OSError as error:
            raise UserError(
                f"facebookresearch/barlowtwins cannot be fetched from torch.hub ({error}); give its resnet50 "
                "state dict with --weights FILE, or train a target: --weights '' --arch resnet18_target"
            ) from error
    else:
        state = files.read_data(weights, "state dict")
        if name := files.not_finite(state):
            raise UserError(f"{weights}: values that are not finite ({name})")
    try:
        network.features.load_state_dict({name: v for name, v in state.items() if not name.startswith("fc.")})
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{weights}: does not fit the network ({str(error).splitlines()[-1].strip()[:160]})") from error


def labelled_test_split(args):
    """The test split for the nearest-neighbour check, or None, with a word, where the source has none."""
    try:
        return load_images(args.source, "test", args.image_size, args.data_root)
    except UserError as error:
        print(f"no nearest-neighbour check: {error}")


def main(argv):
    args = parse_args(argv)
    device = cli.device(args, several=True)
    source = load_images(args.source, "train", args.image_size, args.data_root)
    test = labelled_test_split(args) if source.labels is not None else None
    if min(len(source), args.batch_size) < 2:
        raise UserError(f"{source.name}: Barlow Twins needs batches of at least 2 images")
    run = Run(
        args.run_root / source.name / "target" / f"seed{args.seed}",
        "target.pt",
        cli.settings(args, source=source.name, fingerprint=source.fingerprint),
        args.log_every,
        args.tensorboard,
    )
    if run.finished:
        print(f"{run.artefact} is there already")
        return
    torch.manual_seed(args.seed)
    network = models.build(args.arch, args.image_size, 0, args.width).to(device)
    if args.weights:
        load_backbone(network, args.weights)
    else:
        train(network, source, args, run, device)
    content = dict(
        arch=args.arch,
        width=args.width,
        image_size=args.image_size,
        feature_dim=network.feature_dim,
        network={name: value.cpu() for name, value in network.state_dict().items()},
        source=source.name,
        fingerprint=source.fingerprint,
        mean=source.mean,
        std=source.std,
        settings=run.settings,
        scale=source.part | differences(cli.preset_name(source.name), "target", vars(args)),
        knn_accuracy=None,
    )
    if test is not None:
        content["knn_accuracy"] = evaluate.knn_accuracy(network.embed, source, test, device, args.precision)
        print(f"kNN accuracy of the frozen features, {source.name}'s test split: {content['knn_accuracy']:.2f} %")
    run.finish("target", content)
    print(f"wrote {run.artefact}")


def parse_args(argv):
    parser, name = cli.source_parser(__doc__, argv)
    cli.add_settings(parser, preset(name, "target"), HELP)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
