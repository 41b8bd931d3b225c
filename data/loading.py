"""Mini-batches from tensors that may exceed the memory; the next batch is prefetched."""

from concurrent.futures import ThreadPoolExecutor

import torch

MEMORY_SHARE = 0.5  # largest fraction of a GPU's free memory for a tensor


def move_if_fits(tensor, device):
    """Move `tensor` to the GPU if it takes at most half of the free memory, else return it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.to(device) if tensor.nbytes <= MEMORY_SHARE * free else tensor


class Loader:
    """Mini-batches of rows of several tensors.

    A thread gathers the next batch, unless all tensors fit on the GPU. `batches` alone determines
    the order, so a resumed run gets the same batches.

    Args:
        tensors: list of tensors of equal length.
        batches: object that draws the indices, with the methods `next` and `peek` of `Batches`.
        device: torch device of the mini-batches.
    """

    def __init__(self, tensors, batches, device):
        self.tensors, self.batches, self.device = (
            [move_if_fits(each, device) for each in tensors],
            batches,
            device,
        )
        on_cpu = any(each.device.type == "cpu" for each in self.tensors)
        self.worker = ThreadPoolExecutor(1) if on_cpu else None
        self.ahead = None  # (index, future)

    def next(self):
        """Return the next batch: a list with the rows of each tensor, on `device`."""
        index = self.batches.next()
        if self.worker is None:
            return self.rows(index)
        if self.ahead is not None and torch.equal(self.ahead[0], index):
            rows = self.ahead[1].result()
        else:
            rows = self._gather(index)
        following = self.batches.peek()
        self.ahead = (
            None if following is None else (following, self.worker.submit(self._gather, following))
        )
        return [each.to(self.device, non_blocking=True) for each in rows]

    def rows(self, index):
        """Return the rows of each tensor at `index` (b,) int64 on the CPU, on `device`."""
        return [each.to(self.device, non_blocking=True) for each in self._gather(index)]

    def _gather(self, index):
        return [gather(each, index, pin=self.device.type == "cuda") for each in self.tensors]


def gather(tensor, index, pin=False):
    """Return the rows of `tensor` at `index` (b,) int64 on the CPU.

    With `pin`, rows of a CPU tensor are in page-locked memory, for asynchronous copies to a GPU.
    """
    if tensor.device.type != "cpu":
        return tensor[index.to(tensor.device, non_blocking=True)]
    rows = tensor[index]
    return rows.pin_memory() if pin else rows
