"""Procedurally generated images: the pretraining source of the bundled backbones and three offline target tasks.

Every function returns uint8 images (n, 3, 32, 32) and int64 labels (n,), the classes as balanced as n allows and in
random order. What a class looks like is fixed; `seed` decides only which instances are drawn. The same seed gives the
same images.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from subtuning_lab.data import shapes
from subtuning_lab.data.shapes import SIDE

SOURCE_FAMILIES = {"glyphs": 40, "fractals": 28, "polygons": 16, "textures": 16}  # classes, in the order of labels
SOURCE_CLASSES = sum(SOURCE_FAMILIES.values())
SOURCE_GLYPHS = SOURCE_FAMILIES["glyphs"]
NEW_GLYPHS = 20
SOURCE_GLYPH_SEED, SOURCE_FRACTAL_SEED, NEW_GLYPH_SEED = 1, 2, 777  # these define the classes
IMAGES_PER_CHUNK = 256  # bounds the memory: a chunk of glyphs needs about 100 MB
MIN_CONTRAST = 0.35  # smallest difference in luminance between shape and background, of 1
LUMINANCE = (0.30, 0.59, 0.11)
DIRECTIONS = ("right", "lower right", "below", "lower left", "left", "upper left", "above", "upper right")

MaskFamily = Callable[[Tensor, Generator], Tensor]


def source_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of the 100 pretraining classes: 40 glyphs, 28 fractals, 16 polygons and stars, 16 textures.

    Args:
        n: Number of images, at least 1.
        seed: Chooses the instances; the classes are always the same.

    Returns:
        Images uint8 (n, 3, 32, 32) and labels int64 (n,).

    Raises:
        ValueError: If `n` or `seed` is out of range.
        TypeError: If `n` or `seed` is not an integer.
    """
    return _draw(_source_masks, SOURCE_CLASSES, n, seed)


def source_glyph_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of the 40 pretraining glyphs alone, labelled as in `source_images`; arguments likewise."""
    return _draw(_source_masks, SOURCE_GLYPHS, n, seed)


def glyph_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of 20 glyph classes that pretraining has not seen; arguments as in `source_images`."""
    return _draw(_new_glyph_masks, NEW_GLYPHS, n, seed)


def count_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of 1 to 6 blobs, labelled count - 1; arguments as in `source_images`."""
    return _draw(shapes.count_masks, shapes.MAX_COUNT, n, seed)


def position_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` images of a square and a disc, labelled by the disc's direction; arguments as in `source_images`."""
    return _draw(shapes.position_masks, len(DIRECTIONS), n, seed)


def class_names(kind: str) -> tuple[str, ...]:
    """Return the names of the classes, indexed by label.

    Args:
        kind: "source", "source_glyph", "glyph", "count" or "position", for the function `<kind>_images`.

    Raises:
        ValueError: If `kind` is none of these.
    """
    glyphs, fractals = _numbered("glyph", SOURCE_GLYPHS), _numbered("fractal", SOURCE_FAMILIES["fractals"])
    names = {
        "source": (*glyphs, *fractals, *_polygons(), *_textures()),
        "source_glyph": glyphs,
        "glyph": _numbered("new glyph", NEW_GLYPHS),
        "count": tuple(str(count) for count in range(1, shapes.MAX_COUNT + 1)),
        "position": DIRECTIONS,
    }
    if kind not in names:
        raise ValueError(f"kind must be one of {', '.join(map(repr, names))}, got {kind!r}")
    return names[kind]


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
    images = images + shapes.uniform((n, 1, 1, 1), generator, 0, 0.12) * pattern
    grain = torch.randn(n, 3, SIDE, SIDE, generator=generator)
    images = images + shapes.uniform((n, 1, 1, 1), generator, 0, 0.03) * grain
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


def _draw(mask_family: MaskFamily, n_classes: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw balanced labels, then their images chunk by chunk from the one generator."""
    _check_draw(n, seed)
    generator = torch.Generator().manual_seed(seed)
    labels = balanced_labels(n, n_classes, generator)
    chunks = [paint(mask_family(chunk, generator), generator) for chunk in labels.split(IMAGES_PER_CHUNK)]
    return torch.cat(chunks), labels


def _check_draw(n: int, seed: int) -> None:
    """Raise TypeError or ValueError that names the argument that is not a whole number in range."""
    for name, value, low in (("n", n, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
        if not low <= value < 2**63:
            raise ValueError(f"{name} must be at least {low} and below 2**63, got {value}")


@lru_cache(maxsize=1)
def _source_families() -> dict[str, MaskFamily]:
    """Return the mask function of each source family."""
    points = shapes.glyph_control_points(SOURCE_GLYPHS, SOURCE_GLYPH_SEED)
    maps = shapes.fractal_maps(SOURCE_FAMILIES["fractals"], SOURCE_FRACTAL_SEED)
    return {
        "glyphs": lambda labels, generator: shapes.glyph_masks(labels, points, generator),
        "fractals": lambda labels, generator: shapes.fractal_masks(labels, maps, generator),
        "polygons": shapes.polygon_masks,
        "textures": shapes.texture_masks,
    }


def _source_masks(labels: Tensor, generator: Generator) -> Tensor:
    masks = torch.empty(len(labels), SIDE, SIDE)
    first = 0
    for family, n_classes in SOURCE_FAMILIES.items():
        rows = ((labels >= first) & (labels < first + n_classes)).nonzero()[:, 0]
        if len(rows) > 0:
            masks[rows] = _source_families()[family](labels[rows] - first, generator)
        first += n_classes
    return masks


def _new_glyph_masks(labels: Tensor, generator: Generator) -> Tensor:
    points = shapes.glyph_control_points(NEW_GLYPHS, NEW_GLYPH_SEED)
    return shapes.glyph_masks(labels, points, generator, jitter=0.10, rotation=0.4)


def _numbered(name: str, n: int) -> tuple[str, ...]:
    return tuple(f"{name} {index:02d}" for index in range(n))


def _polygons() -> tuple[str, ...]:
    styles = ("filled {}-gon", "outlined {}-gon", "filled {}-pointed star", "outlined {}-pointed star")
    return tuple(style.format(corners) for style in styles for corners in range(3, 7))


def _textures() -> tuple[str, ...]:
    gratings = (f"{pace} grating {angle} deg" for pace in ("slow", "fast") for angle in (0, 45, 90, 135))
    patterns = ("slow checkers", "fast checkers", "slow rings", "fast rings")
    noises = (f"noise 1/f^{slope}" for slope in (0.4, 0.9, 1.5, 2.2))
    return (*gratings, *patterns, *noises)
