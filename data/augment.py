"""Random augmentation of batches, on the batch's device.

Batches are (b, 3, S, S) float. Each image gets its own random draw from the given generator. Inputs
are pixels in [0, 1], except for `diff_augment`, which takes normalised images.
"""

import math

import torch
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of red, green, blue


def uniform(x, generator, low=0.0, high=1.0):
    """Draw uniformly from [low, high): one value per image of `x`, (b,)."""
    unit = torch.rand(len(x), generator=generator, device=x.device).to(x.dtype)
    return unit * (high - low) + low


def cpu_generator(x, generator):
    """Return a generator for draws that the CPU reads; None is torch's global generator.

    Reading a draw on another device would wait for that device.
    """
    return generator if x.device.type == "cpu" else None


def per_image(values):
    """Reshape (b,) to (b, 1, 1, 1)."""
    return values[:, None, None, None]


def shifted_windows(x, top, left, padding):
    """Pad each image with zeros and cut out an S x S window.

    Args:
        x: (b, 3, S, S).
        top, left: (b,) int64 positions of the windows in the padded images, 0 to 2 * padding.
        padding: pixels on each side.
    """
    size = x.shape[-1]
    padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)  # (b, S+2p, S+2p, 3)
    span = torch.arange(size, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    return padded[image, rows, columns].permute(0, 3, 1, 2)


def random_crop(x, generator, padding=4):
    """Pad with zeros and crop at a random position to the original size (fine-tuning recipe)."""
    top, left = torch.randint(0, 2 * padding + 1, (2, len(x)), generator=generator, device=x.device)
    return shifted_windows(x, top, left, padding)


def horizontal_flip(x, generator, p=0.5):
    """Flip each image horizontally with probability `p`."""
    return torch.where(per_image(uniform(x, generator) < p), x.flip(3), x)


def crop_boxes(n, size, generator, device, scale, ratio):
    """Draw boxes of random area and aspect ratio, as in Inception training.

    Each box is the first of ten draws that fits into the image, else the whole image.

    Args:
        n: number of boxes.
        size: S, height and width of the images in pixels.
        generator, device: generator and its device.
        scale: range of the area as a fraction of the image.
        ratio: range of the aspect ratio.

    Returns:
        top, left, height, width: (n,) each, in whole pixels.
    """
    area = (
        size
        * size
        * (torch.rand(n, 10, generator=generator, device=device) * (scale[1] - scale[0]) + scale[0])
    )
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (torch.rand(n, 10, generator=generator, device=device) * (high - low) + low).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width >= 1) & (width <= size) & (height >= 1) & (height <= size)
    first = fits.int().argmax(1, keepdim=True)
    width = torch.where(fits.any(1), width.gather(1, first)[:, 0], size)
    height = torch.where(fits.any(1), height.gather(1, first)[:, 0], size)
    place = torch.rand(2, n, generator=generator, device=device)
    return (
        (place[0] * (size - height + 1)).floor(),
        (place[1] * (size - width + 1)).floor(),
        height,
        width,
    )


def resize_boxes(x, top, left, height, width):
    """Resize one box of each image to S x S with bilinear interpolation."""
    size = x.shape[-1]
    # Maps output to input coordinates, both in [-1, 1].
    theta = torch.zeros(len(x), 2, 3, device=x.device, dtype=x.dtype)
    theta[:, 0, 0], theta[:, 0, 2] = width / size, (2 * left + width) / size - 1
    theta[:, 1, 1], theta[:, 1, 2] = height / size, (2 * top + height) / size - 1
    # Clamp samples to the box, so that pixels outside the crop have no influence.
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    least = torch.stack([2 * left + 1, 2 * top + 1], 1)[:, None, None] / size - 1
    most = (
        torch.stack([2 * (left + width) - 1, 2 * (top + height) - 1], 1)[:, None, None] / size - 1
    )
    return F.grid_sample(
        x, grid.clamp(least, most), mode="bilinear", padding_mode="border", align_corners=False
    )


def random_resized_crop(x, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Crop each image to a random box (`crop_boxes`) and resize it to S x S."""
    return resize_boxes(x, *crop_boxes(len(x), x.shape[-1], generator, x.device, scale, ratio))


def to_grey(x):
    """Return the luma (b, 1, S, S) of `x` (b, 3, S, S)."""
    weights = torch.tensor(GREY, dtype=x.dtype).to(x.device, non_blocking=True)
    return (x * weights[:, None, None]).sum(1, keepdim=True)


def blend(x, y, factor):
    """Return factor * x + (1 - factor) * y, clamped to [0, 1], for `factor` (b,)."""
    return torch.lerp(y.expand_as(x), x, per_image(factor)).clamp(0, 1)


def shift_hue(x, turn):
    """Rotate each image's hue in HSV by `turn` (b,), a fraction of the full circle."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)  # (b, S, S)
    red, green, blue = x.unbind(1)
    # Grey has no hue: avoid 0 / 0, also in the gradient.
    divisor = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixth = sixth + 6 * turn[:, None, None]
    # 5, 3, 1 for red, green, blue
    offsets = torch.arange(5, 0, -2, device=x.device, dtype=x.dtype)[:, None, None]
    k = (sixth[:, None] + offsets) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x, generator, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8):
    """Jitter brightness, contrast, saturation and hue of each image with probability `p`.

    Each image gets its own factors. The order of the operations is drawn once for the batch.
    """
    jittered = x
    for operation in torch.randperm(4, generator=cpu_generator(x, generator)).tolist():
        if operation == 0:
            factor = uniform(x, generator, 1 - brightness, 1 + brightness)
            jittered = (jittered * per_image(factor)).clamp(0, 1)
        elif operation == 1:
            mean = to_grey(jittered).mean((1, 2, 3), keepdim=True)
            jittered = blend(jittered, mean, uniform(x, generator, 1 - contrast, 1 + contrast))
        elif operation == 2:
            jittered = blend(
                jittered, to_grey(jittered), uniform(x, generator, 1 - saturation, 1 + saturation)
            )
        else:
            jittered = shift_hue(jittered, uniform(x, generator, -hue, hue))
    return torch.where(per_image(uniform(x, generator) < p), jittered, x)


