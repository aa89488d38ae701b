"""Families of procedurally drawn shapes: each function maps class labels to soft masks (n, 32, 32) in [0, 1].

Coordinates run from -1 to 1 over the image, x to the right and y downwards. What a class looks like is fixed by
formulas and constants; the generator that every function takes draws only the instance: position, size, jitter.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SIDE = 32  # pixels
EDGE_SHARPNESS = 24.0  # logistic slope per unit of distance: an edge is about 2 pixels wide
STROKES_PER_GLYPH = 3
POINTS_PER_STROKE = 28
MAPS_PER_FRACTAL = 3
MAX_COUNT = 6
GRID_SPACING = 0.62  # with the radii and the jitter below, blobs stay a pixel apart: see `count_masks`
BLOB_RADII = (0.10, 0.20)
BLOB_JITTER = 0.075


def uniform(shape: tuple[int, ...], generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return uniform numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def pixel_grid() -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centres, each (32, 32)."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def soft_mask(inside: Tensor) -> Tensor:
    """Turn a signed distance (positive inside the shape) into a mask in [0, 1] with a soft edge."""
    return torch.sigmoid(EDGE_SHARPNESS * inside)


def affine_grid(
    n: int,
    generator: Generator,
    rotation: float,
    scales: tuple[float, float] = (0.8, 1.2),
    shift: float = 0.2,
    shear: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Return the pixel grid seen from `n` randomly rotated, scaled, shifted and sheared shapes.

    Args:
        n: Number of images.
        generator: Source of the random numbers.
        rotation: Largest angle in radians, in both directions.
        scales: Smallest and largest scale.
        shift: Largest shift along each axis.
        shear: Largest shear.

    Returns:
        Coordinates u and v in the frame of the shape, each (n, 32, 32).
    """
    shape = (n, 1, 1)
    angle = uniform(shape, generator, -rotation, rotation)
    scale = uniform(shape, generator, *scales)
    x, y = pixel_grid()
    x = x - uniform(shape, generator, -shift, shift)
    y = y - uniform(shape, generator, -shift, shift)
    u = (torch.cos(angle) * x + torch.sin(angle) * y) / scale
    v = (torch.cos(angle) * y - torch.sin(angle) * x) / scale
    return u + uniform(shape, generator, -shear, shear) * v, v


def glyph_control_points(n_classes: int, seed: int) -> Tensor:
    """Define glyph classes: two or three quadratic Bezier strokes each, often joined end to start.

    Returns:
        Control points (classes, strokes, 3, 2). A glyph of two strokes repeats its second one.
    """
    generator = torch.Generator().manual_seed(seed)
    points = uniform((n_classes, STROKES_PER_GLYPH, 3, 2), generator, -0.72, 0.72)
    joined = torch.rand(n_classes, 1, generator=generator) < 0.6
    points[:, 1, 0] = torch.where(joined, points[:, 0, 2], points[:, 1, 0])
    two_strokes = torch.rand(n_classes, generator=generator) < 0.5
    points[two_strokes, 2] = points[two_strokes, 1]
    return points


def glyph_masks(
    labels: Tensor, control_points: Tensor, generator: Generator, jitter: float = 0.07, rotation: float = 0.25
) -> Tensor:
    """Draw glyphs with jittered control points, a random affine view and a random pen width.

    Args:
        labels: Classes (n,), rows of `control_points`.
        control_points: Result of `glyph_control_points`.
        generator: Source of the random numbers.
        jitter: Standard deviation of each control point's displacement.
        rotation: Largest rotation in radians.

    Returns:
        Masks (n, 32, 32).
    """
    n = len(labels)
    points = control_points[labels]
    points = points + jitter * torch.randn(points.shape, generator=generator)
    t = torch.linspace(0, 1, POINTS_PER_STROKE)
    bernstein = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])  # (3, points)
    path = torch.einsum("bt,nsbd->nstd", bernstein, points).reshape(n, -1, 2)
    u, v = affine_grid(n, generator, rotation)
    pixels = torch.stack([u.flatten(1), v.flatten(1)], dim=2)
    distance = torch.cdist(pixels, path, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=2)
    pen = uniform((n, 1, 1), generator, 0.06, 0.16)
    return soft_mask(pen - distance.view(n, SIDE, SIDE))


@dataclass(frozen=True)
class FractalMaps:
    """Iterated function systems: x -> linear @ x + offset, a few maps per class.

    Args:
        linear: Contractions (classes, maps, 2, 2).
        offset: Translations (classes, maps, 2).
    """

    linear: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        if self.linear.shape[:2] != self.offset.shape[:2] or self.linear.shape[2:] != (2, 2):
            raise ValueError(f"shapes do not fit: linear {tuple(self.linear.shape)}, offset {tuple(self.offset.shape)}")


