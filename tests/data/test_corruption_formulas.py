"""Corruptions that are more than a formula, against SciPy, Pillow and loops over pixels with the same draws."""

import io
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from subtuning_lab.data.corruptions.registry import corrupt

SEED = 3
CASES = [(32, severity) for severity in (1, 2, 3, 4, 5)] + [(72, severity) for severity in (1, 3, 5)]


def photos(side: int, n: int = 2) -> torch.Tensor:
    """Smooth images with hard edges and flat areas, (n, 3, side, side)."""
    noise = np.random.default_rng(1).normal(size=(n, 3, side, side))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    images = np.clip(128 + 300 * smooth, 0, 255).astype(np.uint8)
    images[:, :, : side // 4, : side // 3] = 200
    images[:, 0, -side // 4 :] = 0
    return torch.from_numpy(images)


def draws(position: int) -> np.random.Generator:
    return np.random.default_rng((SEED, position))


def assert_close(images: torch.Tensor, name: str, severity: int, expected, levels: int = 1, share: float = 0.0) -> None:
    """`expected(image, generator)` takes and gives floats (H, W, 3) in [0, 255]; a share of values may be off."""
    got = corrupt(images, name, severity, seed=SEED)
    for position, image in enumerate(images.permute(0, 2, 3, 1).double().numpy()):
        wanted = np.clip(expected(image, draws(position)), 0, 255)
        # Results are cut: from the wanted value's own level down by `levels`.
        distance = np.abs(wanted - 0.5 - got[position].permute(1, 2, 0).numpy().astype(float))
        assert (distance > levels - 0.5 + 1e-4).mean() <= share, distance.max()


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_gaussian_blur_is_scipys(side, severity):
    sigma = ((0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6))[side > 64][severity - 1]
    assert_close(
        photos(side),
        "gaussian_blur",
        severity,
        lambda image, _: scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest"),
    )


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_defocus_blur_is_a_softened_disk(side, severity):
    small = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    radius, sigma = (small, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)))[side > 64][severity - 1]
    reach = max(8, math.ceil(radius))
    where = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (np.hypot(*where) <= radius).astype(float)
    ring = 1 if radius <= 8 else 2
    curve = np.exp(-0.5 * (np.arange(-ring, ring + 1) / sigma) ** 2)
    kernel = scipy.ndimage.correlate(kernel / kernel.sum(), np.outer(curve, curve) / curve.sum() ** 2, mode="mirror")
    assert_close(
        photos(side),
        "defocus_blur",
        severity,
        lambda image, _: scipy.ndimage.correlate(image, kernel[..., None], mode="mirror"),
    )


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_motion_blur_averages_along_a_line(side, severity):
    small = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))
    radius, sigma = (small, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))[side > 64][severity - 1]

    def expected(image, generator):
        return smeared(image, radius, sigma, generator.uniform(-45, 45))

    assert_close(photos(side), "motion_blur", severity, expected)


