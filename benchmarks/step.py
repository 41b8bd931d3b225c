"""An outer step of distill.py for timing, with one pool member and noise images.

The target network is untrained. Neither simplification changes the time of a step. The speed
benchmarks share this module.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import distill
import models
from benchmarks.timing import count_flop, time_call
from data.images import ImageSet
from distillers import reference
from distillers.krr import ridge_predict
from distillers.pool import Member
from models.target import NetworkTarget
from utils import distributed, optim
from utils.device import should_compile
from utils.sampling import Randomness

SETTINGS = (  # that determine the time of a step
    "arch",
    "width",
    "image_size",
    "num_images",
    "outer_batch",
    "precision",
    "chunk",
    "compile",
)


def sparse_tensor(shape, dtype):
    """Return a tensor of zeros, memory-mapped from a deleted sparse file without disk usage."""
    with tempfile.NamedTemporaryFile() as file:
        return torch.from_numpy(np.memmap(file.name, dtype, "w+", shape=shape))


class UntrainedTarget(NetworkTarget):
    """An untrained target network with given features of the source."""

    def features_of(self, images):
        return self.table


def make_inputs(args, images, device):
    """Return (source, target) with `images` images.

    Images are noise if they fit in half a gigabyte, and zeros in a sparse file otherwise.
    """
    shape = (images, args.image_size, args.image_size, 3)
    network = (
        models.build("resnet18_target", args.image_size, 0).to(device).requires_grad_(False).eval()
    )
    target = UntrainedTarget(
        Path(), "made", device, args.precision, {}, network.feature_dim, network=network
    )
    if np.prod(shape) < 2**29:
        pixels = torch.randint(
            0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        target.table = torch.randn(
            images, target.feature_dim, generator=torch.Generator().manual_seed(1)
        )
    else:
        pixels = sparse_tensor(shape, np.uint8)
        target.table = sparse_tensor((images, target.feature_dim), np.float32)
    half, quarter = torch.full((3,), 0.5), torch.full((3,), 0.25)
    return ImageSet("made", pixels, None, [], half, quarter, "made"), target


class Step:
    """A step of distill.py with one pool member, in parts; `plain` selects the reference step."""

    def __init__(self, plain, source, target, args, device):
        # The device meta has no random generator.
        randomness = Randomness(0, torch.device("cpu") if device.type == "meta" else device)
        self.plain, self.args, self.device = plain, args, device
        batches, self.loss_of, layout = reference.STEP if plain else distill.STEP
        self.real = batches(source, target, args, randomness, device)
        chosen = torch.arange(args.num_images) % len(source)
        x = source.normalised(chosen, device).contiguous(memory_format=layout)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(device)
        self.x_syn = (x + 0.1 * noise).requires_grad_()  # all images are distinct
        self.y_syn = target.table[chosen].to(device).requires_grad_()
        self.member = Member(
            args.arch,
            args.image_size,
            self.y_syn.shape[1],
            args.width,
            device,
            args.pool_lr,
            args.pool_weight_decay,
            "fp32" if plain else args.precision,
            memory_format=layout,
            compiled=not plain and should_compile(args, device),
        )
        self.adamw = optim.make_optimizer(
            "adamw", [self.x_syn, self.y_syn], args.outer_lr, weight_decay=0.0
        )

    def batch(self):
        return self.real.next()

    def loss(self, x_real, y_real):
        return self.loss_of(self.member, x_real, y_real, self.x_syn, self.y_syn, self.args)

    def gradient(self, loss):
        self.adamw.zero_grad()
        loss.backward(inputs=[self.x_syn, self.y_syn])

    def exchanged(self, loss):
        """Return the tensors that ranks exchange in a step."""
        return [self.x_syn.grad, self.y_syn.grad, loss.detach()]

    def train(self):
        self.member.train_step(self.x_syn.detach(), self.y_syn.detach())

    def __call__(self, exchange=True):
        loss = self.loss(*self.batch())
        self.gradient(loss)
        if exchange:
            distributed.all_reduce_mean(self.exchanged(loss))
        self.adamw.step()
        self.train()


def make_step(plain, args, device):
    """Return a `Step` on images of its own.

    On the device meta, the operations of a step can be counted without computing them.
    """
    return Step(plain, *make_inputs(args, num_source_images(args), device), args, device)


def without_values(step):
    """Return a `Step` with the settings of `step` on the device meta."""
    args = argparse.Namespace(**vars(step.args) | dict(precision="fp32"))  # meta has no autocast
    return make_step(step.plain, args, torch.device("meta"))


def parts(step):
    """Return {name: function} of the parts of a step."""
    x_real, y_real = step.batch()
    args, member = step.args, step.member
    step.gradient(step.loss(x_real, y_real))
    with torch.no_grad():
        f_real, f_syn = (member.embed(x, args.chunk) for x in (x_real, step.x_syn))
    f_syn.requires_grad_()

    def head():
        predicted = ridge_predict(
            f_real, f_syn, step.y_syn, args.ridge, args.ridge_per_image, args.bias_column
        )
        F.mse_loss(predicted, y_real).backward(inputs=[f_syn, step.y_syn])

    @torch.no_grad()
    def embed_real():
        member.embed(x_real, args.chunk)

    def embed_distilled():
        member.embed(step.x_syn, args.chunk).backward(f_syn.detach(), inputs=[step.x_syn])

    return {
        "batch of real images": step.batch,
        "features of the real images": embed_real,
        "features of the distilled images, with gradient": embed_distilled,
        "kernels and solve, with gradient": head,
        "update of images and targets": step.adamw.step,
        "training step of the pool member": step.train,
    }


def time_parts(step):
    """Return {name: (seconds, FLOP)} of the parts of a step, each timed alone."""
    counted = parts(without_values(step))
    return {
        name: (time_call(function, step.device)[0], count_flop(counted[name]))
        for name, function in parts(step).items()
    }


def num_source_images(args):
    return max(2 * args.outer_batch, args.num_images)
