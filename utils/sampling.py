"""Random mini-batches and random generators whose state can be saved and restored."""

import torch

from utils import distributed
from utils.errors import UserError


class Batches:
    """Mini-batches of the indices 0, ..., n - 1 in a new random order each epoch.

    The last batch of an epoch may be smaller.

    Args:
        n: number of indices.
        batch_size: indices per batch; a larger value than n means n.
        generator: CPU generator of the order.
        drop_last: drop the smaller last batch, whose batch statistics would be noisy.
        shared: split each batch among all ranks, whose generators must have equal states.

    Attributes:
        per_epoch: number of batches per epoch.
        loss_weight: size of this rank's part of the last batch divided by the mean size of a part.

    Raises:
        UserError: if a rank's part of a batch would be empty.
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
        """Return the next batch of indices, (b,) int64 on the CPU."""
        if self.position == self.per_epoch:
            self.order, self.position = torch.randperm(self.n, generator=self.generator), 0
        batch, whole = self.peek(), len(self._global_batch())
        self.loss_weight = len(batch) * self.world_size / whole
        self.position += 1
        return batch

    def peek(self):
        """Return the batch that `next` will return, or None at the end of an epoch.

        The order of the next epoch is drawn by `next`.
        """
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
    """Random generators of a run, whose states go into its checkpoints.

    torch's global generator initialises networks, on the CPU. All generators derive from one seed.

    Args:
        seed: seed of the run.
        device: torch device of the run.
        per_rank: use another seed on each rank.

    Attributes:
        cpu: CPU generator, for orders and draws.
        device: generator on the device, for augmentation.
    """

    def __init__(self, seed, device, per_rank=False):
        seed += 1_000_003 * distributed.rank() if per_rank else 0
        torch.manual_seed(seed)
        self.cpu = torch.Generator().manual_seed(seed)
        self.device = torch.Generator(device).manual_seed(seed + 1)

    def reseed_for_rank(self):
        """Reseed the device generator, so that each rank draws its own augmentation.

        Call it before each step on a shared batch. The CPU generators keep equal states on all
        ranks, so orders are those of a single process and any number of ranks can resume the run.
        """
        if distributed.world_size() > 1:
            self.device.manual_seed(int(torch.randint(2**31, ())) + distributed.rank())

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
