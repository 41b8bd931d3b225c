"""Measure the speed of the training steps of all stages.

    python -m benchmarks.stages                                    # CIFAR-100's settings
    python -m benchmarks.stages --preset tinyimagenet --precision fp32

The training loops are those of the scripts, on images of noise. Prints a line for each stage: time
of a step, images per second, and the share of the device's limit (timing.py). The time is the mean
of at least one second; on a GPU, of at least 20 steps after a second of warm-up. Precisions are the
defaults of the stages unless --precision is given.
"""

import contextlib
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

import distill
import finetune
import kd
import models
import pretrain
import pretrain_target
from benchmarks.step import make_inputs, num_source_images
from benchmarks.timing import Stopwatch, find_limit, machine_name, peak_rates
from data.distilled import Distilled
from data.images import ImageSet
from distillers import method
from utils import cli
from utils.device import add_device_flags, resolve_precision, select_device
from utils.presets import PRESETS
from utils.sampling import Randomness

NUM_IMAGES, NUM_CLASSES, NUM_FEATURES = 2048, 100, 512
UNTIMED_STEPS = 3  # steps taken of the loop "initialise pool"


class Finished(Exception):
    """Raised after the timed steps; ends the training."""


class TimedRun:
    """Stands in for `Run` in a training loop: times its steps and writes no files.

    Attributes:
        watch: `Stopwatch` with the time of a step.
        flop: floating-point operations of a step.
    """

    def __init__(self, device):
        self.device, self.watch, self.flop = device, Stopwatch(device), 0

    def resume(self, device, state, per_rank=()):
        pass

    def steps(self, phase, total):
        if phase == "initialise pool":
            yield from range(min(total, UNTIMED_STEPS))
            return
        eager = torch.compiler.set_stance("force_eager")
        with eager, FlopCounterMode(display=False) as counter:
            yield 0
        self.flop = counter.get_total_flops()
        yield from self.watch.steps()
        raise Finished

    def log(self, step, **scalars):
        """As `Run.log`: waits for the values on a CPU only."""
        for value in scalars.values():
            if torch.is_tensor(value):
                value.item() if self.device.type == "cpu" else value.detach().clone()


def noise(size):
    """Return a labelled `ImageSet` of noise, (`NUM_IMAGES`, size, size, 3)."""
    pixels = torch.randint(0, 256, (NUM_IMAGES, size, size, 3), dtype=torch.uint8)
    labels, classes = torch.arange(NUM_IMAGES) % NUM_CLASSES, [*map(str, range(NUM_CLASSES))]
    half, quarter = torch.full((3,), 0.5), torch.full((3,), 0.25)
    return ImageSet("noise", pixels, labels, classes, half, quarter, "noise")


def build(settings, num_outputs, device):
    network = models.build(settings.arch, settings.image_size, num_outputs, settings.width)
    return network.to(device)


def describe(settings, images):
    network = models.label(settings.arch, settings.width)
    return f"{network}, {images:,} images of {settings.image_size} px"


def parse_student(preset, words):
    """Return the settings of distill.py, whose network all later stages train."""
    return method.parse_args(distill.METHOD, ["--preset", preset, *words])


# Each function below returns the parsed flags of a stage, a description of its step, the number of
# images in it, and a function that trains in a `TimedRun`.


def barlow_twins(preset, words, device):
    settings = pretrain_target.parse_args(["--preset", preset, *words])
    network, b = build(settings, 0, device), settings.batch_size

    def train(run):
        pretrain_target.train(network, noise(settings.image_size), settings, run, device)

    return settings, describe(settings, b), b, train


def krr_st(preset, words, device):
    settings = parse_student(preset, words)
    m, b = settings.num_images, settings.outer_batch
    source, target = make_inputs(settings, num_source_images(settings), device)
    chosen = distill.METHOD.choose(source, m, settings.seed)

    def train(run):
        distill.distill(source, chosen, target, settings, run, device)

    what = f"{describe(settings, m)} and {b:,} real ones"
    return settings, what, m + b, train


