"""Images on their way from files to tensors: decoded once in parallel, or on demand when memory would not hold them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from subtuning_lab.data.corruptions.registry import corrupt

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
LARGEST_KEPT_SIZE = 256  # pixels: images of one common size up to this one are not resized by default
DEFAULT_SIZE = 224
_CHUNK = 64  # images per job of the thread pool, at most
_DEEP_MODES = ("I", "F")  # 16 and 32 bit greys: converting them to RGB would clip in silence


@dataclass(frozen=True, eq=False)
class NpyRows:
    """Some images of a .npy file, read when they are asked for; indexes like a uint8 array (n, H, W, 3).

    Args:
        path: the file, a uint8 array (N, H, W, 3).
        rows: int64 (n,), which of its images, in this order.
    """

    path: Path
    rows: np.ndarray

    @cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[type[NpyRows], tuple[Path, np.ndarray]]:
        return NpyRows, (self.path, self.rows)  # a pickled memory map would be the whole file

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, H, W, 3)."""
        return (len(self), *self._array.shape[1:])

    def __getitem__(self, index: int | slice) -> np.ndarray:
        """Read one image (H, W, 3), or those of a slice (k, H, W, 3)."""
        return np.array(self._array[self.rows[index]])

    def take(self, indices: np.ndarray) -> NpyRows:
        """The images at `indices` (int64 (k,)), still unread."""
        return NpyRows(self.path, self.rows[indices])


