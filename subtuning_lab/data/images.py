"""Images on their way from files to tensors: decoded once in parallel, or on demand when memory would not hold them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.decode import file_size, fit_image, read_image
from subtuning_lab.utils.text import printable

LARGEST_KEPT_SIZE = 256  # pixels: images of one common size up to this one are not resized by default
DEFAULT_SIZE, SIZE_STEP = 224, 32  # pixels: the largest default of images of several sizes, and what it is rounded to
_SIZED = 500  # files of which the sizes are looked at for a default
_CHUNK = 64  # images per job of the thread pool, at most
_SHOWN = 20  # files that one message names


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


def item_size(items: Items, index: int) -> tuple[int, int]:
    """The (H, W) of one undecoded image in pixels. Raises like `file_size`."""
    return items.shape[1:3] if isinstance(items, np.ndarray | NpyRows) else file_size(items[index])


def common_size(parts: Sequence[Items]) -> tuple[int, int]:
    """The size that images are brought to if nobody says another.

    One that all share is kept if it is at most 256 pixels. Others become squares that are about as large as they are:
    the median of the shorter sides, rounded to a multiple of 32, from 32 to 224.

    Args:
        parts: groups of files or arrays; headers are read until two sizes differ, and then of at most 500 files.
    Returns:
        (H, W) in pixels.
    """
    places = [
        (items, i) for items in parts for i in range(1 if isinstance(items, np.ndarray | NpyRows) else len(items))
    ]
    sizes: set[tuple[int, int]] = set()
    for items, index in places:
        sizes.update(_size_if_readable(items, index))
        if len(sizes) > 1 or max(max(sizes, default=(0, 0))) > LARGEST_KEPT_SIZE:
            break
    else:
        return sizes.pop() if sizes else (DEFAULT_SIZE, DEFAULT_SIZE)
    some = places[:: -(-len(places) // _SIZED)]
    shorter = [min(size) for items, index in some for size in _size_if_readable(items, index)]
    side = SIZE_STEP * int(np.median(shorter or [DEFAULT_SIZE]) / SIZE_STEP + 0.5)
    return (min(max(side, SIZE_STEP), DEFAULT_SIZE),) * 2


def _size_if_readable(items: Items, index: int) -> list[tuple[int, int]]:
    try:
        return [item_size(items, index)]
    except (FileNotFoundError, ValueError):
        return []  # decoding will name it, with all others


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images that are decoded whenever they are asked for; indexes like a uint8 tensor (n, 3, H, W).

    Args:
        items: image files, or uint8 images (n, H, W, 3) that are resized on demand.
        size: (H, W) in pixels of what indexing returns.
        corruptions: (name, severity, seed) applied in this order after decoding; noise depends on `positions` alone.
        positions: int64 (n,), the index that each image had when the corruptions were declared; None means 0 .. n-1.
        stamps: int64 (n, 2), when each file was written, and its bytes; None takes those of now.
    Raises:
        FileNotFoundError: files that are not there; all are named.
    """

    items: Items
    size: tuple[int, int]
    corruptions: tuple[tuple[str, int, int], ...] = ()
    positions: torch.Tensor | None = None
    stamps: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.stamps is None:
            object.__setattr__(self, "stamps", _stamps(self.items))

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
        Raises:
            RuntimeError: a file was changed after the images were declared.
            FileNotFoundError, ValueError: as `decode_images`.
        """
        where = torch.arange(len(self))[index]
        chosen = self.take(where.reshape(-1))
        try:
            images = decode_images(chosen.items, self.size)
        finally:
            chosen._check_unchanged()
        for name, severity, seed in self.corruptions:
            images = corrupt(images, name, severity, seed=seed, positions=chosen.positions)
        return images if where.dim() else images[0]

    def take(self, indices: torch.Tensor) -> StreamedImages:
        """The images at `indices` (int64 (k,)), still undecoded, with the noise that they have here."""
        positions = (torch.arange(len(self)) if self.positions is None else self.positions)[indices]
        stamps = self.stamps[np.asarray(indices)] if len(self.stamps) == len(self) else self.stamps
        return StreamedImages(take_items(self.items, indices), self.size, self.corruptions, positions, stamps)

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed the undecoded bytes, the size, and the corruptions with their positions to a hash."""
        digest.update(repr((self.size, self.corruptions)).encode())
        if self.corruptions and self.positions is not None:
            digest.update(self.positions.numpy().tobytes())
        for item in self.items:
            digest.update(_content_digest(item))
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Raise RuntimeError if files are others than they were, so that no score counts for images it is not of."""
        files, now = _files(self.items), _stamps(self.items)
        changed = [file for file, then, stamp in zip(files, self.stamps, now, strict=True) if (then != stamp).any()]
        if changed:
            first = printable(str(changed[0]))
            raise RuntimeError(
                f"{len(changed)} files were changed after the task was loaded, {first} first: load it again"
            )


def _files(items: Items) -> Sequence[Path]:
    """The files that items are in."""
    return () if isinstance(items, np.ndarray) else (items.path,) if isinstance(items, NpyRows) else items


def _stamps(items: Items) -> np.ndarray:
    """When each file was written, in ns, and its bytes; int64 (files, 2). Raises FileNotFoundError that names all."""
    stamps, errors = [], {}
    for number, file in enumerate(_files(items)):
        try:
            status = os.stat(file)
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:
            errors[number] = FileNotFoundError(f"image file not found: {printable(str(file))}")
    _raise_all(errors, len(stamps) + len(errors))
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


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
        FileNotFoundError, ValueError: as `read_image`; all files that fail are named.
    """
    items = items[:] if isinstance(items, NpyRows) else items
    if isinstance(items, np.ndarray) and items.shape[1:3] == tuple(size):
        return torch.from_numpy(items.transpose(0, 3, 1, 2).copy())
    out = np.empty((len(items), 3, *size), dtype=np.uint8)

    def fill(index: int) -> None:
        item = items[index]
        image = read_image(item, size) if isinstance(item, Path) else fit_image(Image.fromarray(item), size)
        out[index] = image.transpose(2, 0, 1)

    _in_threads(fill, len(items), progress)
    return torch.from_numpy(out)


