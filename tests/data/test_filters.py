"""Filters on batches against SciPy's, image by image."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from subtuning_lab.data.corruptions.filters import (
    LARGEST_OF_COSINES,
    gaussian_filter,
    gaussian_matrix,
    mirrored_filter,
    pad,
    zoom_matrix,
)


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


@pytest.mark.parametrize("size", [(9, 14), (30, 30), (5, LARGEST_OF_COSINES + 1), (1, 1), (2, 7)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 7), (21, 13)])
def test_a_mirrored_filter_is_scipys(size, shape):
    kernel = values(*shape)
    kernel = kernel + kernel[::-1] + kernel[:, ::-1] + kernel[::-1, ::-1]
    images = values(2, 3, *size)
    expected = scipy.ndimage.correlate(images, kernel[None, None], mode="mirror")
    assert np.allclose(mirrored_filter(torch.from_numpy(images), kernel).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("mode", ["nearest", "reflect"])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3, 50.0])
def test_a_gaussian_filter_is_scipys(sigma, mode):
    images = values(2, 3, 11, 17)
    found = gaussian_filter(torch.from_numpy(images), sigma, mode, truncate=3.0).numpy()
    assert np.allclose(found, scipy.ndimage.gaussian_filter(images, (0, 0, sigma, sigma), mode=mode, truncate=3.0))
    assert torch.equal(gaussian_matrix(6, 0), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("border", ["edge", "reflect"])
def test_padding_may_be_more_than_the_image(border):
    images = values(2, 3, 4)
    found = pad(torch.from_numpy(images), (0, 9), (5, 2), border).numpy()
    assert np.array_equal(found, np.pad(images, ((0, 0), (0, 9), (5, 2)), mode=border))


@pytest.mark.parametrize(("size", "factor"), [(32, 1.0), (32, 1.05), (32, 2.25), (31, 4.5), (224, 1.13)])
def test_zooming_keeps_the_size_and_the_middle(size, factor):
    matrix = zoom_matrix(size, factor)
    assert matrix.shape == (size, size) and torch.allclose(matrix.sum(dim=1), torch.ones(size).double())
    seen = matrix @ torch.arange(size).double()
    steps = seen.diff()
    assert (steps >= -1e-9).all() and abs(float(seen.mean()) - (size - 1) / 2) <= 1
    assert float(steps.mean()) == pytest.approx(1 / factor, abs=1 / size)
