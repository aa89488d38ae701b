"""How an image becomes what a task's network sees: one description, for training, files, prediction and export."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import nn

from subtuning_lab.data.arrays import as_images, check_values, image_batch
from subtuning_lab.data.augment import resize_to
from subtuning_lab.data.images import StreamedImages, decode_images, item_size
from subtuning_lab.utils.containers import Numbers
from subtuning_lab.utils.files import expanded
from subtuning_lab.utils.memory import free_main_memory
from subtuning_lab.utils.validation import Several, Sides, Whole, checked, shown

Images = torch.Tensor | np.ndarray | StreamedImages | str | Path | Sequence[str | Path]
Size = tuple[int, int]  # height and width in pixels


@checked
@dataclass(frozen=True)
class Preparation:
    """The steps that a task's training images went through, which any other image must go through as well.

    An image is scaled until it just covers `crop_size` and its centre is cut out (bilinear, antialiased, to bytes), as
    tasks load files; then it is squashed to `image_size` (bilinear, antialiased), as recipes ask for; then scaled to
    [0, 1] and normalized. The first step is `prepare`'s, the others are inside of the networks.

    Args:
        crop_size: of the task's images; None where nothing tells it, which leaves images in memory as they are.
        image_size: side in pixels of what the network computes on; None squashes nothing.
        mean, std: the normalization, a number per channel, red first.
        file_size: what image files are brought to where `crop_size` is None.
        other_sizes: of images of merged tasks that are scaled and cut to another size when they are alone.
    """

    crop_size: Annotated[Size | None, Sides(pairs_only=True).or_none()]
    image_size: Annotated[int | None, Whole(1).or_none()]
    mean: Annotated[tuple[float, ...], Numbers()]
    std: Annotated[tuple[float, ...], Numbers()]
    file_size: Annotated[Size, Sides(pairs_only=True)]
    other_sizes: Annotated[tuple[Size, ...], Several(Sides(pairs_only=True), least=0)] = ()

    @property
    def size(self) -> Size:
        """Height and width that files come in."""
        return self.crop_size or self.file_size

    @checked(size=Sides(pairs_only=True).or_none())
    def prepared(self, images: Images, size: Size | None = None) -> torch.Tensor | StreamedImages:
        """Images as the task's own are.

        Args:
            images: a file's path or several; images in memory, uint8 or float in [0, 1], as (n, 3, H, W),
                (n, H, W, 3), grey (n, 1, H, W), or one as (3, H, W) or (H, W, 3); or streamed ones.
            size: another size than `crop_size`.
        Returns:
            (n, 3, height, width): a tensor, uint8 where anything was cropped; files stay undecoded.
        Warns:
            Where nothing tells how training cut its images, of files that it may have cut otherwise; and where merged
            tasks cut them to several sizes.
        Raises:
            TypeError, ValueError: images of another type, shape or range.
            FileNotFoundError: no such file.
        """
        crop = self.crop_size if size is None else tuple(size)
        if isinstance(images, StreamedImages):
            self._warn_of_others(size)
            return images if crop in (None, images.size) else replace(images, size=crop)
        if paths := _paths(images):
            self._warn_of_others(size)
            if crop is None:
                self._warn_of_guess(paths)
            return StreamedImages(paths, crop or self.file_size)
        batch = image_batch(_as_batch(images))
        if tuple(batch.shape[2:]) == (self.image_size,) * 2:
            return batch  # as any task alone has it
        self._warn_of_others(size)
        if crop is None or tuple(batch.shape[2:]) == crop:
            return batch
        return decode_images(as_images(batch).permute(0, 2, 3, 1).numpy(), crop)

    def _warn_of_others(self, size: Size | None) -> None:
        if size is None and self.other_sizes:
            others = " and ".join(map(_across, self.other_sizes))
            warning = (
                f"images are cut to {_across(self.size)} for all merged tasks; tasks that cut them to {others} when "
                f"alone may answer otherwise than alone. Load the tasks' images with one image_size to merge them"
            )
            warnings.warn(warning, stacklevel=4)

    def _warn_of_guess(self, paths: Sequence[Path]) -> None:
        """Of the first file that the unknown cut may have treated otherwise."""
        for path in paths:
            try:
                height, width = item_size([path], 0)
            except (FileNotFoundError, ValueError):
                continue  # decoding will name it, with all others
            high, wide = self.file_size
            if height * wide != width * high or (self.image_size is None and height != high):
                warning = (
                    f"nothing tells how training cut its images (crop_size is None): {path.name} of {height} x {width} "
                    f"is cut to {_across(self.file_size)}. Give arrays cut as in training, or the task its crop_size"
                )
                warnings.warn(warning, stacklevel=4)
                return

    @checked(height=Whole(1), width=Whole(1))
    def fits(self, height: int, width: int) -> bool:
        """Whether images of a size show what the task's own show: no squash would distort them otherwise."""
        crop, side = self.crop_size, self.image_size
        if crop is None or (height, width) in (crop, (side, side)):
            return True
        return side is not None and height * crop[1] == width * crop[0]

    def as_dict(self) -> dict[str, object]:
        """Plain values by name, for the files of exported networks."""
        steps = "scale to cover crop_size, cut out its centre, squash to image_size, scale to [0, 1], normalize"
        return {"steps": steps, "interpolation": "bilinear, antialiased", "channels": "RGB", **asdict(self)}


