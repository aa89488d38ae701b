"""What the tests of the data room share: noise, image files, folders, quiet loading."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from subtuning_lab import Split, Task, load_task


def noise(n: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(shade).save(path)
    return path


def write_folder(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_image(root / name / f"{number:03d}.png", seed=seed + 1000 * label + number)
    return root


def load(spec: str, **options) -> Task:
    return load_task(spec, progress=False, **options)


def image_set(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images[:]}


def copy_of(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))