def smeared(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Pixel by pixel of the line: the image that a walk from each pixel sees, its edge repeated."""
    rows, columns = np.indices(image.shape[:2])
    total, weights = np.zeros(image.shape), 0.0
    for step in range(2 * radius + 1):
        down = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        right = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        seen = image[np.clip(rows + down, 0, len(rows) - 1), np.clip(columns + right, 0, len(rows) - 1)]
        weight = math.exp(-0.5 * (step / sigma) ** 2)
        total, weights = total + weight * seen, weights + weight
    return total / weights


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_glass_blur_copies_pixels_one_after_another(side, severity):
    small = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, reach, rounds = (small, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)))[side > 64][
        severity - 1
    ]

    def expected(image, generator):
        first = scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
        moved = np.floor(first + 1e-6)
        shape = (rounds, side - 2 * reach, side - 2 * reach, 2)
        steps = generator.integers(-reach, reach, shape, dtype=np.int8).astype(int)
        for turn in steps:
            for row in range(side - reach, reach, -1):
                for column in range(side - reach, reach, -1):
                    down, right = turn[row - reach - 1, column - reach - 1]
                    moved[row, column] = moved[row + down, column + right]
        return scipy.ndimage.gaussian_filter(moved, (sigma, sigma, 0), mode="nearest")

    assert_close(photos(side, n=1), "glass_blur", severity, expected)


def zoomed(image: np.ndarray, factor: float) -> np.ndarray:
    """The middle, enlarged by SciPy and trimmed."""
    side = len(image)
    kept = math.ceil(side / factor)
    first = (side - kept) // 2
    large = scipy.ndimage.zoom(image[first : first + kept, first : first + kept], (factor, factor, 1), order=1)
    trim = (len(large) - side) // 2
    return large[trim : trim + side, trim : trim + side]


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_zoom_blur_averages_scipys_zooms(side, severity):
    small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
    large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    factors = np.arange(1, *(small, large)[side > 64][severity - 1])
    assert_close(
        photos(side),
        "zoom_blur",
        severity,
        lambda image, _: np.mean([image, *(zoomed(image, factor) for factor in factors)], axis=0),
    )


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_snow_falls_as_published(side, severity):
    small = (
        *((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)),
        *((0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    )
    large = (
        *((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7)),
        *((0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    )
    mean, deviation, factor, least, radius, sigma, share = (small, large)[side > 64][severity - 1]

    def expected(image, generator):
        layer = zoomed(mean + deviation * generator.standard_normal((side, side, 1)), factor)
        layer = np.floor(np.clip(np.where(layer < least, 0, layer), 0, 1) * 255)
        layer = np.floor(smeared(layer, radius, sigma, generator.uniform(-135, -45)) + 1e-6)
        grey = image @ np.array([0.299, 0.587, 0.114])
        white = share * image + (1 - share) * np.maximum(image, grey[..., None] * 1.5 + 127.5)
        return white + layer + np.rot90(layer, 2)

    # Where a flake lies just at a whole level, its cut may go either way.
    assert_close(photos(side), "snow", severity, expected, share=0.001)


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_fog_is_a_plasma_of_midpoints(side, severity):
    small = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    amount, decay = (small, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)))[side > 64][severity - 1]
    size = 32 if side == 32 else 128

    def expected(image, generator):
        mist = midpoints(size, decay, 2 * generator.random(size * size - 1) - 1)[:side, :side, None]
        brightest = image.max() / 255
        return (image + 255 * amount * mist) * brightest / (brightest + amount)

    assert_close(photos(side, n=1), "fog", severity, expected)


def midpoints(size: int, decay: float, noise: np.ndarray) -> np.ndarray:
    """Diamond-square on a torus, point by point."""
    field, step, amplitude, noise = np.zeros((size, size)), size, 10_000.0, iter(noise)
    while step > 1:
        half, starts = step // 2, range(0, size, step)
        for row_shift, column_shift, around in (
            (half, half, ((-half, -half), (-half, half), (half, -half), (half, half))),
            (0, half, ((0, -half), (0, half), (-half, 0), (half, 0))),
            (half, 0, ((0, -half), (0, half), (-half, 0), (half, 0))),
        ):
            for row in starts:
                for column in starts:
                    y, x = row + row_shift, column + column_shift
                    near = [field[(y + down) % size, (x + right) % size] for down, right in around]
                    field[y, x] = sum(near) / 4 + amplitude * next(noise)
        step, amplitude = half, amplitude / decay**2
    return (field - field.min()) / np.ptp(field)


@pytest.mark.parametrize(("side", "severity"), CASES)
def test_elastic_transform_is_scipys_after_an_affine_map(side, severity):
    small = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    large = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    unit = side if side == 32 else side * 244 / 224
    amount, sigma, reach = (unit * share for share in (small, large)[side > 64][severity - 1])

    def expected(image, generator):
        middle, half = side // 2, side // 3
        corners = np.array([[middle + half, middle + half], [middle + half, middle - half], [middle - half] * 2])
        moved = corners + reach * (2 * generator.random((3, 2)) - 1)
        back = np.linalg.solve(np.c_[moved, np.ones(3)], corners)  # from (x, y, 1) where it is to (x, y) where it was
        y, x = np.indices((side, side))
        old = np.stack([x, y, np.ones_like(x)], axis=-1) @ back
        first = [
            scipy.ndimage.map_coordinates(image[..., c], [old[..., 1], old[..., 0]], order=1, mode="mirror")
            for c in range(3)
        ]
        right, down = (
            amount * (scipy.ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3) if sigma else noise)
            for noise in 2 * generator.random((2, side, side)) - 1
        )
        second = [scipy.ndimage.map_coordinates(c, [y + down, x + right], order=1, mode="reflect") for c in first]
        return np.stack(second, axis=-1)

    assert_close(photos(side), "elastic_transform", severity, expected)


@pytest.mark.parametrize(("side", "severity"), [*CASES, (45, 5), (33, 3)])
def test_pixels_and_jpegs_are_pillows(side, severity):
    images = photos(side)[:, :, : side - 3]
    large = int(side > 64)
    share = ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25))[large][severity - 1]
    quality = ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7))[large][severity - 1]
    pixelated, compressed = (corrupt(images, name, severity) for name in ("pixelate", "jpeg_compression"))
    for index, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        picture, stream = Image.fromarray(image), io.BytesIO()
        small = picture.resize([int(length * share) for length in picture.size], Image.Resampling.BOX)
        back = np.asarray(small.resize(picture.size, Image.Resampling.BOX))
        assert np.array_equal(pixelated[index].permute(1, 2, 0).numpy(), back)
        picture.save(stream, "JPEG", quality=quality)
        assert np.array_equal(compressed[index].permute(1, 2, 0).numpy(), np.asarray(Image.open(stream)))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_frost_mixes_the_image_with_bluish_ice(severity):
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    black = corrupt(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), "frost", severity, seed=SEED).double()
    grey = corrupt(torch.full((8, 3, 32, 32), 90, dtype=torch.uint8), "frost", severity, seed=SEED).double()
    assert ((grey - black - kept * 90).abs() <= 1).all()
    ice = black / (255 * added)
    assert 0.5 < ice.mean() < 0.8 and (ice.mean(dim=(0, 2, 3)).diff() > 0).all()  # red < green < blue
    assert (ice.mean(dim=1).std(dim=(1, 2)) > 0.02).all() and not torch.equal(ice[0], ice[1])
