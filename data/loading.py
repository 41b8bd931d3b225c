"""Mini-batches from tensors that may be far larger than memory, the next batch copied while the
present one is used."""

from concurrent.futures import ThreadPoolExecutor

import torch

ROOM = 0.5  # share of a GPU's free memory that a source may take


def move_if_fits(tensor, device):
    """`tensor` on the GPU as a whole where it takes at most half of the free memory there, else
    where it is."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor
    free, _ = torch.cuda.mem_get_info(device)
    return tensor.to(device) if tensor.nbytes <= ROOM * free else tensor


class Loader:
    """Rows of several tensors of equal length, at the indices that a `Batches` draws.

    `next()` returns one tensor per tensor, on `device`. Tensors that stay on disk or in memory are
    gathered by a thread, a batch ahead; the order of draws is that of `batches` alone, so a resumed
    run sees the same batches.
    """

    def __init__(self, tensors, batches, device):
        self.tensors, self.batches, self.device = (
            [move_if_fits(each, device) for each in tensors],
            batches,
            device,
        )
        self.worker = ThreadPoolExecutor(1)
        self.ahead = None  # (index, future)

    def next(self):
        index = self.batches.next()
        if self.ahead is not None and torch.equal(self.ahead[0], index):
            rows = self.ahead[1].result()
        else:
            rows = self._gather(index)
        following = self.batches.peek()
        self.ahead = (
            None if following is None else (following, self.worker.submit(self._gather, following))
        )
        return [each.to(self.device, non_blocking=True) for each in rows]

    def _gather(self, index):
        return [gather(each, index, pin=self.device.type == "cuda") for each in self.tensors]


def gather(tensor, index, pin=False):
    """Rows of `tensor` at `index` (b,) int64 on the CPU; in page-locked memory if `pin` and the
    tensor is on the CPU, so that the copy to a GPU need not be waited for."""
    if tensor.is_cuda:
        return tensor[index.to(tensor.device, non_blocking=True)]
    rows = tensor[index]
    return rows.pin_memory() if pin else rows
