"""Drawn images: the glyphs that the bundled backbones were pretrained on, new glyphs, blobs to count, and positions.

Each kind maps class labels to soft masks (n, 32, 32) in [0, 1], which are then painted. Coordinates run from -1 to 1
over the image, x to the right and y downwards. What a class looks like is fixed by formulas and constants; the
generator draws only the instance: position, size, jitter, colours. The same seed gives the same images.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from subtuning_lab.utils.validation import OneOf, Whole, checked

SIDE = 32  # pixels
EDGE_SHARPNESS = 24.0  # logistic slope per unit of distance: an edge is about 2 pixels wide
STROKES_PER_GLYPH, POINTS_PER_STROKE = 3, 28
SOURCE_GLYPHS, NEW_GLYPHS = 40, 20  # classes
SOURCE_GLYPH_SEED, NEW_GLYPH_SEED = 1, 777  # these define the classes
MAX_COUNT = 6
GRID_SPACING = 0.62  # with the radii and the jitter below, blobs stay a pixel apart: see `count_masks`
BLOB_RADII, BLOB_JITTER = (0.10, 0.20), 0.075
IMAGES_PER_CHUNK = 256  # bounds the memory: a chunk of glyphs needs about 100 MB
MIN_CONTRAST = 0.35  # smallest difference in luminance between shape and background, of 1
LUMINANCE = (0.30, 0.59, 0.11)
DIRECTIONS = ("right", "lower right", "below", "lower left", "left", "upper left", "above", "upper right")

MaskFamily = Callable[[Tensor, Generator], Tensor]


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


@cache
def _control_points(n_classes: int, seed: int) -> Tensor:
    return glyph_control_points(n_classes, seed)


def source_glyph_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw glyphs of the 40 classes of pretraining."""
    return glyph_masks(labels, _control_points(SOURCE_GLYPHS, SOURCE_GLYPH_SEED), generator)


def new_glyph_masks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw glyphs of 20 classes that pretraining has not seen, more varied than those."""
    points = _control_points(NEW_GLYPHS, NEW_GLYPH_SEED)
    return glyph_masks(labels, points, generator, jitter=0.10, rotation=0.4)


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


def numbered(name: str, n: int) -> tuple[str, ...]:
    """Names of classes: "name 00", "name 01", ..."""
    return tuple(f"{name} {index:02d}" for index in range(n))


KINDS: dict[str, tuple[tuple[str, ...], MaskFamily]] = {  # of images: names of the classes, and what draws them
    "source": (numbered("glyph", SOURCE_GLYPHS), source_glyph_masks),
    "glyphs": (numbered("new glyph", NEW_GLYPHS), new_glyph_masks),
    "count": (tuple(str(count) for count in range(1, MAX_COUNT + 1)), count_masks),
    "position": (DIRECTIONS, position_masks),
}


@checked(kind=OneOf(tuple(KINDS)))
def synthetic_images(kind: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of one kind; arguments and result as of `draw`, labels as in `KINDS`."""
    classes, masks = KINDS[kind]
    return draw(masks, len(classes), n, seed)


@checked(n=Whole(1), seed=Whole(0, 2**63 - 1))
def draw(masks: MaskFamily, n_classes: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw balanced labels, then their images chunk by chunk from one generator.

    Args:
        masks: what draws the masks (k, 32, 32) of labels (k,).
        n_classes: number of classes; each gets n // n_classes images or one more.
        n: number of images, at least 1.
        seed: chooses the instances; the classes are always the same.
    Returns:
        Images uint8 (n, 3, 32, 32) and labels int64 (n,), in random order.
    """
    generator = torch.Generator().manual_seed(int(seed))
    labels = balanced_labels(int(n), n_classes, generator)
    chunks = [paint(masks(chunk, generator), generator) for chunk in labels.split(IMAGES_PER_CHUNK)]
    return torch.cat(chunks), labels


def paint(masks: Tensor, generator: Generator) -> Tensor:
    """Colour masks: random colours of shape and background, a smooth brightness pattern, a little pixel noise.

    Args:
        masks: Shapes (n, 32, 32) in [0, 1].
        generator: Source of the random numbers.
    Returns:
        Images uint8 (n, 3, 32, 32).
    """
    n, masks = len(masks), masks[:, None]
    shape, background = _contrasting_colours(n, generator)
    images = shape[..., None, None] * masks + background[..., None, None] * (1 - masks)
    pattern = torch.randn(n, 1, 4, 4, generator=generator)
    pattern = F.interpolate(pattern, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    images = images + uniform((n, 1, 1, 1), generator, 0, 0.12) * pattern
    grain = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    images = images + uniform((n, 1, 1, 1), generator, 0, 0.03) * grain
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _contrasting_colours(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return two RGB colours per image, each (n, 3), redrawn until their luminances differ enough."""
    pairs = torch.rand(n, 2, 3, generator=generator)
    weights = torch.tensor(LUMINANCE)
    while (weak := ((pairs[:, 0] - pairs[:, 1]) @ weights).abs() < MIN_CONTRAST).any():
        pairs[weak] = torch.rand(int(weak.sum()), 2, 3, generator=generator)
    return pairs[:, 0], pairs[:, 1]


def balanced_labels(n: int, n_classes: int, generator: Generator) -> Tensor:
    """Return `n` shuffled labels, each class n // n_classes or one more time; chance says which get one more."""
    classes = torch.randperm(n_classes, generator=generator)
    return classes[torch.arange(n) % n_classes][torch.randperm(n, generator=generator)]
