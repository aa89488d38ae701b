"""What a task's name stands for: bundled, generated, published, or the images of a folder; and how it is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch

from subtuning_lab.data.builtin import DIGITS, GENERATED, digits, generated
from subtuning_lab.data.corruptions.registry import corruption_names, parse_corruptions
from subtuning_lab.data.decode import LARGEST_SIZE
from subtuning_lab.data.folders import cifar10c, folder, vtab
from subtuning_lab.data.images import common_size, load_images
from subtuning_lab.data.splits import Listing
from subtuning_lab.data.task import Split, Task, warn_of_shared
from subtuning_lab.data.torchvision_sets import PUBLISHED, VTAB, published, vtab_sized
from subtuning_lab.utils.files import expanded
from subtuning_lab.utils.memory import free_main_memory
from subtuning_lab.utils.text import printable
from subtuning_lab.utils.validation import Is, Text, Whole, checked

_SPEC = re.compile(r"(.*?)((?:\+[^+@/]+@[^+@/]*)*)", re.DOTALL)
_PATTERNS = {
    "folder:DIR": "your images: DIR/train/<class>/* and DIR/test/<class>/* (or val/), or DIR/<class>/*",
    "vtab:DIR": "VTAB-1k's lists in DIR: train800val200.txt, val200.txt, test.txt with 'path label' lines",
    "cifar10c:DIR/NAME@SEVERITY": "CIFAR-10-C as published: DIR/NAME.npy and DIR/labels.npy, severity 1 to 5",
}
_LISTED = {"folder": folder, "vtab": vtab, "cifar10c": cifar10c}
ADVICE = f"Without internet use 'digits', {', '.join(map(repr, GENERATED))}, or your own images: 'folder:DIR'."


def task_names() -> dict[str, str]:
    """What `load_task` knows by name: name -> one-line description, offline tasks first."""
    return DIGITS | GENERATED | {name: entry.description for name, entry in PUBLISHED.items()} | VTAB | _PATTERNS


@checked
def load_task(
    spec: Annotated[str, Text()],
    *,
    train_size: Annotated[int | None, Whole(2, none=True)] = None,
    test_size: Annotated[int | None, Whole(1, none=True)] = None,
    seed: Annotated[int, Whole(0, 2**31 - 1)] = 0,
    image_size: Annotated[int | None, Whole(1, LARGEST_SIZE, none=True)] = None,
    data_dir: Annotated[str | Path | None, Is((str, Path), none=True)] = None,
    download: bool = True,
    memory_limit: Annotated[int | None, Whole(0, none=True)] = None,
    progress: bool = True,
) -> Task:
    """Load a task by name, from a folder of images, from VTAB-1k's lists, or from CIFAR-10-C's arrays.

    Published splits are used where there are any. Else 20 % are held out for testing: stratified, and the same ones
    whatever `seed` says. Only images that were chosen are decoded, once and in parallel.

    Args:
        spec: a name of `task_names()`, `folder:DIR`, `vtab:DIR` or `cifar10c:DIR/NAME@SEVERITY` (see
            `subtuning_lab.data.folders`), then any number of `+corruption@severity`, applied to training and test
            images at their final size.
        train_size, test_size: how many images to choose, stratified; None takes all (1,000 of a generated task).
        seed: of that choice, and of the training images of a generated task.
        image_size: pixels; the shorter side is scaled to it and the centre cut out. None: `common_size`.
        data_dir: folder of downloaded data sets; None takes $SUBTUNING_LAB_DATA, else ~/.cache/subtuning_lab.
        download: whether missing data sets may be downloaded.
        memory_limit: bytes of decoded images, beyond which a split is decoded on demand; None: half of what is free.
        progress: whether to show progress bars on stderr.
    Returns:
        The task, named `spec`.
    Raises:
        ValueError: an unknown name, damaged images, a class without images, a bad line.
        FileNotFoundError: a missing folder, list, image or data set.
        ConnectionError: a download failed.
    Warns:
        UserWarning: test images that are training images, too; files or folders that are left out.
    """
    base, corruptions = parse_spec(spec)
    train_size, test_size, image_size = (size and int(size) for size in (train_size, test_size, image_size))
    listing = list_images(base, train_size or 1000, test_size or 1000, int(seed), data_dir, download)
    chosen = listing.choose(train_size, test_size, int(seed))
    size = (image_size, image_size) if image_size else common_size([chosen.train.items, chosen.test.items])
    limit = free_main_memory() // 2 if memory_limit is None else memory_limit
    train, test = _load_splits(chosen, size, limit, printable(base) if progress else None)
    decoded = all(isinstance(split.images, torch.Tensor) for split in (train, test))
    warn_of_shared(*((train.images, test.images) if decoded else (chosen.train.items, chosen.test.items)))
    held = None if chosen.validation is None else torch.from_numpy(chosen.validation)
    task = Task(printable(spec), chosen.classes, train, test, held, chosen.source)
    return replace(task, train=train.corrupted(corruptions, part=0), test=test.corrupted(corruptions, part=1))


def parse_spec(spec: str) -> tuple[str, list[tuple[str, int]]]:
    """Take the trailing `+corruption@severity` parts off a spec; a path may contain such parts itself.

    Args:
        spec: see `load_task`.
    Returns:
        The rest, and (name, severity) of every corruption in order.
    Raises:
        ValueError: a corruption is unknown, written in another way, or has a severity outside 1 to 5.
    """
    base, suffix = _SPEC.fullmatch(spec).groups()
    kind, _, path = base.partition(":")
    pieces = re.findall(r"\+[^+]+", suffix)
    if kind in ("folder", "vtab"):
        kept = _in_path(path, pieces)
        base, pieces = base + "".join(pieces[:kept]), pieces[kept:]
    elif "+" in base and kind not in _LISTED:
        raise ValueError(f"cannot read {spec!r}: a corruption is written '+name@severity', as in 'digits+contrast@3'")
    return base, parse_corruptions("".join(pieces))


def _in_path(path: str, pieces: Sequence[str]) -> int:
    """How many of the pieces `+name@severity` belong to the path: as many as give a folder that is there.

    If there is none, those belong to it that have something after them that is no corruption, so that the folder
    that is missing can be named.
    """
    for kept in range(len(pieces), -1, -1):
        if expanded(path + "".join(pieces[:kept])).is_dir():
            return kept
    unknown = [
        number for number, piece in enumerate(pieces, start=1) if piece[1:].split("@")[0] not in corruption_names()
    ]
    return max(unknown, default=0)


def list_images(
    base: str, train_size: int, test_size: int, seed: int, data_dir: str | Path | None, download: bool
) -> Listing:
    """Find the images of a task without decoding them.

    Args:
        base: a spec without corruptions.
        train_size, test_size, seed: of generated tasks; others are listed whole.
        data_dir, download: as of `load_task`.
    """
    kind, _, path = base.partition(":")
    if kind in _LISTED and path:
        return _LISTED[kind](expanded(path))
    if base in DIGITS:
        return digits()
    if base in GENERATED:
        return generated(base, train_size, test_size, seed)
    if base in PUBLISHED or base in VTAB:
        root = data_dir or os.environ.get("SUBTUNING_LAB_DATA") or Path("~/.cache/subtuning_lab")
        return (vtab_sized if base in VTAB else published)(base, expanded(root), download, ADVICE)
    raise ValueError(f"unknown task {base!r}; allowed are {', '.join(task_names())}")


def _load_splits(listing: Listing, size: tuple[int, int], limit: int, progress: str | None) -> list[Split]:
    """Decode train and test, while the memory limit (bytes, for both together) allows."""
    splits = []
    for label, part in (("train", listing.train), ("test", listing.test)):
        images = load_images(part.items, size, limit, progress and f"{progress} {label}")
        limit -= images.numel() if isinstance(images, torch.Tensor) else 0
        splits.append(Split(images, torch.from_numpy(part.labels)))
    return splits
