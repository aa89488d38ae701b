"""Corruptions against their published formulas: moments of the noises, and colour maps pixel by pixel."""

import colorsys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from subtuning_lab.data.corruptions import filters
from subtuning_lab.data.corruptions.digital import box_matrix
from subtuning_lab.data.corruptions.registry import (
    COMMON_CORRUPTIONS,
    CORRUPTION_FAMILIES,
    EXTRA_CORRUPTIONS,
    corrupt,
    corruption_names,
)

SMALL, LARGE = 32, 80  # pixels: CIFAR-10-C's and ImageNet-C's parameters
# As published: (CIFAR-10-C, ImageNet-C) at severity 1 to 5.
SCALE = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": ((0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturate": (
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
CASES = [(side, severity) for side in (SMALL, LARGE) for severity in (1, 2, 3, 4, 5)]


def published(name: str, side: int, severity: int):
    return SCALE[name][side > 64][severity - 1]


def flat(value: int, side: int, n: int = 8) -> torch.Tensor:
    return torch.full((n, 3, side, side), value, dtype=torch.uint8)


def photos(side: int, n: int = 2) -> torch.Tensor:
    images = np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    images[:, :, 0, :4] = np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255], [255, 0, 0]]).T  # black, greys, pure
    return torch.from_numpy(images)


def unit(images: torch.Tensor) -> np.ndarray:
    """Values in [0, 1], with the half step back that cutting to 8 bits takes on average."""
    return (images.double().numpy() + 0.5) / 255


def test_all_nineteen_are_offered_in_four_families():
    assert corruption_names() == COMMON_CORRUPTIONS + EXTRA_CORRUPTIONS
    assert (len(COMMON_CORRUPTIONS), len(EXTRA_CORRUPTIONS)) == (15, 4)
    members = [name for family in CORRUPTION_FAMILIES.values() for name in family]
    assert sorted(members) == sorted(corruption_names())
    assert [family[-1] for family in CORRUPTION_FAMILIES.values()] == list(EXTRA_CORRUPTIONS)


def clipped_normal_std(scale: float, low: float, high: float) -> float:
    draws = np.random.default_rng(1).normal(0, scale, 200_000)
    return float(np.clip(draws, low, high).std())


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_gaussian_noise_has_its_standard_deviation(side, severity):
    noisy = unit(corrupt(flat(128, side), "gaussian_noise", severity))
    scale = published("gaussian_noise", side, severity)
    assert noisy.mean() == pytest.approx(128 / 255, abs=0.01)
    assert noisy.std() == pytest.approx(clipped_normal_std(scale, -128 / 255, 127 / 255), rel=0.03)


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_speckle_noise_grows_with_the_pixel(side, severity):
    scale = published("speckle_noise", side, severity)
    for value in (60, 120):
        noisy = unit(corrupt(flat(value, side), "speckle_noise", severity))
        x = value / 255
        assert noisy.std() == pytest.approx(clipped_normal_std(scale * x, -x, 1 - x), rel=0.03)
    assert (corrupt(flat(0, side), "speckle_noise", severity) == 0).all()


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_shot_noise_counts_photons(side, severity):
    photons, x = published("shot_noise", side, severity), 80 / 255
    noisy = unit(corrupt(flat(80, side), "shot_noise", severity))
    counts = np.clip(np.random.default_rng(1).poisson(x * photons, 200_000) / photons, 0, 1)
    assert noisy.mean() == pytest.approx(counts.mean(), abs=0.006)
    assert noisy.std() == pytest.approx(counts.std(), rel=0.03)
    allowed = np.floor(np.clip(np.arange(photons + 1) / photons, 0, 1) * 255)
    assert np.isin(corrupt(flat(80, side), "shot_noise", severity).numpy(), allowed).all()


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_impulse_noise_flips_its_share_to_black_or_white(side, severity):
    noisy = corrupt(flat(128, side, n=16), "impulse_noise", severity).numpy()
    amount = published("impulse_noise", side, severity)
    assert set(np.unique(noisy)) <= {0, 128, 127, 255}
    for extreme in (0, 255):
        spread = 4 * np.sqrt(amount / 2 / noisy.size)
        assert (noisy == extreme).mean() == pytest.approx(amount / 2, abs=spread)
    channels = (noisy == 255).reshape(16, 3, -1)
    assert (channels.any(axis=1) & ~channels.all(axis=1)).any()  # channels flip on their own


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize(("side", "severity"), CASES)
def test_colour_maps_match_hsv_pixel_by_pixel(name, side, severity):
    images = photos(side, n=1)[:, :, :12, :] if side == SMALL else photos(side, n=1)[:, :, :6, :]
    parameter, expected = published(name, side, severity), []
    for pixel in images[0].reshape(3, -1).T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        if name == "brightness":
            value = min(value + parameter, 1.0)
        else:
            saturation = min(max(saturation * parameter[0] + parameter[1], 0.0), 1.0)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, value))
    expected = np.array(expected).T.reshape(3, *images.shape[2:]) * 255
    got = corrupt(images, name, severity)[0].numpy()
    # Cut to 8 bits: at most one below, and never above, but for rounding of the last float digit.
    assert (expected - got > -1e-6).all()
    assert (expected - got < 1 + 1e-6).all()


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_contrast_shrinks_towards_each_channels_mean(side, severity):
    images, factor = photos(side), published("contrast", side, severity)
    got = corrupt(images, "contrast", severity).numpy()
    for image, result in zip(images.double().numpy(), got, strict=True):
        for channel in range(3):
            expected = image[channel].mean() + factor * (image[channel] - image[channel].mean())
            assert np.abs(expected - 0.5 - result[channel]).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("side", [SMALL, LARGE])