class NetworkInput(nn.Module):
    """The steps inside of a network: (batch, 3, height, width), uint8 or float in [0, 1], to what its parts take.

    In eager mode on a CPU it looks at every batch's range (5 microseconds for one image of 32 x 32, 35 for 224 x 224),
    on other devices, which would have to be waited for, at the first batch's; compiled and exported it doesn't.

    Raises:
        TypeError: no tensor, or one that is neither uint8 nor floating point.
        ValueError: another shape, NaN, or values outside [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preparation: Preparation, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.preparation = preparation
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self._is_looked_at, self._warned = False, False

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"images is {shown(images)}; it must be a tensor (batch, 3, height, width); see prepare")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (batch, 3, height, width), got {tuple(images.shape)}; see prepare")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8, or floating point in [0, 1], got {images.dtype}")
        if not torch.compiler.is_compiling():
            self._look_at(images)
        scaled = images.to(self.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return (resize_to(scaled, self.preparation.image_size) - self.mean) / self.std

    def _look_at(self, images: torch.Tensor) -> None:
        kind = images.device.type
        if kind != "meta" and (kind == "cpu" or not self._is_looked_at):
            check_values(images.detach())
            self._is_looked_at = True
        height, width = images.shape[2:]
        if not self._warned and not self.preparation.fits(height, width):
            self._warned = True
            trained = f"those of training were {_across(self.preparation.crop_size)}"
            warnings.warn(f"images are {height} x {width}, {trained}; prepare() brings others to that", stacklevel=2)


def random_images(batch_size: int, height: int, width: int) -> torch.Tensor:
    """Images in [0, 1], the same ones in every call. Raises ValueError where memory would not hold them."""
    needed, free = 12 * batch_size * height * width, free_main_memory()
    if needed > free:
        told = f"{batch_size} images of {height} x {width} take {needed / 2**30:,.0f} GB; {free / 2**30:,.0f} are free"
        raise ValueError(f"{told}: give a smaller batch_size or image_size")
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def trained_size(net: nn.Module) -> Size | None:
    """Height and width of what `prepare` gives to a task's network, or a merged one; None for other networks."""
    inputs = (module for module in net.modules() if isinstance(module, NetworkInput))
    return next((module.preparation.size for module in inputs), None)


def _across(size: Size) -> str:
    return " x ".join(map(str, size))


def _paths(images: object) -> list[Path]:
    """The files that are named; none where the images are in memory."""
    if isinstance(images, str | os.PathLike):
        images = [images]
    if not isinstance(images, list | tuple):
        return []
    if not images:
        raise ValueError("images is empty; give at least one path")
    if not all(isinstance(path, str | os.PathLike) for path in images):
        raise TypeError(f"images is {shown(images)}; it must hold paths, or be one array or tensor")
    return [expanded(path) for path in images]


def _as_batch(images: object) -> object:
    """A batch of the one image that three axes mean; anything else as it is."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) != 3:
        return images
    if 3 not in (shape[0], shape[2]):
        raise ValueError(f"images must be (n, 3, H, W), (n, H, W, 3) or one image with 3 channels; got {shape}")
    if shape[2] != 3:
        told = f"images of {shape} are taken for one RGB image; for that say images[None], for 3 grey images[:, None]"
        warnings.warn(told, stacklevel=4)
    return images[None]
