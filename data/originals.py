"""A prepared data set's images at another size, decoded from the raw files."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from data import raw as raw_images
from data.images import to_float
from data.prepare import decode, without_damaged
from utils.errors import UserError


def resize(x, size):
    """Pixels (b, 3, S, S) in [0, 1] at `size` pixels a side: bicubic, antialiased, clamped."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class Originals:
    """The images of an `ImageSet`, in its order, at another size.

    The raw files are decoded at that size (Lanczos, no crop), so that nothing is lost on the way
    through the smaller prepared copy. Where the raw files are gone, the prepared images are
    resized, and `from_raw` is False.
    """

    def __init__(self, images, split, size, root):
        self.images, self.size, self.raw = images, size, None
        if images.image_size != size:
            self.raw = _raw_images(images, split, root)
        self.from_raw = self.raw is not None or images.image_size == size

    def batches(self, starts, batch_size):
        """Yield pixels (b, 3, size, size) in [0, 1] from each of `starts`, a batch ahead."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = None
            for start, following in zip(starts, [*starts[1:], None], strict=True):
                batch = ahead or self._submit(pool, start, batch_size)
                ahead = None if following is None else self._submit(pool, following, batch_size)
                yield self._pixels(batch, start, batch_size)

    def _submit(self, pool, start, batch_size):
        rows = range(start, min(start + batch_size, len(self.images)))
        return [pool.submit(decode, self.raw[row], self.size) for row in rows] if self.raw else rows

    def _pixels(self, batch, start, batch_size):
        if self.raw is None:
            return resize(to_float(self.images.pixels[start : start + batch_size]), self.size)
        decoded = [each.result() for each in batch]
        if any(each is None for each in decoded):
            row = start + next(i for i, each in enumerate(decoded) if each is None)
            raise UserError(f"{self.raw[row]}: cannot be decoded any more")
        return to_float(torch.from_numpy(np.stack(decoded)))


def _raw_images(images, split, root):
    """Paths or arrays of the images that were prepared, in order; None where they are missing."""
    try:
        raw = raw_images.read(images.place, split, root)
    except (UserError, OSError) as error:
        print(f"{images.name}: raw images not found, the prepared ones are enlarged ({error})")
        return None
    kept = without_damaged(raw.images, images.damaged)
    if len(kept) != len(images):
        raise UserError(
            f"{images.name}: {len(kept)} raw images, but {len(images)} prepared ones; delete "
            "its folder below prepared/ to prepare it again"
        )
    return kept
