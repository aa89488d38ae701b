"""What callers hand in, checked and brought to the types that tasks hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


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
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise TypeError(f"{what} must be a numpy array or torch tensor, got {type(images).__name__}")
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise TypeError(f"{what} must be uint8, or floating point in [0, 1], got {images.dtype}")
        images = torch.from_numpy(np.ascontiguousarray(images))
    images = _channels_first(images.detach().cpu(), what)
    if images.is_floating_point():
        bad = ~((images >= 0) & (images <= 1)).flatten(1).all(dim=1)  # NaN fails both comparisons
        if bad.any():
            raise ValueError(f"{what}[{int(bad.nonzero()[0])}] has values that are NaN or outside [0, 1]")
        images = (images.float() * 255).round().to(torch.uint8)
    if images.dtype != torch.uint8:
        raise TypeError(f"{what} must be uint8, or floating point in [0, 1], got {images.dtype}")
    return images.expand(-1, 3, -1, -1).clone(memory_format=torch.contiguous_format)


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


def as_integers(values: np.ndarray | torch.Tensor | Sequence[int], what: str) -> torch.Tensor:
    """Convert integers to a new int64 tensor (n,); anything else raises TypeError."""
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{what} must have shape (n,), got {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def check_labels(labels: torch.Tensor, classes: Sequence[str], part: str) -> None:
    """Raise ValueError at the first label outside 0 .. len(classes) - 1."""
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(f"{part} label {int(labels[index])} at index {index} is outside 0..{len(classes) - 1}")


def check_validation(validation: torch.Tensor, n: int) -> None:
    """Raise ValueError unless `validation` holds distinct indices below n, and leaves some images for training."""
    if validation.dtype != torch.int64 or validation.dim() != 1 or not 0 < len(validation) < n:
        raise ValueError(f"validation must be int64 with 1 to {n - 1} indices, got {tuple(validation.shape)}")
    if int(validation.min()) < 0 or int(validation.max()) >= n or len(validation.unique()) < len(validation):
        raise ValueError(f"validation must hold distinct indices in 0..{n - 1}")


def check_number(name: str, value: int | None, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless `value` is None or an int in low .. high."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be at least {low}{f' and at most {high}' if high else ''}, got {value}")