def _in_threads(work: Callable[[int], object], n: int, progress: str | None) -> None:
    """Call `work(index)` for 0 .. n - 1; its FileNotFoundErrors and ValueErrors are raised together, at the end."""
    threads = os.cpu_count() or 1
    chunk = max(1, min(_CHUNK, n // (4 * threads)))
    errors: dict[int, Exception] = {}

    def some(start: int) -> int:
        stop = min(start + chunk, n)
        for index in range(start, stop):
            try:
                work(index)
            except (FileNotFoundError, ValueError) as error:
                errors[index] = error
        return stop - start

    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=n, desc=progress, unit="img", disable=progress is None) as bar,
    ):
        jobs = [pool.submit(some, start) for start in range(0, n, chunk)]
        try:
            for done in as_completed(jobs):
                bar.update(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _raise_all(errors, n)


def _raise_all(errors: Mapping[int, Exception], n: int) -> None:
    """Raise one error for those of all images, by index: FileNotFoundError if no file is there, else ValueError."""
    if len(errors) < 2:
        for error in errors.values():
            raise error
        return
    lines = [str(errors[index]) for index in sorted(errors)]
    lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    kind = FileNotFoundError if all(isinstance(e, FileNotFoundError) for e in errors.values()) else ValueError
    raise kind("\n".join([f"{len(errors)} of {n} images cannot be read:", *lines]))


def load_images(items: Items, size: tuple[int, int], limit: int, progress: str | None) -> torch.Tensor | StreamedImages:
    """Decode images if the result fits, else look at all headers and stand ready to decode them on demand.

    Args:
        items: image files, or uint8 images (n, H, W, 3).
        size: (H, W) in pixels.
        limit: bytes that the decoded images may take.
        progress: label of a progress bar on stderr; None shows none.
    Returns:
        uint8 tensor (n, 3, H, W), or `StreamedImages` of that shape.
    """
    if 3 * size[0] * size[1] * len(items) <= limit:
        return decode_images(items, size, progress)
    if not isinstance(items, np.ndarray | NpyRows):
        _in_threads(lambda index: item_size(items, index), len(items), progress)
    return StreamedImages(items, size)


def count_shared(train: Items | torch.Tensor, test: Items | torch.Tensor) -> int:
    """How many test images are training images, too: by their pixels in memory, by their bytes in files."""
    sizes = _sizes(train) & _sizes(test)
    known = {_content_digest(item) for item in train if _size(item) in sizes}
    return sum(_content_digest(item) in known for item in test if _size(item) in sizes)


def _sizes(items: Items | torch.Tensor) -> set[int]:
    return {_size(item) for item in (items if isinstance(items, list) else items[:1])}


def _size(item: Path | np.ndarray | torch.Tensor) -> int:
    return item.stat().st_size if isinstance(item, Path) else item.nbytes


def _content_digest(item: Path | np.ndarray | torch.Tensor) -> bytes:
    """SHA-256 of an image's undecoded bytes, or of its pixels."""
    content = item.read_bytes() if isinstance(item, Path) else np.ascontiguousarray(item)
    return hashlib.sha256(content).digest()
