"""The processes of one run, as torchrun starts them: who they are, and what they tell each other.

A process on its own has rank 0 of 1: every function here then returns at once what it was given. Of
several, all call the same functions in the same order. Raises UserError in those that are left when
one of them has ended.
"""

import contextlib
import io
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError

TIMEOUT = timedelta(hours=1)  # the first rank may decode a data set meanwhile


def world_size():
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, from 0."""
    return int(os.environ.get("RANK", 0))


def is_main_process():
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def initialise(kind):
    """Join the others on devices of `kind` (cpu or cuda); returns this process's device."""
    if world_size() == 1:
        return torch.device(kind)
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {kind}: for one process only; give --device cpu")
    device, backend = torch.device(kind), "gloo"
    if kind == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"{local + 1} processes or more on a machine with {gpus} GPUs")
        device, backend = torch.device(kind, local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with _report_lost_peers():
            dist.init_process_group(backend, timeout=TIMEOUT)
        if not is_main_process():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return device


def shutdown():
    """Leave the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _report_lost_peers():
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL, which have no class of their own for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            "another process of this job cannot be reached, so it ends; the same command goes on "
            f"({reason})"
        ) from error


def all_reduce_max(value):
    """The largest of all ranks' integers, or of each place in a list of them."""
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    with _report_lost_peers():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.tolist()


def all_reduce_mean(tensors):
    """Replace each tensor by its mean over all ranks, in one collective."""
    if world_size() == 1:
        return
    flat = torch.cat([each.reshape(-1) for each in tensors])
    with _report_lost_peers():
        dist.all_reduce(flat)
    flat /= world_size()
    for each, part in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
        each.copy_(part.view(each.shape))


def broadcast(tensors):
    """Replace each tensor by that of the first rank."""
    for each in tensors if world_size() > 1 else ():
        whole = each.contiguous()
        with _report_lost_peers():
            dist.broadcast(whole, 0)
        each.copy_(whole)


def backward(loss, weights, share=1.0):
    """Leave in `weights` the gradients of the mean over all ranks of `share * loss`, and return
    that mean ().

    With `share` the ratio of this rank's images to an equal part of the batch and `loss` a mean
    over these images, that is the mean over the batch. A loss that all ranks have computed together
    (`total`) is its own mean.
    """
    if world_size() == 1:
        loss.backward()
        return loss
    loss = share * loss
    loss.backward()
    mean = loss.detach().clone()
    all_reduce_mean([mean, *(each.grad for each in weights if each.grad is not None)])
    return mean


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        with _report_lost_peers():
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _AllReduceSum.apply(gradient)


def all_reduce_sum(x):
    """The sum of all ranks' `x`, differentiable: the gradient by one rank's `x` is that of the sum
    of all losses."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def run_on_main(function):
    """What `function()` returns on the first rank. Where it raises UserError there, the other ranks
    end silently."""
    if world_size() == 1:
        return function()
    result, error = None, None
    if is_main_process():
        try:
            result = function()
        except UserError as raised:
            error = raised
    box = [_serialise(result), error is not None]
    with _report_lost_peers():
        dist.broadcast_object_list(box)
    if error:
        raise error
    if box[1]:
        raise SystemExit(2)
    return result if is_main_process() else _deserialise(box[0])


def gather(content):
    """All ranks' `content` in a list, with tensors on the CPU, on rank 0; [] on the others."""
    if world_size() == 1:
        return [content]
    boxes = [None] * world_size() if is_main_process() else None
    with _report_lost_peers():
        dist.gather_object(_serialise(content), boxes)
    return [_deserialise(box) for box in boxes or ()]


def _serialise(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _deserialise(box):
    return torch.load(io.BytesIO(box), map_location="cpu", weights_only=True)