Items = Sequence[Path] | np.ndarray | NpyRows  # image files, or uint8 (n, H, W, 3) in memory or in a file


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode one file to RGB at `size`.

    Args:
        path: an image file of 8 bits per channel.
        size: (H, W) in pixels; see `fit_image`.
    Returns:
        uint8 array (H, W, 3).
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is damaged, or has more than 8 bits per channel; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise ValueError(f"mode {image.mode!r} has more than 8 bits per channel; save it with 8 bits")
            image.draft("RGB", (max(size), max(size)))  # JPEG only: decodes at 1/2, 1/4, 1/8 where that suffices
            return fit_image(image.convert("RGB"), size)
    except FileNotFoundError:
        raise FileNotFoundError(f"image file not found: {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"cannot decode image {path}: {reason}") from error


def fit_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Scale an RGB image until it just covers `size` (bilinear, antialiased) and cut the centre out.

    Args:
        image: an RGB image.
        size: (H, W) in pixels.
    Returns:
        uint8 array (H, W, 3).
    """
    height, width = size
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


def item_size(items: Items, index: int) -> tuple[int, int]:
    """The (H, W) of one undecoded image in pixels; a file's header alone is read. Raises like `read_image`."""
    if isinstance(items, np.ndarray | NpyRows):
        return items.shape[1], items.shape[2]
    try:
        with Image.open(items[index]) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise FileNotFoundError(f"image file not found: {items[index]}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode image {items[index]}: {error}") from error


def common_size(parts: Sequence[Items]) -> tuple[int, int]:
    """The (H, W) that all images share if they do and it is at most 256 pixels, else (224, 224).

    Args:
        parts: groups of files or arrays; headers are read until two sizes differ.
    Returns:
        (H, W) in pixels.
    """
    sizes: set[tuple[int, int]] = set()
    for items in parts:
        for index in range(1 if isinstance(items, np.ndarray | NpyRows) else len(items)):
            sizes.add(item_size(items, index))
            if len(sizes) > 1 or max(max(sizes)) > LARGEST_KEPT_SIZE:
                return DEFAULT_SIZE, DEFAULT_SIZE
    return sizes.pop()


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images that are decoded whenever they are asked for; indexes like a uint8 tensor (n, 3, H, W).

    Args:
        items: image files, or uint8 images (n, H, W, 3) that are resized on demand.
        size: (H, W) in pixels of what indexing returns.
        corruptions: (name, severity, seed) applied in this order after decoding; noise depends on `positions` alone.
        positions: int64 (n,), the index that each image had when the corruptions were declared; None means 0 .. n-1.
    """

    items: Items
    size: tuple[int, int]
    corruptions: tuple[tuple[str, int, int], ...] = ()
    positions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> torch.Size:
        """(n, 3, H, W), as of the tensor that this stands for."""
        return torch.Size((len(self), 3, *self.size))

    @property
    def dtype(self) -> torch.dtype:
        """Always torch.uint8."""
        return torch.uint8

    @property
    def device(self) -> torch.device:
        """Always the CPU, where images are decoded."""
        return torch.device("cpu")

    def __getitem__(self, index: torch.Tensor | slice | int | Sequence[int]) -> torch.Tensor:
        """Decode the images at `index` in parallel.

        Args:
            index: int64 tensor (k,), boolean tensor (n,), slice, list of ints, or one int.
        Returns:
            uint8 tensor (k, 3, H, W); (3, H, W) for one int.
        """
        where = torch.arange(len(self))[index]
        chosen = self.take(where.reshape(-1))
        images = decode_images(chosen.items, self.size)
        if self.corruptions:
            for name, severity, seed in self.corruptions:
                images = corrupt(images, name, severity, seed=seed, positions=chosen.positions)
        return images if where.dim() else images[0]

    def take(self, indices: torch.Tensor) -> StreamedImages:
        """The images at `indices` (int64 (k,)), still undecoded, with the noise that they have here."""
        positions = torch.arange(len(self)) if self.positions is None else self.positions
        return StreamedImages(take_items(self.items, indices), self.size, self.corruptions, positions[indices])

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed the undecoded bytes, the size, and the corruptions with their positions to a hash."""
        digest.update(repr((self.size, self.corruptions)).encode())
        if self.corruptions and self.positions is not None:
            digest.update(self.positions.numpy().tobytes())
        for item in self.items:
            content = item.read_bytes() if isinstance(item, Path) else item.tobytes()
            digest.update(hashlib.sha256(content).digest())


def take_items(items: Items, indices: torch.Tensor | np.ndarray) -> Items:
    """The files or array rows at `indices` (int64 (k,))."""
    if isinstance(items, NpyRows):
        return items.take(np.asarray(indices))
    if isinstance(items, np.ndarray):
        return items[np.asarray(indices)]
    return [items[index] for index in indices.tolist()]


def decode_images(items: Items, size: tuple[int, int], progress: str | None = None) -> torch.Tensor:
    """Decode and fit images in a thread pool.

    Args:
        items: image files, or uint8 images (n, H, W, 3).
        size: (H, W) in pixels of every image in the result.
        progress: label of a progress bar on stderr; None shows none.
    Returns:
        uint8 tensor (n, 3, H, W).
    Raises:
        FileNotFoundError, ValueError: as `read_image`, for the first failing file; the rest is not decoded.
    """
    items = items[:] if isinstance(items, NpyRows) else items
    if isinstance(items, np.ndarray) and items.shape[1:3] == tuple(size):
        return torch.from_numpy(items.transpose(0, 3, 1, 2).copy())
    out = np.empty((len(items), 3, *size), dtype=np.uint8)

    def fill(start: int, stop: int) -> int:
        for index in range(start, stop):
            item = items[index]
            image = read_image(item, size) if isinstance(item, Path) else fit_image(Image.fromarray(item), size)
            out[index] = image.transpose(2, 0, 1)
        return stop - start

    _run_in_threads(fill, len(items), progress)
    return torch.from_numpy(out)


def _run_in_threads(job: Callable[[int, int], int], n: int, progress: str | None) -> None:
    """Run `job(start, stop)`, which returns how many images it did, over 0 .. n; the first error stops the rest."""
    threads = os.cpu_count() or 1
    chunk = max(1, min(_CHUNK, n // (4 * threads)))
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=n, desc=progress, unit="img", disable=progress is None) as bar,
    ):
        jobs = [pool.submit(job, start, min(start + chunk, n)) for start in range(0, n, chunk)]
        try:
            for done in as_completed(jobs):
                bar.update(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def default_memory_limit() -> int:
    """Half of the memory that is available now, in bytes."""
    return psutil.virtual_memory().available // 2


def load_images(items: Items, size: tuple[int, int], limit: int, progress: str | None) -> torch.Tensor | StreamedImages:
    """Decode images if the result fits, else stand ready to decode them on demand.

    Args:
        items: image files, or uint8 images (n, H, W, 3).
        size: (H, W) in pixels.
        limit: bytes that the decoded images may take.
        progress: label of a progress bar on stderr; None shows none.
    Returns:
        uint8 tensor (n, 3, H, W), or `StreamedImages` of that shape.
    """
    if 3 * size[0] * size[1] * len(items) > limit:
        return StreamedImages(items, size)
    return decode_images(items, size, progress)
