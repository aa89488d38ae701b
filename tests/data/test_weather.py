"""The steps of spatter against plain loops: edges, distances, equalized levels; and what water and mud do."""

import heapq
import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.corruptions.weather import canny_edges, chamfer_distance, equalized, shaded


def layer(seed: int, height: int = 16, width: int = 20) -> np.ndarray:
    """Blurred noise with a threshold, as liquids are drawn: whole numbers from 0 to 255."""
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(0.65, 0.3, (height, width)), 1)
    return np.floor(np.clip(np.where(noise < 0.68, 0, noise), 0, 1) * 255)


LAYERS = np.stack([layer(seed) for seed in range(6)])


def edges_by_loops(image: np.ndarray) -> np.ndarray:
    """Canny's edges pixel by pixel, hysteresis by a stack."""
    height, width = image.shape
    padded = np.pad(image, 1, mode="edge")
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    right = scipy.ndimage.correlate(padded, kernel)[1:-1, 1:-1]
    down = scipy.ndimage.correlate(padded, kernel.T)[1:-1, 1:-1]
    size = np.pad(np.abs(right) + np.abs(down), 1)
    weak = np.zeros(image.shape, dtype=bool)
    for row in range(height):
        for column in range(width):
            dy, dx, own = down[row, column], right[row, column], size[row + 1, column + 1]
            angle = math.degrees(math.atan2(abs(dy), abs(dx)))
            step = (0, 1) if angle < 22.5 else (1, 0) if angle > 67.5 else (1, 1) if dy * dx >= 0 else (1, -1)
            before = size[row + 1 - step[0], column + 1 - step[1]]
            after = size[row + 1 + step[0], column + 1 + step[1]]
            ridge = own > before and (own > after if 0 not in step else own >= after)
            weak[row, column] = ridge and own > 50
    found = weak & (size[1:-1, 1:-1] > 150)
    stack = list(zip(*np.nonzero(found), strict=True))
    while stack:
        row, column = stack.pop()
        for y in range(max(0, row - 1), min(height, row + 2)):
            for x in range(max(0, column - 1), min(width, column + 2)):
                if weak[y, x] and not found[y, x]:
                    found[y, x] = True
                    stack.append((y, x))
    return found


def distance_by_dijkstra(targets: np.ndarray, farthest: float) -> np.ndarray:
    """Shortest ways over the grid."""
    lengths = {(0, 1): 1.0, (1, 1): 1.4, (1, 2): 2.1969}
    steps = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if tuple(sorted((abs(y), abs(x)))) in lengths]
    distance = np.full(targets.shape, farthest)
    queue = [(0.0, row, column) for row, column in zip(*np.nonzero(targets), strict=True)]
    while queue:
        way, row, column = heapq.heappop(queue)
        if way >= distance[row, column]:
            continue
        distance[row, column] = way
        for down, right in steps:
            y, x = row + down, column + right
            if 0 <= y < targets.shape[0] and 0 <= x < targets.shape[1]:
                heapq.heappush(queue, (way + lengths[tuple(sorted((abs(down), abs(right))))], y, x))
    return distance


def test_edges_are_cannys():
    found = canny_edges(torch.from_numpy(LAYERS)).numpy()
    assert 0.05 < found.mean() < 0.6
    for image, edges in zip(LAYERS, found, strict=True):
        assert np.array_equal(edges, edges_by_loops(image))


def test_weak_edges_count_where_they_touch_strong_ones():
    image = np.zeros((12, 30))
    image[:, 15:] = np.linspace(0, 60, 12)[:, None]  # a step that grows from row to row
    edges = canny_edges(torch.from_numpy(np.floor(image))[None])[0].numpy()
    assert np.array_equal(edges, edges_by_loops(np.floor(image))) and edges[4:, 14:16].any(axis=1).all()
    assert not canny_edges(torch.from_numpy(np.floor(image[:4]))[None]).any()  # weak alone


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_distances_are_shortest_ways(share):
    targets = np.random.default_rng(0).random((4, 15, 22)) < share
    found = chamfer_distance(torch.from_numpy(targets), 20.0).numpy()
    for image, distance in zip(targets, found, strict=True):
        assert np.allclose(distance, distance_by_dijkstra(image, 20.0), atol=1e-9)
    assert (chamfer_distance(torch.zeros(1, 5, 5, dtype=torch.bool), 20.0) == 20).all()


def test_levels_are_equalized_by_rank():
    images = np.random.default_rng(0).integers(0, 40, (3, 9, 11)) ** 2 // 8
    images[2] = 7
    found = equalized(torch.from_numpy(images).double()).numpy()
    for image, levels in zip(images[:2], found[:2], strict=True):
        lowest = (image == image.min()).sum()
        for level in np.unique(image):
            rank = (image <= level).sum() - lowest
            assert set(levels[image == level]) == {np.round(255 * rank / (image.size - lowest))}
    assert (found[2] == 7).all()


def test_drops_are_lit_within_themselves():
    light = shaded(torch.from_numpy(LAYERS)).numpy()
    assert (light[LAYERS == 0] == 0).all() and np.allclose(light.max(axis=(1, 2)), 1)
    assert not shaded(torch.zeros(1, 8, 8).double()).any()


@pytest.mark.parametrize(("side", "severities"), [(32, (1, 2, 3)), (72, (1, 2, 3))])
def test_water_only_adds_its_colour(side, severities):
    grey = torch.full((6, 3, side, side), 40, dtype=torch.uint8)
    for severity in severities:
        added = corrupt(grey, "spatter", severity).double() - 40
        assert (added >= 0).all() and 0.001 < (added > 5).double().mean() < 0.6
        assert (added[:, 1] == added[:, 2]).all() and (added[:, 0] - added[:, 1] * 175 / 238).abs().max() <= 1


@pytest.mark.parametrize("side", [32, 72])
@pytest.mark.parametrize("severity", [4, 5])
def test_mud_hides_what_is_below(side, severity):
    first, second = (torch.full((6, 3, side, side), value, dtype=torch.uint8) for value in (90, 200))
    one, other = (corrupt(images, "spatter", severity).double() for images in (first, second))
    touched = (one != 90).any(dim=1)
    assert 0.02 < touched.double().mean() < 0.5
    hidden = 1 - (other - one)[:, 0] / 110  # share of mud
    assert (hidden[touched] > 0.79).all() and (hidden[~touched] == 0).all()
    deep = hidden > 0.99
    if deep.any():
        assert (one.permute(0, 2, 3, 1)[deep] - torch.tensor([63.0, 42.0, 20.0])).abs().max() <= 2