def fractal_maps(n_classes: int, seed: int) -> FractalMaps:
    """Define fractal classes: random contractions whose attractor covers between 12 % and 50 % of the image."""
    generator = torch.Generator().manual_seed(seed)
    linear, offset = torch.empty(0, MAPS_PER_FRACTAL, 2, 2), torch.empty(0, MAPS_PER_FRACTAL, 2)
    while len(linear) < n_classes:
        candidates = uniform((256, MAPS_PER_FRACTAL, 2, 2), generator, -1, 1)
        largest = torch.linalg.svdvals(candidates)[..., :1, None]
        candidates = candidates / largest * uniform((256, MAPS_PER_FRACTAL, 1, 1), generator, 0.45, 0.85)
        moves = uniform((256, MAPS_PER_FRACTAL, 2), generator, -1, 1)
        covered = (_attractor_masks(candidates, moves, generator) > 0.3).float().mean(dim=(1, 2))
        kept = (covered > 0.12) & (covered < 0.5)
        linear, offset = torch.cat([linear, candidates[kept]]), torch.cat([offset, moves[kept]])
    return FractalMaps(linear[:n_classes], offset[:n_classes])


def fractal_masks(labels: Tensor, maps: FractalMaps, generator: Generator, jitter: float = 0.04) -> Tensor:
    """Draw the attractors (n, 32, 32) of the classes' maps after a small random change of every coefficient."""
    linear, offset = maps.linear[labels], maps.offset[labels]
    linear = linear + jitter * torch.randn(linear.shape, generator=generator)
    offset = offset + jitter * torch.randn(offset.shape, generator=generator)
    return _attractor_masks(linear, offset, generator)


def _attractor_masks(
    linear: Tensor, offset: Tensor, generator: Generator, chains: int = 24, steps: int = 40, burn_in: int = 8
) -> Tensor:
    """Play the chaos game with `chains` points per system, and count where they fall; (n, 32, 32)."""
    n = len(linear)
    area = torch.linalg.det(linear).abs() + 0.05  # larger images of the whole are visited more often
    cumulative = (area / area.sum(dim=1, keepdim=True)).cumsum(dim=1)
    draws = torch.rand(n, chains * steps, generator=generator)
    choice = torch.searchsorted(cumulative, draws).clamp_max(MAPS_PER_FRACTAL - 1).view(n, chains, steps)
    system = torch.arange(n)[:, None]
    points, visited = torch.zeros(n, chains, 2), []
    for step in range(steps):
        chosen = choice[:, :, step]
        points = (linear[system, chosen] @ points[..., None])[..., 0] + offset[system, chosen]
        visited.append(points)
    return _density_masks(torch.cat(visited[burn_in:], dim=1))


def _density_masks(points: Tensor) -> Tensor:
    """Fit each cloud of points (n, points, 2) into the image and saturate the counts per pixel."""
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    unit = (points - low) / (high - low).clamp_min(1e-4)
    cell = (unit * (SIDE - 4) + 1.5).long()
    flat = cell[..., 1] * SIDE + cell[..., 0]
    counts = torch.zeros(len(points), SIDE * SIDE).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    return 1 - torch.exp(-0.8 * counts.view(-1, SIDE, SIDE))


