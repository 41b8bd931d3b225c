"""Images of a prepared data set at another size, decoded from the raw files."""

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
    """Resize pixels (b, 3, S, S) in [0, 1] to (b, 3, size, size): bicubic, antialiased, clamped."""
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class Originals:
    """Images of an `ImageSet`, in its order, at another size.

    The raw files are decoded at that size (Lanczos filter, no crop), because the prepared images
    may be smaller. If the raw files are missing, the prepared images are resized.

    Args:
        images: `ImageSet`.
        split: train or test.
        size: height and width in pixels.
        root: path of the data root.

    Attributes:
        from_raw: whether no prepared image is resized.
    """

    def __init__(self, images, split, size, root):
        self.images, self.size, self.raw = images, size, None
        if images.image_size != size:
            self.raw = _raw_images(images, split, root)
        self.from_raw = self.raw is not None or images.image_size == size

    def batches(self, starts, batch_size):
        """Yield batches of pixels (b, 3, size, size) in [0, 1]; threads decode the next batch.

        Args:
            starts: index of the first image of each batch.
            batch_size: images per batch; the last batch may be smaller.
        """
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
            raise UserError(f"{self.raw[row]}: cannot be decoded, although it was decoded before")
        return to_float(torch.from_numpy(np.stack(decoded)))


def _raw_images(images, split, root):
    """Return the raw images (paths or arrays) in the order of `images`, or None if missing."""
    try:
        raw = raw_images.read(images.place, split, root)
    except (UserError, OSError) as error:
        print(f"{images.name}: raw images not found; resizing the prepared images ({error})")
        return None
    kept = without_damaged(raw.images, images.damaged)
    if len(kept) != len(images):
        raise UserError(
            f"{images.name}: {len(kept)} raw images, but {len(images)} prepared images; delete "
            "the set's folder in prepared/ to prepare it again"
        )
    return kept