def pretraining(preset, words, device):
    settings, _ = pretrain.parse_args(["--source", preset, *words])
    student = parse_student(preset, words)
    m, size = student.num_images, student.image_size
    data = pretrain.TrainingData(
        torch.randn(m, 3, size, size, device=device),
        torch.randn(m, NUM_FEATURES, device=device),
        preprocess=lambda x: x,
        **dict(size=size, outputs=NUM_FEATURES, kind="feature", folder=None, num_images=m),
        **dict(identity={}, meta={}, deviations={}),
    )
    network, b = build(student, NUM_FEATURES, device), min(m, settings.batch_size)

    def train(run):
        pretrain.pretrain(network, data, settings, run, Randomness(0, device), device)

    return settings, describe(student, b), b, train


def fine_tuning(preset, words, device):
    settings = finetune.parse_args(["--weights", "none", "--dataset", preset, *words])
    student, b = parse_student(preset, words), settings.batch_size
    network, images = build(student, NUM_CLASSES, device), noise(student.image_size)

    def train(run):
        finetune.finetune(network, images, settings, run, Randomness(0, device), device)

    return settings, describe(student, b), b, train


def distillation_of_a_teacher(preset, words, device):
    unread = ["--distilled", "distilled.pt", "--teacher", "model.pt"]
    settings = kd.parse_args(["--weights", "none", "--dataset", preset, *unread, *words])
    student = parse_student(preset, words)
    m, size = student.num_images, student.image_size
    images, targets = torch.randn(m, 3, size, size), torch.zeros(m, 0)
    made = Distilled(images, targets, "none", torch.zeros(3), torch.ones(3), {})
    networks, b = [build(student, NUM_CLASSES, device) for _ in range(2)], settings.batch_size

    def train(run):
        kd.train_student(*networks, made, settings, run, Randomness(0, device), device)

    return settings, describe(student, min(m, b)), min(m, b), train


STAGES = {
    "Barlow Twins": barlow_twins,
    "KRR-ST": krr_st,
    "pre-training": pretraining,
    "fine-tuning": fine_tuning,
    "knowledge distillation": distillation_of_a_teacher,
}


def measure(stage, preset, words, device, limit_in):
    """Return a line with the speed of a stage; `limit_in(precision)` is the limit in FLOP/s."""
    settings, what, images, train = STAGES[stage](preset, words, device)
    resolve_precision(settings, stage == "fine-tuning")  # the other stages have resolved it
    run = TimedRun(device)
    with contextlib.suppress(Finished):
        train(run)
    seconds, steps = run.watch.seconds_per_step, run.watch.num_steps
    share = run.flop / seconds / limit_in(settings.precision)
    return (
        f"{stage}, preset {preset} ({what}), {settings.precision} on {machine_name(device)}, torch "
        f"{torch.__version__}, n = {steps} steps: {1e3 * seconds:,.2f} ms a step, "
        f"{images / seconds:,.0f} images/s, {share:.0%} of the limit"
    )


def main(argv):
    args = parse_args(argv)
    device = select_device(args)
    words = ["--device", args.device, "--precision", args.precision]
    words += ["--deterministic"] if args.deterministic else []
    limit_in = cache(lambda precision: find_limit(peak_rates(device, precision)))
    for stage in args.stages:
        print(measure(stage, args.preset, words, device, limit_in), flush=True)


def parse_args(argv):
    parser = cli.Parser(__doc__)
    add_device_flags(parser)
    group = parser.groups["method"]
    group.add_argument(
        "--preset", choices=[*PRESETS], default="cifar100", help="preset (default: cifar100)"
    )
    group.add_argument(
        "--stages", nargs="+", choices=[*STAGES], default=[*STAGES], help="default: all"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