def polygon_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw 16 classes: 3 to 6 corners (label % 4) x filled, outlined, star, outlined star (label // 4)."""
    n = len(labels)
    corners = (3 + labels % 4).float()[:, None, None]
    style = (labels // 4)[:, None, None]
    u, v = affine_grid(n, generator, math.pi, scales=(0.5, 0.95), shift=0.25, shear=0.15)
    radius = (u**2 + v**2).sqrt()
    angle = torch.remainder(torch.atan2(v, u), 2 * math.pi / corners) - math.pi / corners  # 0 at mid-side
    polygon = 0.75 - radius * torch.cos(angle) / torch.cos(math.pi / corners)
    star = 0.45 + 0.4 * angle.abs() * corners / math.pi - radius
    inside = torch.where(style >= 2, star, polygon)
    half_width = uniform((n, 1, 1), generator, 0.10, 0.18)
    outline = half_width - (inside - half_width).abs()
    return soft_mask(torch.where(style % 2 == 0, inside, outline))


def texture_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw 16 classes: gratings of 4 directions and 2 frequencies, 2 checkers, 2 rings, 4 slopes of 1/f noise."""
    column = labels[:, None, None]
    wave = torch.where(column < 8, _gratings(column, generator), _checkers(column, generator))
    wave = torch.where((column >= 10) & (column < 12), _rings(column, generator), wave)
    wave = torch.where(column >= 12, _power_law_noise(column, generator), wave)
    return torch.sigmoid(2.5 * wave)


def _phase(n: int, generator: Generator) -> Tensor:
    return uniform((n, 1, 1), generator, 0, 2 * math.pi)


def _gratings(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    direction = (column % 4) * math.pi / 4 + uniform((n, 1, 1), generator, -0.175, 0.175)
    slow, fast = uniform((n, 1, 1), generator, 6, 9), uniform((n, 1, 1), generator, 13, 18)
    frequency = torch.where((column // 4) % 2 == 0, slow, fast)
    return torch.sin(frequency * (torch.cos(direction) * x + torch.sin(direction) * y) + _phase(n, generator))


def _two_frequencies(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    slow, fast = uniform((n, 1, 1), generator, 6, 8), uniform((n, 1, 1), generator, 11, 14)
    return torch.where(column % 2 == 0, slow, fast)


def _checkers(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    frequency = _two_frequencies(column, generator)
    return 2 * torch.sin(frequency * x + _phase(n, generator)) * torch.sin(frequency * y + _phase(n, generator))


def _rings(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    x, y = pixel_grid()
    dx, dy = uniform((n, 1, 1), generator, -0.5, 0.5), uniform((n, 1, 1), generator, -0.5, 0.5)
    radius = ((x - dx) ** 2 + (y - dy) ** 2).sqrt()
    return torch.sin(1.3 * _two_frequencies(column, generator) * radius + _phase(n, generator))


def _power_law_noise(column: Tensor, generator: Generator) -> Tensor:
    n = len(column)
    frequencies = torch.fft.fftfreq(SIDE)
    radius = (frequencies[None, :] ** 2 + frequencies[:, None] ** 2).sqrt().clamp_min(1 / SIDE)
    slope = torch.tensor([0.4, 0.9, 1.5, 2.2])[column % 4]
    spectrum = torch.fft.fft2(torch.randn(n, SIDE, SIDE, generator=generator)) * radius**-slope
    noise = torch.fft.ifft2(spectrum).real
    return noise / noise.std(dim=(1, 2), keepdim=True)


def count_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw label + 1 discs and squares (1 to 6) in cells of a 3 x 3 grid.

    Two blobs are at least GRID_SPACING - 2 * (BLOB_JITTER + largest radius) = 0.07 apart along one axis, which is
    more than a pixel (0.0625): thresholded at 1/2 they never touch, not even across a corner.
    """
    n, shape = len(labels), (len(labels), MAX_COUNT)
    cell = torch.rand(n, 9, generator=generator).argsort(dim=1)[:, :MAX_COUNT]
    centre = (torch.stack([cell % 3, cell // 3]) - 1) * GRID_SPACING
    centre = centre + uniform((2, *shape), generator, -BLOB_JITTER, BLOB_JITTER)
    radius = uniform(shape, generator, *BLOB_RADII)
    square = torch.rand(shape, generator=generator) < 0.5
    drawn = torch.arange(MAX_COUNT) <= labels[:, None]
    radius = torch.where(drawn, radius, torch.full_like(radius, -1.0))  # far outside everywhere: nothing is drawn
    x, y = pixel_grid()
    dx, dy = (x - centre[0, ..., None, None]).abs(), (y - centre[1, ..., None, None]).abs()
    distance = torch.where(square[..., None, None], torch.maximum(dx, dy), (dx**2 + dy**2).sqrt())
    return soft_mask((radius[..., None, None] - distance).amax(dim=1))


def position_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a disc and a square; the class is the direction from the square to the disc, in steps of 45 degrees."""
    n = len(labels)
    shape = (n, 1, 1)
    angle = labels.view(shape) * math.pi / 4 + uniform(shape, generator, -0.25, 0.25)
    half_distance = uniform(shape, generator, 0.35, 0.50)
    reach_x, reach_y = half_distance * torch.cos(angle), half_distance * torch.sin(angle)
    middle_x, middle_y = uniform(shape, generator, -0.25, 0.25), uniform(shape, generator, -0.25, 0.25)
    x, y = pixel_grid()
    disc = ((x - middle_x - reach_x) ** 2 + (y - middle_y - reach_y) ** 2).sqrt()
    square = torch.maximum((x - middle_x + reach_x).abs(), (y - middle_y + reach_y).abs())
    disc_radius, square_radius = uniform(shape, generator, 0.14, 0.24), uniform(shape, generator, 0.14, 0.24)
    return soft_mask(torch.maximum(disc_radius - disc, square_radius - square))
