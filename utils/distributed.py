"""Communication between the processes of one run, which torchrun starts.

A single process has rank 0 and world size 1, and nothing is communicated. With several
processes, all of them must call the same functions in the same order. If a process ends early, the
functions raise UserError in the remaining processes.
"""

import contextlib
import io
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError

TIMEOUT = timedelta(hours=1)  # the main process may decode a data set first


def world_size():
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Return the rank of this process, starting at 0."""
    return int(os.environ.get("RANK", 0))


def is_main_process():
    """Whether this process is rank 0, which prints and writes files."""
    return rank() == 0


def initialise(kind):
    """Join the process group.

    Args:
        kind: device type; cpu or cuda with several processes.

    Returns:
        torch device of this process.

    Raises:
        UserError: if `kind` does not support several processes, or if there are fewer GPUs than
            processes.
    """
    if world_size() == 1:
        return torch.device(kind)
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {kind}: does not support several processes; use --device cpu")
    device, backend = torch.device(kind), "gloo"
    if kind == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"at least {local + 1} processes on a machine with {gpus} GPUs")
        device, backend = torch.device(kind, local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with _report_lost_peers():
            dist.init_process_group(backend, timeout=TIMEOUT)
        if not is_main_process():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return device


def shutdown():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _report_lost_peers():
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no more specific error class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            "another process of this job cannot be reached; rerun the same command to resume "
            f"({reason})"
        ) from error


def all_reduce_max(value):
    """Return the maximum over all ranks of an integer, or of each entry of a list of integers."""
    if world_size() == 1:
        return value
    box = torch.tensor(value)
    with _report_lost_peers():
        dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.tolist()


def all_reduce_mean(tensors):
    """Replace each tensor in place by its mean over all ranks, in one collective operation."""
    if world_size() == 1:
        return
    flat = torch.cat([each.reshape(-1) for each in tensors])
    with _report_lost_peers():
        dist.all_reduce(flat)
    flat /= world_size()
    for each, part in zip(tensors, flat.split([each.numel() for each in tensors]), strict=True):
        each.copy_(part.view(each.shape))


def broadcast(tensors):
    """Replace each tensor in place by that of rank 0."""
    for each in tensors if world_size() > 1 else ():
        whole = each.contiguous()
        with _report_lost_peers():
            dist.broadcast(whole, 0)
        each.copy_(whole)


def backward(loss, weights, share=1.0):
    """Compute the gradients of the mean over all ranks of `share * loss`.

    Args:
        loss: scalar tensor, usually the mean over this rank's images.
        weights: parameters, whose `grad` receives the mean gradients.
        share: number of this rank's images divided by the mean number per rank. The result is then
            the mean over the whole batch. 1 for a loss that all ranks compute together.

    Returns:
        The mean as a detached scalar tensor.
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
    """Return the sum of `x` over all ranks.

    Differentiable: the gradient with respect to one rank's `x` is that of the sum of all losses.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def run_on_main(function):
    """Call `function()` on rank 0 and return its result on all ranks.

    If it raises UserError on rank 0, the other ranks exit with code 2.
    """
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
    """Return the list of all ranks' `content` on rank 0, with tensors on the CPU; [] elsewhere."""
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