def greyscale(x, generator, p=0.2):
    """Convert each image to grey with probability `p`."""
    return torch.where(per_image(uniform(x, generator) < p), to_grey(x).expand_as(x), x)


def solarise(x, generator, p):
    """With probability `p` for each image, invert the values of at least 0.5."""
    return torch.where(per_image(uniform(x, generator) < p) & (x >= 0.5), 1 - x, x)


# Differentiable augmentation (Zhao and Bilen, 2021), strategy color_crop_cutout_flip_scale_rotate.
# Each function takes `u` (4, b): four numbers in [0, 1) per image.


def _color(x, u):
    x = x + per_image(u[0] - 0.5)  # brightness 1.0
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * per_image(2.0 * u[1]) + mean  # saturation 2.0
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * per_image(u[2] + 0.5) + mean  # contrast 0.5


def _crop(x, u):
    most = int(x.shape[-1] * 0.125 + 0.5)
    top, left = (u[:2] * (2 * most + 1)).long()
    return shifted_windows(x, top, left, most)


def _cutout(x, u):
    size = x.shape[-1]
    side = int(size * 0.5 + 0.5)
    # (2, b, 1); part of the square may lie outside the image.
    centre = (u[:2] * (size + 1 - side % 2)).floor()[:, :, None]
    span = torch.arange(size, device=x.device)
    rows, columns = (span >= centre - side // 2) & (span < centre - side // 2 + side)
    return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _flip(x, u):
    return torch.where(per_image(u[0] < 0.5), x.flip(3), x)


def _affine(x, matrix):
    """Transform about the centre by the matrix ((a, b), (c, d)), whose entries are (b,)."""
    (a, b), (c, d) = matrix
    zero = torch.zeros_like(a)
    theta = torch.stack([torch.stack([a, b, zero], 1), torch.stack([c, d, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


def _scale(x, u):
    horizontal, vertical = u[:2] * (1.2 - 1 / 1.2) + 1 / 1.2
    zero = torch.zeros_like(horizontal)
    return _affine(x, ((horizontal, zero), (zero, vertical)))


def _rotate(x, u):
    angle = (u[0] - 0.5) * 2 * math.radians(15)
    return _affine(x, ((angle.cos(), angle.sin()), (-angle.sin(), angle.cos())))


DIFF_AUGMENTATIONS = (_color, _crop, _cutout, _flip, _scale, _rotate)


def _draw(x, count, generator):
    """Draw one of `DIFF_AUGMENTATIONS`, and `count` strengths (4, count) on the device of `x`."""
    which = torch.randint(len(DIFF_AUGMENTATIONS), (1,), generator=cpu_generator(x, generator))
    u = torch.rand(4, count, generator=generator, device=x.device).to(x.dtype)
    return DIFF_AUGMENTATIONS[int(which)], u


def diff_augment(x, generator):
    """Apply one of six augmentations, drawn for the batch, with its own strength for each image.

    Differentiable in `x`. Zhao and Bilen, "Dataset Condensation with Differentiable Siamese
    Augmentation", ICML 2021.

    Args:
        x: (b, 3, S, S) normalised images.
        generator: generator on the device of `x`.
    """
    transform, u = _draw(x, len(x), generator)
    return transform(x, u)


def diff_augment_alike(generator, *batches):
    """Augment several batches with the same draw, for all images of all batches; return a list."""
    transform, u = _draw(batches[0], 1, generator)
    return [transform(x, u.expand(4, len(x))) for x in batches]


def barlow_twins_view(x, generator, settings, p_solarise):
    """Return one random view of pixels (b, 3, S, S), for Barlow Twins.

    Args:
        x: pixels in [0, 1].
        generator: generator on the device of `x`.
        settings: has `crop_min`, `jitter`, `greyscale` and `flip`.
        p_solarise: probability of solarisation.
    """
    x = random_resized_crop(x, generator, scale=(settings.crop_min, 1.0))
    x = color_jitter(x, generator, p=settings.jitter)
    x = greyscale(x, generator, p=settings.greyscale)
    x = solarise(x, generator, p=p_solarise)
    return horizontal_flip(x, generator, p=settings.flip)
