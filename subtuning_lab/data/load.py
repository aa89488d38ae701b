"""What a task's name stands for: bundled, generated, published, or a folder's images, not yet decoded."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch

from subtuning_lab.data.corruptions.registry import check_corruption
from subtuning_lab.data.folders import cifar10c, folder, vtab
from subtuning_lab.data.splits import SPLIT_SEED, Listing, Part, stratified_choice
from subtuning_lab.data.torchvision_sets import PUBLISHED, VTAB, published, vtab_sized

_TRAIN_SEED, _TEST_SEED = 1_000_003, 2**32 - 5  # far from the small seeds that pretraining uses; torch takes 32 bits
GENERATED = {
    "source": "40 glyph classes of the bundled backbones' pretraining, fresh images, 32 x 32 (offline)",
    "glyphs": "20 glyph classes that the bundled backbones have not seen, 32 x 32 (offline)",
    "count": "how many blobs, 1 to 6, 32 x 32 (offline)",
    "position": "in which of 8 directions a disc lies from a square, 32 x 32 (offline)",
}
_FAMILIES = {"source": "source_glyph", "glyphs": "glyph", "count": "count", "position": "position"}
_SPEC = re.compile(r"(.*?)((?:\+[^+@/]+@[^+@/]*)*)", re.DOTALL)
_PATTERNS = {
    "folder:DIR": "your images: DIR/train/<class>/* and DIR/test/<class>/* (or val/), or DIR/<class>/*",
    "vtab:DIR": "VTAB-1k's official lists in DIR: train800val200.txt, val200.txt, test.txt with 'path label' lines",
    "cifar10c:DIR/NAME@SEVERITY": "CIFAR-10-C as published: DIR/NAME.npy and DIR/labels.npy, severity 1 to 5",
}
_LISTED = {"folder": folder, "vtab": vtab, "cifar10c": cifar10c}
ADVICE = f"Without internet use 'digits', {', '.join(map(repr, GENERATED))}, or your own images: 'folder:DIR'."


def task_names() -> dict[str, str]:
    """What `load_task` knows by name: name -> one-line description, offline tasks first."""
    named = {"digits": "10 handwritten digits, real, 32 x 32, 1,000 + 797 (offline)", **GENERATED}
    return named | {name: entry.description for name, entry in PUBLISHED.items()} | VTAB | _PATTERNS


def parse_spec(spec: str) -> tuple[str, list[tuple[str, int]]]:
    """Take the trailing `+corruption@severity` parts off a spec; a path may contain plus signs itself.

    Args:
        spec: see `subtuning_lab.data.task.load_task`.
    Returns:
        The rest, and (name, severity) of every corruption in order.
    Raises:
        TypeError: `spec` is not a string.
        ValueError: a corruption is unknown, written in another way, or has a severity outside 1 to 5.
    """
    if not isinstance(spec, str):
        raise TypeError(f"a task is named by a string, got {spec!r}; arrays go through Task.from_arrays")
    match = _SPEC.fullmatch(spec)
    base, suffix = match.group(1), match.group(2)
    if "+" in base and base.partition(":")[0] not in _LISTED:
        raise ValueError(f"cannot read {spec!r}: a corruption is written '+name@severity', as in 'digits+contrast@3'")
    found = [part.split("@") for part in suffix.split("+")[1:]]
    corruptions = [(name, int(severity) if severity.isdecimal() else severity) for name, severity in found]
    for name, severity in corruptions:
        check_corruption(name, severity)
    return base, corruptions


def list_images(
    base: str, train_size: int, test_size: int, seed: int, data_dir: str | Path | None, download: bool
) -> Listing:
    """Find the images of a task without decoding them.

    Args:
        base: a spec without corruptions.
        train_size, test_size, seed: of generated tasks; others are listed whole.
        data_dir: folder of downloaded data sets; None takes $SUBTUNING_LAB_DATA, else ~/.cache/subtuning_lab.
        download: whether missing data sets may be downloaded.
    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `subtuning_lab.data.task.load_task`.
    """
    kind, _, path = base.partition(":")
    if kind in _LISTED and path:
        return _LISTED[kind](Path(path).expanduser())
    if base == "digits":
        return digits()
    if base in GENERATED:
        return generated(base, train_size, test_size, seed)
    if base in PUBLISHED or base in VTAB:
        root = data_dir or os.environ.get("SUBTUNING_LAB_DATA") or Path("~/.cache/subtuning_lab")
        return (vtab_sized if base in VTAB else published)(base, Path(root).expanduser(), download, ADVICE)
    raise ValueError(f"unknown task {base!r}; allowed are {', '.join(task_names())}")


def digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits at 32 x 32 (bicubic): 1,000 to train on and 797 to test on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16.0).float()[:, None]  # (n, 1, 8, 8) in [0, 1]
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    images = (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    classes, labels = tuple(str(digit) for digit in range(10)), bunch.target.astype(np.int64)
    train = stratified_choice(labels, 1000, SPLIT_SEED)
    whole = Part(images, labels)
    return Listing(classes, whole.take(train), whole.take(np.setdiff1d(np.arange(len(labels)), train)))


def generated(kind: str, train_size: int, test_size: int, seed: int) -> Listing:
    """Draw fresh images of one procedural kind; the test images are the same for every seed.

    Args:
        kind: a name in `GENERATED`.
        train_size, test_size: number of images.
        seed: of the training images.
    Returns:
        A listing of arrays (n, 32, 32, 3).
    """
    from subtuning_lab.data import synthetic as procedural

    family = _FAMILIES[kind]
    draw = getattr(procedural, f"{family}_images")
    parts = (draw(train_size, _TRAIN_SEED + seed), draw(test_size, _TEST_SEED))
    train, test = (Part(images.permute(0, 2, 3, 1).numpy(), labels.numpy()) for images, labels in parts)
    return Listing(procedural.class_names(family), train, test)