@pytest.mark.parametrize("name", corruption_names())
def test_an_image_does_not_depend_on_its_neighbours(name, side):
    images = photos(side, n=5)
    whole = corrupt(images, name, 3, seed=7)
    alone = [corrupt(images[i : i + 1], name, 3, seed=7, positions=torch.tensor([i])) for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))
    order = torch.tensor([3, 0, 4])
    assert torch.equal(corrupt(images[order], name, 3, seed=7, positions=order), whole[order])


@pytest.mark.parametrize("name", corruption_names())
def test_chunks_do_not_show(name, monkeypatch):
    images = photos(SMALL, n=7)
    whole = corrupt(images, name, 4)
    monkeypatch.setattr("subtuning_lab.data.corruptions.registry._CHUNK_BYTES", 2 * 8 * 3 * SMALL * SMALL)
    assert torch.equal(corrupt(images, name, 4), whole)


def test_noise_differs_between_images_and_seeds_and_repeats():
    noisy = corrupt(flat(128, SMALL), "gaussian_noise", 5, seed=1)
    assert not torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy, corrupt(flat(128, SMALL), "gaussian_noise", 5, seed=2))
    assert torch.equal(noisy, corrupt(flat(128, SMALL), "gaussian_noise", 5, seed=1))


@pytest.mark.parametrize("name", corruption_names())
@pytest.mark.parametrize("size", [(32, 32), (2, 3), (17, 40), (96, 6), (70, 90)])
def test_any_size_is_corrupted(name, size):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, *size), dtype=np.uint8))
    for severity in (1, 5):
        out = corrupt(images, name, severity)
        assert out.dtype == torch.uint8 and out.shape == images.shape
        assert torch.equal(corrupt(images.to(memory_format=torch.channels_last), name, severity), out)
    assert corrupt(images[:0], name, 1).shape == (0, 3, *size)


FLAT_STAYS = (
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("elastic_transform", "pixelate"),
)


@pytest.mark.parametrize("name", FLAT_STAYS)
def test_flat_images_stay_to_the_last_level(name):
    """Weights that sum to 1 but for a float's last digit must not cut a flat area one level down."""
    images = torch.stack([torch.full((3, 24, 24), value, dtype=torch.uint8) for value in (0, 1, 77, 128, 200, 255)])
    for severity in (1, 3, 5):
        assert torch.equal(corrupt(images, name, severity), images)


# The published parameters of these don't grow in every step by the mean change of a pixel.
UNEVEN = ("frost", "glass_blur", "spatter", "saturate", "elastic_transform")


@pytest.mark.parametrize("name", [name for name in corruption_names() if name not in UNEVEN])
@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_severity_grows(name, side):
    noise = np.random.default_rng(2).normal(size=(6, 3, side, side))
    smooth = np.cumsum(np.cumsum(noise, axis=2), axis=3)  # falls with frequency, as photographs do
    low, high = (reduce(axis=(2, 3), keepdims=True) for reduce in (smooth.min, smooth.max))
    images = torch.from_numpy((255 * (smooth - low) / (high - low)).astype(np.uint8))
    changes = [(corrupt(images, name, severity).double() - images).abs().mean() for severity in (1, 3, 5)]
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", corruption_names())
def test_input_stays_and_output_has_its_type(name):
    images = photos(SMALL)
    before = images.clone()
    out = corrupt(images, name, 5)
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert torch.equal(images, before)
    assert not torch.equal(out, images)


def test_unknown_name_lists_the_allowed():
    with pytest.raises(ValueError, match="'fogg'.*gaussian_noise.*saturate"):
        corrupt(flat(1, SMALL), "fogg", 1)


@pytest.mark.parametrize("positions", [torch.arange(7), torch.arange(8) - 1])
def test_positions_that_do_not_fit_are_refused(positions):
    with pytest.raises(ValueError, match="positions must be 8 indices"):
        corrupt(flat(1, SMALL), "gaussian_noise", 1, positions=positions)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        corrupt(images, "contrast", 1)


# Shot noise, contrast and JPEG compute on the CPU; glass blur and water look at values to see when they are done.
ON_DEVICE = [
    name
    for name in corruption_names()
    if name not in ("shot_noise", "contrast", "jpeg_compression", "glass_blur", "spatter")
]


@pytest.fixture
def no_memory():
    """Empties what the formulas remember, so that no tensor without contents stays there."""
    yield
    for remembered in (box_matrix, filters.gaussian_matrix, filters.zoom_matrix, filters.cosines):
        remembered.cache_clear()


@pytest.mark.parametrize("name", ON_DEVICE)
def test_images_stay_on_their_device(name, no_memory):
    """Tensors without contents follow devices as real ones do, so no GPU is needed to see one mixed up."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for side in (SMALL, LARGE):
            images = torch.empty(4, 3, side, side, dtype=torch.uint8, device="cuda")
            out = corrupt(images, name, 5)
            assert out.device.type == "cuda" and out.shape == images.shape and out.dtype == torch.uint8
