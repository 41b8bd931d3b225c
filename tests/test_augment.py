"""Augmentations are reproducible, differ between images, and agree with torchvision's."""

import colorsys

import pytest
import torch
import torchvision.transforms.functional as TF

from data import augment


def make_batch(n=6, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


ALL = {
    "random_crop": augment.random_crop,
    "horizontal_flip": augment.horizontal_flip,
    "random_resized_crop": augment.random_resized_crop,
    "color_jitter": augment.color_jitter,
    "greyscale": lambda x, g: augment.greyscale(x, g, 0.5),
    "solarise": lambda x, g: augment.solarise(x, g, 0.5),
    "diff_augment": augment.diff_augment,
}


@pytest.mark.parametrize("name", ALL)
def test_augmentation_is_reproducible_draws_per_image_and_keeps_its_input(name):
    x = make_batch(1).expand(16, 3, 32, 32).contiguous()
    kept = x.clone()
    first, again, other = (ALL[name](x, make_generator(seed)) for seed in (3, 3, 4))
    assert first.shape == x.shape and torch.equal(first, again) and torch.equal(x, kept)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 1  # equal images, different draws
    if name != "diff_augment":
        assert first.min() >= 0 and first.max() <= 1 + 1e-6


def test_resized_crop_equals_torchvision_on_whole_pixel_boxes():
    x = make_batch(4)
    top, left, height, width = torch.tensor(
        [[0, 5, 10, 3], [0, 7, 2, 4], [32, 9, 16, 20], [32, 13, 30, 8]]
    ).float()
    ours = augment.resize_boxes(x, top, left, height, width)
    for i in range(4):
        box = [int(v[i]) for v in (top, left, height, width)]
        theirs = TF.resized_crop(x[i], *box, [32, 32], antialias=False)
        torch.testing.assert_close(ours[i], theirs, rtol=1e-4, atol=1e-4)


def test_crop_boxes_fit_and_cover_the_range_of_sizes():
    top, left, height, width = augment.crop_boxes(
        5000, 32, make_generator(), torch.device("cpu"), (0.08, 1.0), (3 / 4, 4 / 3)
    )
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + height <= 32).all()
        and (left + width <= 32).all()
    )
    share = height * width / 32**2
    assert 0.05 < share.min() < 0.1 and share.max() > 0.95 and 0.45 < share.mean() < 0.6


def test_random_crop_is_a_window_of_the_padded_image():
    x = make_batch(40, size=8)
    ours = augment.random_crop(x, make_generator(), padding=4)
    padded = torch.nn.functional.pad(x, [4] * 4)
    places = set()
    for i in range(len(x)):
        windows = padded[i].unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 9, 9, 8, 8)
        found = (windows == ours[i][:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
        assert found
        places.add(tuple(found[0]))
    assert len(places) > 15


def test_flip_greyscale_and_solarise_equal_their_formulas():
    x = make_batch()
    assert torch.equal(augment.horizontal_flip(x, make_generator(), 1.0), x.flip(3))
    assert torch.equal(augment.horizontal_flip(x, make_generator(), 0.0), x)
    torch.testing.assert_close(
        augment.greyscale(x, make_generator(), 1.0), TF.rgb_to_grayscale(x, 3), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(augment.solarise(x, make_generator(), 1.0), TF.solarize(x, 0.5))


def test_hue_equals_the_hsv_formula():
    x = make_batch(2, size=4)
    x[0, :, 0, 0] = 0.5  # a grey pixel has no hue
    turn = torch.tensor([0.1, -0.07])
    ours = augment.shift_hue(x, turn)
    for i in range(2):
        for pixel, result in zip(
            x[i].flatten(1).T.tolist(), ours[i].flatten(1).T.tolist(), strict=True
        ):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert result == pytest.approx(
                colorsys.hsv_to_rgb((h + turn[i].item()) % 1, s, v), abs=1e-5
            )


def test_blends_equal_torchvision():
    x, factor = make_batch(3), torch.tensor([0.6, 1.0, 1.4])
    grey = augment.to_grey(x)
    for i in range(3):
        saturated = TF.adjust_saturation(x[i], factor[i].item())
        torch.testing.assert_close(
            augment.blend(x, grey, factor)[i], saturated, rtol=1e-3, atol=1e-3
        )
        contrasted = TF.adjust_contrast(x[i], factor[i].item())
        mean = grey.mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(
            augment.blend(x, mean, factor)[i], contrasted, rtol=1e-3, atol=1e-3
        )


def find_seed(operation):
    """Return a seed that selects `operation` among the six differentiable augmentations."""
    index = augment.DIFF_AUGMENTATIONS.index(operation)
    return next(
        s for s in range(100) if int(torch.randint(6, (1,), generator=make_generator(s))) == index
    )


@pytest.mark.parametrize("operation", augment.DIFF_AUGMENTATIONS, ids=lambda f: f.__name__)
def test_siamese_augmentation_is_the_same_for_all_batches_and_differentiable(operation):
    x, seed = make_batch(5), find_seed(operation)
    real, synthetic = augment.diff_augment_alike(make_generator(seed), torch.cat([x, x]), x)
    torch.testing.assert_close(real[:5], synthetic)
    torch.testing.assert_close(real[5:], synthetic)
    x.requires_grad_()
    augment.diff_augment(x, make_generator(seed)).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("operation", augment.DIFF_AUGMENTATIONS, ids=lambda f: f.__name__)
def test_next_batches_get_another_siamese_transform(operation):
    x, g = make_batch(3), make_generator(find_seed(operation))
    (real, synthetic), again = augment.diff_augment_alike(g, torch.cat([x.flip(0), x]), x), []
    torch.testing.assert_close(real[3:], synthetic)
    for _ in range(20):
        again.append(augment.diff_augment_alike(g, x)[0])
    assert not all(torch.equal(each, synthetic) for each in again)
    expected = make_generator(find_seed(operation))
    augment.diff_augment_alike(expected, x)
    once = make_generator(find_seed(operation))
    augment.diff_augment_alike(once, x, x, x)
    assert torch.equal(once.get_state(), expected.get_state())  # the state after one draw


def test_cutout_clears_half_a_side_and_rotation_keeps_the_centre():
    x = torch.ones(1, 3, 32, 32)
    middle = torch.full((4, 1), 0.5)
    assert augment._cutout(x, middle)[0, 0].eq(0).sum() == 16 * 16
    torch.testing.assert_close(augment._rotate(x, middle), x)
    assert augment._crop(x, torch.zeros(4, 1))[0, 0, :4].eq(0).all()
