"""One image file to pixels: upright, on white, RGB, at the size that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from subtuning_lab.utils.text import printable

LARGEST_SIZE = 4096  # pixels a side that images may be brought to
MOST_PIXELS = 2**26  # that one file may be decoded to: 8192 x 8192, 256 MB
_STRIP = 16  # a scaled image may be so many times as large as what is cut out of it
_DEEP_MODES = ("I", "F")  # 16 and 32 bit greys: converting them to RGB would clip in silence
# Raster formats whose decoders run no other program; the first frame counts. HEIF and JXL need a plugin.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "MPO", "AVIF", "HEIF", "JXL"),
    *("TGA", "PCX", "ICO", "QOI"),
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
Result = TypeVar("Result")


def image_suffixes() -> frozenset[str]:
    """Suffixes of image files that are read: ".jpg", ".png", ..., those of Pillow's plugins included."""
    formats = _formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode one file to RGB at `size`: turned upright as its EXIF data say, and on white where it is transparent.

    Args:
        path: an image file of 8 bits per channel.
        size: (H, W) in pixels; see `fit_image`.
    Returns:
        uint8 array (H, W, 3).
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is damaged, too large, or has more than 8 bits per channel; it is named.
    """

    def decoded(image: Image.Image) -> np.ndarray:
        if image.mode.startswith(_DEEP_MODES):
            raise ValueError(f"mode {image.mode!r} has more than 8 bits per channel; save it with 8 bits")
        image.draft("RGB", (max(size), max(size)))  # JPEG only: decodes at 1/2, 1/4, 1/8 where that suffices
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many; at most {MOST_PIXELS:,} are decoded")
        image.load()
        turn = _TURNS.get(_orientation(image))
        image = image if turn is None else image.transpose(turn)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return fit_image(image.convert("RGB"), size)

    return _with_image(path, decoded)


def _with_image(path: Path, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of an opened file. Raises as `read_image`."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would not end
            raise ValueError("not a regular file")
        with Image.open(path, formats=_formats()) as image:
            return use(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"image file not found: {printable(str(path))}") from None
    except Image.DecompressionBombError:
        reason: object = f"it has too many pixels; at most {MOST_PIXELS:,} are decoded"
    except UnidentifiedImageError:
        reason = "not an image"
    except Exception as error:  # decoders stumble over damaged files in many ways
        reason = error or type(error).__name__
    raise ValueError(f"cannot decode image {printable(str(path))}: {reason}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none that can be read. Pillow turns TIFF files upright itself."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged notes about an image leave its pixels readable
        return 1
    return orientation if image.format != "TIFF" and orientation in range(1, 9) else 1


def fit_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Scale an RGB image until it just covers `size` (bilinear, antialiased) and cut the centre out.

    Args:
        image: an RGB image.
        size: (H, W) in pixels.
    Returns:
        uint8 array (H, W, 3).
    """
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    scale = max(width / image.width, height / image.height)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    if wide * high <= _STRIP * width * height:
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + width, top + height)))
    # A long strip would be scaled to much more than is kept: only its centre is.
    across, down = image.width / wide, image.height / high
    right, bottom = min(image.width, (left + width) * across), min(image.height, (top + height) * down)
    return np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR, box=(left * across, top * down, right, bottom))
    )


def file_size(path: Path) -> tuple[int, int]:
    """The (H, W) of an upright image file in pixels; its header alone is read. Raises like `read_image`."""

    def upright(image: Image.Image) -> tuple[int, int]:
        return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)

    return _with_image(path, upright)
