"""What callers hand in, checked and brought to the types that tasks hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from subtuning_lab.utils.validation import shown

MOST_CLASSES = 100_000
ROUNDING = 1e-3  # what resizing may leave outside [0, 1]; less than half of a byte's step


def as_images(images: np.ndarray | torch.Tensor, what: str = "images") -> torch.Tensor:
    """Convert images in memory to a new uint8 tensor.

    Args:
        images: uint8, or floating point in [0, 1]: (n, 3, H, W), (n, H, W, 3), or grey (n, H, W) or (n, 1, H, W).
        what: the argument's name, for messages.
    Returns:
        uint8 tensor (n, 3, H, W).
    Raises:
        TypeError: neither array nor tensor, or a dtype that is neither uint8 nor floating point.
        ValueError: another shape, or NaN or values outside [0, 1]; the first bad image's index is named.
    """
    batch = image_batch(images, what).cpu()
    if batch.is_floating_point():
        batch = (batch.float() * 255).round().to(torch.uint8)
    return batch.clone(memory_format=torch.contiguous_format)


def image_batch(images: np.ndarray | torch.Tensor, what: str = "images") -> torch.Tensor:
    """The same images (n, 3, H, W) where they lie, uint8 or floating point. Takes what `as_images` takes."""
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise TypeError(f"{what} must be a numpy array or torch tensor, got {type(images).__name__}")
    if isinstance(images, np.ndarray):
        if images.dtype.type not in (np.uint8, np.float16, np.float32, np.float64):
            raise TypeError(f"{what} must be uint8, or floating point in [0, 1], got {images.dtype}")
        images = torch.from_numpy(np.require(images, images.dtype.newbyteorder("="), ["C", "W"]))
    if images.layout is not torch.strided or images.is_meta:
        raise TypeError(f"{what} must be a dense tensor, got {'no data' if images.is_meta else images.layout}")
    images = _channels_first(images.detach(), what)
    check_values(images, what)
    return images.expand(-1, 3, -1, -1)


def check_values(images: torch.Tensor, what: str = "images") -> None:
    """Raise TypeError or ValueError unless images (n, ...) are uint8, or floating point in [0, 1] but for rounding."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{what} must be uint8, or floating point in [0, 1], got {images.dtype}")
    if images.is_floating_point() and images.numel():
        low, high = (float(value) for value in images.aminmax())  # one pass; NaN comes through
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            good = ((images >= -ROUNDING) & (images <= 1 + ROUNDING)).flatten(1).all(dim=1)
            first = int((~good).nonzero()[0])
            raise ValueError(f"{what}[{first}] has values that are NaN or outside [0, 1]: {low:.4g} to {high:.4g}")


def _channels_first(images: torch.Tensor, what: str) -> torch.Tensor:
    """Bring images of any accepted layout to (n, 3 or 1, H, W), or raise ValueError."""
    shape = tuple(images.shape)
    if len(shape) == 3:
        images = images[:, None]
    elif len(shape) == 4 and shape[1] not in (1, 3) and shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in shape:
        raise ValueError(f"{what} must be (n, 3, H, W), (n, H, W, 3) or grey (n, H, W), none empty; got {shape}")
    return images


def check_uint8_rgb(images: object) -> None:
    """Raise TypeError or ValueError unless images are uint8 (n, 3, H, W), not empty in space."""
    if not hasattr(images, "dtype") or not hasattr(images, "shape"):
        raise TypeError(f"images is {shown(images)}; it must be a uint8 tensor (n, 3, H, W)")
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        raise ValueError(f"images must be uint8 (n, 3, H, W), got {images.dtype} {shape}")


def as_integers(values: np.ndarray | torch.Tensor | Sequence[int], what: str) -> torch.Tensor:
    """Convert integers to a new int64 tensor (n,).

    Raises:
        TypeError: anything but integers.
        ValueError: another shape, or an integer beyond 64 bits.
    """
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} must have shape (n,): {error}") from error
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{what} must have shape (n,), got {array.shape}")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ValueError(f"{what} must be integers below 2**63, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def check_labels(labels: torch.Tensor, classes: Sequence[str], part: str) -> None:
    """Raise ValueError at the first label outside 0 .. len(classes) - 1."""
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(f"{part} label {int(labels[index])} at index {index} is outside 0..{len(classes) - 1}")


def numbered_classes(labels: torch.Tensor) -> tuple[str, ...]:
    """Names "0", "1", ... up to the largest label; ValueError beyond `MOST_CLASSES`."""
    largest = int(labels.max()) if len(labels) else 0
    if largest >= MOST_CLASSES:
        raise ValueError(
            f"label {largest} at index {int(labels.argmax())} is too large; at most {MOST_CLASSES} classes"
        )
    return tuple(str(label) for label in range(largest + 1))


def check_validation(validation: torch.Tensor, n: int) -> None:
    """Raise ValueError unless `validation` holds distinct indices below n, and leaves some images for training."""
    if validation.dtype != torch.int64 or validation.dim() != 1 or not 0 < len(validation) < n:
        raise ValueError(f"validation must be int64 with 1 to {n - 1} indices, got {tuple(validation.shape)}")
    if int(validation.min()) < 0 or int(validation.max()) >= n or len(validation.unique()) < len(validation):
        raise ValueError(f"validation must hold distinct indices in 0..{n - 1}")
