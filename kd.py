"""Stage 3': distil a teacher into a student without the teacher's data, on distilled images of another source.

    python kd.py --weights runs/.../model.pt --distilled runs/.../distilled.pt --teacher runs/.../model.pt \\
                 --target cifar10

The student starts from pre-trained weights under a new head and learns the teacher's probabilities on the augmented
distilled images (equation 6). Both networks use each batch's own statistics in batch norm, in training and on the
test split, as the paper's numbers do; the accuracy with running statistics is reported beside it. Adds a line to
results.jsonl beside the weights, which also says whose images were used, and writes the student to
<folder of the weights>/<target>_kd_<method and digest of the images' file>_seed<k>/model.pt. With --weights none the
student starts from scratch (<run root>/scratch/<arch>_<size>px), as with noise in place of images:

    python -m distillers gaussian --source tinyimagenet
    python kd.py --weights none --arch convnet4 --image-size 64 --lr 1e-3 --target cifar10 --teacher ... \\
                 --distilled runs/tinyimagenet/gaussian/seed0/distilled.pt
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data.augment import diff_augment
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled
from data.images import load_images
from models import saved
from models.sync_batch_norm import synchronised
from utils import cli, evaluate, files, optim, ranks, results, start
from utils.errors import UserError
from utils.presets import differences, preset
from utils.run import Run
from utils.sampling import Batches, Randomness

HELP = dict(
    lr="AdamW learning rate, cosine by epoch to 0",
    weight_decay="weight decay",
    batch_size="images in a batch",
    epochs="passes over the distilled images",
    augment="differentiable augmentation of the distilled images",
)


def imitate(student, teacher, distilled, args, run, randomness, device):
    """Train the student on the teacher's probabilities for the images of a `Distilled`, or for as many of noise."""
    x_syn, fresh_noise = distilled.images.to(device), distilled.meta.get("fresh_noise", False)  # (m, 3, S, S)
    batches = Batches(len(x_syn), args.batch_size, randomness.cpu, shared=True)
    optimizer = optim.optimizer("adamw", student.parameters(), args.lr, args.weight_decay)
    scheduler = optim.schedule(optimizer, "cosine", args.epochs)
    run.resume(
        device, dict(student=student, optimizer=optimizer, scheduler=scheduler, batches=batches, randomness=randomness)
    )
    student.train()
    with synchronised(student, teacher):
        for step in run.steps("imitate", args.epochs * batches.per_epoch):
            x = x_syn[batches.next().to(device)]
            randomness.part()
            if fresh_noise:
                x = torch.randn(x.shape, generator=randomness.device, device=device)
            if args.augment:
                x = diff_augment(x, randomness.device)
            with cli.autocast(device, args.precision):
                with evaluate.evaluating(teacher, batch_statistics=True):
                    wanted = teacher(x).float().softmax(1)  # (b, c)
                predicted = student(x)
            optimizer.zero_grad()
            loss = ranks.backward(F.cross_entropy(predicted.float(), wanted), student.parameters(), batches.share)
            run.log(step, loss=loss, gradient=optim.gradient_norm(student.parameters()))
            optimizer.step()
            if (step + 1) % batches.per_epoch == 0:
                scheduler.step()


def main(argv):
    args = parse_args(argv)
    device, started = cli.device(args, several=True), time.monotonic()
    beginning = start.load(args)
    distilled, teaching = load_distilled(args.distilled), saved.load_model(args.teacher)
    size = beginning.saved["image_size"]
    for path, what, there in (
        (args.teacher, "a network for", teaching["image_size"]),
        (args.distilled, "images of", distilled.images.shape[-1]),
    ):
        if there != size:
            raise UserError(f"{path}: {what} {there} px, the student takes {size} px")
    test = load_images(args.target, "test", size, args.data_root, labels=True)
    if test.labels is None or teaching["num_outputs"] != len(test.classes):
        raise UserError(f"{args.teacher}: {teaching['num_outputs']} classes, but {test.name} has {len(test.classes)}")
    digests = dict(distilled=files.digest(args.distilled), teacher=files.digest(args.teacher))
    settings = start.settings(args, beginning, target=test.name, fingerprint=test.fingerprint, protocol="kd", **digests)
    key = results.digest(settings)
    if line := ranks.from_first(lambda: results.find(beginning.folder, key)):
        print(f"{results.show(line)} (was there already)")
        return

    randomness = Randomness(beginning.seed, device)
    student = saved.rebuild(beginning.saved, len(test.classes)).to(device)
    teacher = saved.rebuild(teaching).to(device)
    images = {name: distilled.meta.get(name) for name in ("source", "method", "seed")}
    images["num_images"] = len(distilled.images)
    origin = f"{Path(str(images['method'])).name}-{digests['distilled'][:6]}"
    folder = beginning.folder / f"{test.name}_kd_{origin}_seed{beginning.seed}"
    run = Run(folder, "model.pt", settings, args.log_every, args.tensorboard)
    scale = {f"teacher's {name}": pair for name, pair in teaching["meta"].get("scale", {}).items()}
    used = {name: value for name, value in settings.items() if name in HELP}
    scale |= test.part | distilled.meta.get("scale", {}) | differences(cli.preset_name(test.name), "kd", used)
    student = start.trained(
        beginning, run, student, len(test.classes),
        lambda: imitate(student, teacher, distilled, args, run, randomness, device),
        target=test.name, kd=run.settings, scale=beginning.scale | scale,
        normalisation=[test.mean.tolist(), test.std.tolist()],
    )  # fmt: skip
    accuracies = {
        f"{who}{suffix}": round(evaluate.accuracy(network, test, device, args.precision, batch_statistics), 4)
        for who, network in (("accuracy", student), ("teacher", teacher))
        for suffix, batch_statistics in (("", True), ("_running_statistics", False))
    }
    line = beginning.result(
        scale, device, started, name=f"{test.name}_kd_{Path(str(images['method'])).name}_seed{beginning.seed}",
        target=test.name, protocol="kd", images=images, **accuracies, digest=key,
    )  # fmt: skip
    results.append(beginning.folder, line)
    print(f"{results.show(line)}; teacher {line['teacher']:.2f} %")


def parse_args(argv):
    parser = cli.parser(__doc__)
    start.add_flags(parser, argv)
    parser.add_argument("--distilled", type=distilled_file, required=True, metavar="SET", help=DISTILLED_HELP)
    parser.add_argument("--teacher", type=Path, required=True, help="model.pt of finetune.py, trained on the target")
    cli.add_settings(parser, preset(cli.preset_name(cli.early("target", argv)), "kd"), HELP)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
