"""Stage 3': data-free knowledge distillation of a teacher into a student.

The student learns on distilled images of another source, not on the teacher's training data.

    python kd.py --weights runs/.../model.pt --distilled runs/.../distilled.pt \\
                 --teacher runs/.../model.pt --dataset cifar10

The student starts from pre-trained weights with a new head. It learns the teacher's probabilities
on the augmented distilled images (equation 6). Batch norm of both networks uses the statistics of
each batch, in training and on the test split, as for the paper's numbers. The accuracy with running
statistics is reported as well.

Appends a line to results.jsonl in the folder of the weights; the line names the method and source
of the images. Writes the student to
<folder of the weights>/<dataset>_kd_<method>-<digest of distilled.pt>_seed<k>/model.pt.

With --weights none, the student starts from scratch and the folder is
<run root>/scratch/<arch>_<size>px. For example, with noise instead of images:

    python -m distillers gaussian --source tinyimagenet
    python kd.py --weights none --arch convnet4 --image-size 64 --lr 1e-3 --dataset cifar10 \\
                 --teacher ... --distilled runs/tinyimagenet/gaussian/seed0/distilled.pt
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data.augment import diff_augment
from data.distilled import DISTILLED_HELP, distilled_file, load_distilled
from data.images import load_images
from data.loading import gather
from evaluation import probes, results, starting_weights
from models import saved
from models.sync_batch_norm import synchronise_batch_norm
from utils import cli, distributed, files, optim
from utils.device import autocast, resolve_precision, restore_backends, select_device
from utils.errors import UserError
from utils.presets import deviations, preset, preset_name
from utils.run import Run, settings_digest
from utils.sampling import Batches, Randomness

HELP = dict(
    lr="AdamW learning rate, decayed to 0 by epoch with a cosine schedule",
    weight_decay="weight decay",
    batch_size="images per batch",
    epochs="number of passes over the distilled images",
    augment="differentiable augmentation of the distilled images",
)


def train_student(student, teacher, distilled, args, run, randomness, device):
    """Train `student` in place on the teacher's probabilities for the distilled images.

    If the set's meta has `fresh_noise`, new noise replaces the images at each step.

    Args:
        student, teacher: `Network`s with the same number of outputs.
        distilled: `Distilled`; its targets are not used.
        args: parsed flags.
        run: `Run` that logs and saves checkpoints.
        randomness: `Randomness` of the run.
        device: torch device.
    """
    x_syn = distilled.images.to(device)  # (m, 3, S, S)
    fresh_noise = distilled.meta.get("fresh_noise", False)
    batches = Batches(len(x_syn), args.batch_size, randomness.cpu, shared=True)
    optimizer = optim.make_optimizer("adamw", student.parameters(), args.lr, args.weight_decay)
    scheduler = optim.make_schedule(optimizer, "cosine", args.epochs)
    run.resume(
        device,
        dict(
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            batches=batches,
            randomness=randomness,
        ),
    )
    student.train()
    with synchronise_batch_norm(student, teacher):
        for step in run.steps("train student", args.epochs * batches.per_epoch):
            x = gather(x_syn, batches.next())
            randomness.reseed_for_rank()
            if fresh_noise:
                x = torch.randn(x.shape, generator=randomness.device, device=device)
            if args.augment:
                x = diff_augment(x, randomness.device)
            with autocast(device, args.precision):
                with probes.evaluation_mode(teacher, batch_statistics=True):
                    probabilities = teacher(x).float().softmax(1)  # (b, c)
                predicted = student(x)
            optimizer.zero_grad()
            loss = distributed.backward(
                F.cross_entropy(predicted.float(), probabilities),
                student.parameters(),
                batches.loss_weight,
            )
            run.log(step, loss=loss, gradient=optim.gradient_norm(student.parameters()))
            optimizer.step()
            if (step + 1) % batches.per_epoch == 0:
                scheduler.step()


@restore_backends()
def main(argv):
    args = parse_args(argv)
    device, started = select_device(args, multi_process=True), time.monotonic()
    start = starting_weights.load(args)
    distilled, teacher_file = load_distilled(args.distilled), saved.load_model(args.teacher)
    size = start.saved["image_size"]
    for path, description, pixels in (
        (args.teacher, "a network for images of", teacher_file["image_size"]),
        (args.distilled, "images of", distilled.images.shape[-1]),
    ):
        if pixels != size:
            raise UserError(f"{path}: {description} {pixels} px, the student takes {size} px")
    test = load_images(args.dataset, "test", size, args.data_root, labels=True)
    if teacher_file["num_outputs"] != len(test.classes):
        raise UserError(
            f"{args.teacher}: {teacher_file['num_outputs']} classes, but {test.name} has "
            f"{len(test.classes)}"
        )
    digests = dict(distilled=files.digest(args.distilled), teacher=files.digest(args.teacher))
    settings = starting_weights.run_settings(
        args, start, dataset=test.name, fingerprint=test.fingerprint, protocol="kd", **digests
    )
    key = settings_digest(settings)
    if line := distributed.run_on_main(lambda: results.find(start.folder, key)):
        print(f"{results.format_line(line)} (already in results.jsonl)")
        return

    randomness = Randomness(start.seed, device)
    student = saved.rebuild(start.saved, len(test.classes)).to(device)
    teacher = saved.rebuild(teacher_file).to(device)
    images = {name: distilled.meta.get(name) for name in ("source", "method", "seed")}
    images["num_images"] = distilled.num_images
    origin = f"{Path(str(images['method'])).name}-{digests['distilled'][:6]}"
    folder = start.folder / f"{test.name}_kd_{origin}_seed{start.seed}"
    run = Run(folder, "model.pt", settings, args.log_every, args.tensorboard, device)
    changed = {
        f"teacher's {name}": pair
        for name, pair in teacher_file["meta"].get("deviations", {}).items()
    }
    used = {name: value for name, value in settings.items() if name in (*HELP, "precision")}
    changed |= (
        test.deviations
        | distilled.meta.get("deviations", {})
        | deviations(preset_name(test.name), "kd", used)
    )
    student = starting_weights.train_or_load(
        start,
        run,
        student,
        len(test.classes),
        lambda: train_student(student, teacher, distilled, args, run, randomness, device),
        dataset=test.name,
        kd=run.settings,
        deviations=start.deviations | changed,
        normalisation=[test.mean.tolist(), test.std.tolist()],
    )
    accuracies = {
        f"{name}{suffix}": round(
            probes.accuracy(network, test, device, args.precision, batch_statistics), 4
        )
        for name, network in (("accuracy", student), ("teacher", teacher))
        for suffix, batch_statistics in (("", True), ("_running_statistics", False))
    }
    line = start.result_line(
        changed,
        device,
        args.precision,
        started,
        name=f"{test.name}_kd_{Path(str(images['method'])).name}_seed{start.seed}",
        dataset=test.name,
        protocol="kd",
        images=images,
        **accuracies,
        digest=key,
    )
    results.append(start.folder, line)
    print(f"{results.format_line(line)}; teacher {line['teacher']:.2f} %")


def parse_args(argv):
    parser = cli.stage_parser(__doc__)
    starting_weights.add_flags(parser, argv)
    data = parser.groups["data"]
    data.add_argument(
        "--distilled", type=distilled_file, required=True, metavar="SET", help=DISTILLED_HELP
    )
    data.add_argument(
        "--teacher",
        type=Path,
        required=True,
        help="model.pt that finetune.py trained on the data set",
    )
    cli.add_settings(parser, preset(preset_name(cli.peek_flag("dataset", argv)), "kd"), HELP)
    return resolve_precision(parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
