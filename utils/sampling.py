"""Random order with a memory: index batches that go on where a stopped run left off."""

import torch

from utils import distributed
from utils.errors import UserError


class Batches:
    """Mini-batches of indices 0..n-1 in a new random order each epoch; the last batch of an epoch
    may be smaller.

    With `drop_last` that smaller batch is left out (batch norm of few images is noise). A batch
    size above n means n. With `shared` the batches are those of all ranks together, whose
    generators must be alike; each gets its part of them, and `loss_weight` is the ratio of the last
    part to an equal one. Raises UserError where a part would be empty.
    """

    def __init__(self, n, batch_size, generator, drop_last=False, shared=False):
        self.n, self.batch_size, self.generator = n, min(batch_size, n), generator
        self.per_epoch = n // self.batch_size if drop_last else -(-n // self.batch_size)
        self.order, self.position = None, self.per_epoch
        self.world_size = distributed.world_size() if shared else 1
        self.loss_weight = 1.0
        least = self.batch_size if drop_last else (n - 1) % self.batch_size + 1
        if least < self.world_size:
            raise UserError(
                f"a batch of {least} images is too small for {self.world_size} processes"
            )

    def next(self):
        """The next batch of indices, (b,) int64 on the CPU."""
        if self.position == self.per_epoch:
            self.order, self.position = torch.randperm(self.n, generator=self.generator), 0
        batch, whole = self.peek(), len(self._global_batch())
        self.loss_weight = len(batch) * self.world_size / whole
        self.position += 1
        return batch

    def peek(self):
        """What `next` will return, or None at the end of an epoch, when the next order is not drawn
        yet."""
        if self.position == self.per_epoch:
            return None
        return self._global_batch().tensor_split(self.world_size)[
            distributed.rank() if self.world_size > 1 else 0
        ]

    def _global_batch(self):
        return self.order[self.position * self.batch_size : (self.position + 1) * self.batch_size]

    def state_dict(self):
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state):
        self.order, self.position = state["order"], state["position"]


class Randomness:
    """The random states of a run: one CPU generator for orders and draws, one on the device for
    augmentation, and torch's global one, which initialises networks (on the CPU). All start from
    one seed; with `per_rank`, those of each rank from another."""

    def __init__(self, seed, device, per_rank=False):
        seed += 1_000_003 * distributed.rank() if per_rank else 0
        torch.manual_seed(seed)
        self.cpu = torch.Generator().manual_seed(seed)
        self.device = torch.Generator(device).manual_seed(seed + 1)

    def reseed_for_rank(self):
        """Before a step that ranks share: give each its own draws for its part of the batch. The
        states stay alike, so that any number of ranks can go on from them."""
        if distributed.world_size() > 1:
            self.device.manual_seed(
                int(torch.randint(2**31, ())) + distributed.rank()
            )  # orders stay as of one process

    def state_dict(self):
        return {
            "cpu": self.cpu.get_state(),
            "device": self.device.get_state(),
            "global": torch.get_rng_state(),
        }

    def load_state_dict(self, state):
        self.cpu.set_state(state["cpu"])
        self.device.set_state(state["device"])
        torch.set_rng_state(state["global"])
