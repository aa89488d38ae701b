"""Augmentation: a function of the generator alone, image by image, that does what its name says."""

import pytest
import torch

from subtuning_lab.data.augment import AUGMENTATIONS, augment, resize_to
from subtuning_lab.utils.random import Stream, seeded

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [None, 12])
def test_views_repeat_and_stay_in_range(name, size):
    first, again = (augment(IMAGES, name, size, seeded(Stream.VIEW, 1, 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (16, 3, size or 16, size or 16) and first.dtype == IMAGES.dtype
    assert first.min() >= -1e-9 and first.max() <= 1 + 1e-9
    if name != "none":
        assert not torch.equal(first, augment(IMAGES, name, size, seeded(Stream.VIEW, 1, 3)))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_does_not_see_its_neighbours(name):
    other = IMAGES.clone()
    other[1:] = 0
    first, again = (augment(images, name, None, seeded(Stream.VIEW, 5))[0] for images in (IMAGES, other))
    assert torch.equal(first, again)


def test_none_keeps_images_and_flip_mirrors_half_of_them():
    assert torch.equal(augment(IMAGES, "none", None, seeded(Stream.VIEW, 0)), IMAGES)
    many = IMAGES[:1].expand(400, -1, -1, -1)
    views = augment(many, "flip", None, seeded(Stream.VIEW, 0))
    kept = (views - many).abs().amax((1, 2, 3)) < 1e-6
    mirrored = (views - many.flip(3)).abs().amax((1, 2, 3)) < 1e-6
    assert (kept ^ mirrored).all() and 150 < int(kept.sum()) < 250


def test_a_shift_moves_by_at_most_an_eighth_of_the_side():
    """A single bright column in the middle stays within two of sixteen pixels."""
    images = torch.zeros(200, 3, 16, 16)
    images[..., 8] = 1
    views = augment(images, "shift", None, seeded(Stream.VIEW, 0))
    place = (views[:, 0, 8] * torch.arange(16)).sum(1) / views[:, 0, 8].sum(1)
    assert (place - 8).abs().max() <= 2 + 1e-4 and (place - 8).abs().max() > 1.5
    assert torch.allclose(views.sum((2, 3)), images.sum((2, 3)), atol=1e-3)


def test_a_crop_shows_a_part_of_the_image():
    ramp = torch.linspace(0, 1, 16).expand(300, 3, 16, 16)
    views = augment(ramp, "crop_flip", None, seeded(Stream.VIEW, 0))
    span = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert (span < 1).any() and span.min() > 0.4  # sides from sqrt(0.35 x 3 / 4) of the image


def test_resizing_keeps_constant_images_and_the_size_asked_for():
    grey = torch.full((2, 3, 9, 9), 0.3)
    assert torch.allclose(resize_to(grey, 5), torch.full((2, 3, 5, 5), 0.3)) and resize_to(grey, 9) is grey
    assert resize_to(grey, None) is grey
    # antialiasing: a fine checkerboard turns grey
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    assert (resize_to(board.expand(1, 3, 32, 32).float(), 8)[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.05


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'rotate'; it must be one of none, flip, shift"):
        augment(IMAGES, "rotate", None, seeded(Stream.VIEW, 0))
