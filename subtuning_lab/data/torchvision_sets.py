"""Data sets that torchvision knows: how its objects name their parts, files, labels and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np

from subtuning_lab.data.images import Items
from subtuning_lab.data.splits import SPLIT_SEED, Listing, Part, seeded_split, stratified_choice


@dataclass(frozen=True)
class Published:
    """A data set of torchvision: its class there, the arguments that name its parts, and how to list one part.

    `test` None means that no split was published; then 20 % are held out by `seeded_split`.
    """

    description: str
    dataset: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any] | None
    read: Callable[[Any], tuple[Items, Sequence[int]]]
    classes: Callable[[Any], Sequence[str]] = lambda dataset: dataset.classes
    downloadable: bool = True


def _files(dataset: Any) -> tuple[Items, Sequence[int]]:
    return [Path(file) for file in dataset._image_files], dataset._labels


def _samples(dataset: Any) -> tuple[Items, Sequence[int]]:
    samples = dataset.samples if hasattr(dataset, "samples") else dataset._samples
    return [Path(file) for file, _ in samples], [int(label) for _, label in samples]


def _pets(dataset: Any) -> tuple[Items, Sequence[int]]:
    return [Path(file) for file in dataset._images], dataset._labels


def _caltech101(dataset: Any) -> tuple[Items, Sequence[int]]:
    root = Path(dataset.root, "101_ObjectCategories")
    names = zip(dataset.y, dataset.index, strict=True)
    return [root / dataset.categories[label] / f"image_{index:04d}.jpg" for label, index in names], dataset.y


def _channels_last(dataset: Any) -> tuple[Items, Sequence[int]]:
    return dataset.data, dataset.targets


def _channels_first(dataset: Any) -> tuple[Items, Sequence[int]]:
    return np.ascontiguousarray(dataset.data.transpose(0, 2, 3, 1)), dataset.labels


def _numbers(n: int) -> Callable[[Any], Sequence[str]]:
    return lambda dataset: [str(label) for label in range(n)]


def _parts(*names: str) -> tuple[dict[str, Any], ...]:
    return tuple({"split": name} for name in names)


_TRAIN, _TEST = _parts("train"), {"split": "test"}
PUBLISHED = {
    "cifar10": Published(
        "10 classes of small photographs, 50,000 + 10,000",
        "CIFAR10",
        ({"train": True},),
        {"train": False},
        _channels_last,
    ),
    "cifar100": Published(
        "100 classes of small photographs, 50,000 + 10,000",
        "CIFAR100",
        ({"train": True},),
        {"train": False},
        _channels_last,
    ),
    "svhn": Published("10 digits of house numbers", "SVHN", _TRAIN, _TEST, _channels_first, _numbers(10)),
    "stl10": Published("10 classes, 96 x 96, 5,000 + 8,000", "STL10", _TRAIN, _TEST, _channels_first),
    "flowers102": Published("102 flowers, train + val / test", "Flowers102", _parts("train", "val"), _TEST, _files),
    "dtd": Published("47 textures, first partition, train + val / test", "DTD", _parts("train", "val"), _TEST, _files),
    "food101": Published("101 dishes", "Food101", _TRAIN, _TEST, _files),
    "fgvc_aircraft": Published("100 aircraft, trainval / test", "FGVCAircraft", _parts("trainval"), _TEST, _files),
    "oxford_pets": Published("37 cats and dogs, trainval / test", "OxfordIIITPet", _parts("trainval"), _TEST, _pets),
    "stanford_cars": Published(
        "196 cars (no longer downloadable: put the files there)",
        "StanfordCars",
        _TRAIN,
        _TEST,
        _samples,
        downloadable=False,
    ),
    "gtsrb": Published("43 traffic signs", "GTSRB", _TRAIN, _TEST, _samples, _numbers(43)),
    "caltech101": Published(
        "101 objects, seeded 80/20 split", "Caltech101", ({},), None, _caltech101, lambda dataset: dataset.categories
    ),
    "eurosat": Published("10 land uses from satellite, seeded 80/20 split", "EuroSAT", ({},), None, _samples),
}
VTAB = {
    "vtab-cifar100": "VTAB-1k's sizes: 800 + 200 of CIFAR-100's training images, its test images",
    "vtab-flowers102": "VTAB-1k's sizes: 800 of train + 200 of val, all of test",
    "vtab-caltech101": "VTAB-1k's sizes: 800 + 200 of 30 images per class, the rest for testing; 102 classes",
}
_VTAB_TRAIN, _VTAB_VALIDATION, _CALTECH_PER_CLASS = 800, 200, 30
_BACKGROUND = "BACKGROUND_Google"  # a class in VTAB; torchvision leaves it out


def published(name: str, root: Path, download: bool, advice: str = "") -> Listing:
    """List a data set of torchvision, downloading it first where needed and allowed.

    Args:
        name: a key of `PUBLISHED`.
        root: folder that holds torchvision's data sets.
        download: whether to download what is missing.
        advice: what to try instead, for messages.
    Returns:
        A listing of files, or of arrays where the data set keeps those.
    Raises:
        ConnectionError: the download failed for lack of a connection.
        FileNotFoundError: the files are missing or incomplete and cannot or may not be downloaded.
    """
    entry = PUBLISHED[name]
    classes, parts, test = _listed(name, root, download, advice)
    train = _joined(parts)
    parts = seeded_split(train.items, train.labels, classes) if entry.test is None else (train, test)
    return Listing(classes, *parts, source=f"{name}/train")


def vtab_sized(name: str, root: Path, download: bool, advice: str = "") -> Listing:
    """List 800 training images, 200 for validation after them, and the test images, cut as VTAB-1k cuts a data set.

    VTAB takes the first 800 and 200 images of parts that its own loader has shuffled, and torchvision has not that
    order: so these are chosen here, stratified and always the same, each class at least once. Only VTAB-1k's own
    lists (`vtab:DIR`) hold the official images; their numbers and these are of different images.

    Args:
        name: a key of `VTAB`.
        root, download, advice: as for `published`.
    Raises:
        ValueError: too few images, or of one class.
    """
    name = name.removeprefix("vtab-")
    classes, parts, test = _listed(name, root, download, advice)
    if name == "caltech101":
        classes, whole = _with_background(classes, parts[0], root)
        pool, test = _caltech_parts(classes, whole)
        parts = [pool]
    chosen = stratified_choice(parts[0].labels, _VTAB_TRAIN, SPLIT_SEED, "the number of training images")
    rest = parts[1] if len(parts) > 1 else parts[0].take(np.setdiff1d(np.arange(len(parts[0].labels)), chosen))
    held = stratified_choice(rest.labels, _VTAB_VALIDATION, SPLIT_SEED, "the number of validation images")
    train = _joined([parts[0].take(chosen), rest.take(held)])
    validation = np.arange(_VTAB_TRAIN, _VTAB_TRAIN + _VTAB_VALIDATION)
    return Listing(classes, train, test, validation, source=f"{name}/train")


def _with_background(classes: tuple[str, ...], part: Part, root: Path) -> tuple[tuple[str, ...], Part]:
    """Caltech-101 with its 102nd class, which torchvision's object leaves out although it wants its folder."""
    files = sorted((root / "caltech101" / "101_ObjectCategories" / _BACKGROUND).glob("image_*.jpg"))
    labels = np.full(len(files), len(classes), dtype=np.int64)
    return (*classes, _BACKGROUND), _joined([part, Part(files, labels)])


def _caltech_parts(classes: Sequence[str], whole: Part) -> tuple[Part, Part]:
    """30 images of every class, chosen always in the same way, and the others for testing."""
    counts = np.bincount(whole.labels, minlength=len(classes))
    if counts.min() <= _CALTECH_PER_CLASS:
        few = classes[int(counts.argmin())]
        raise ValueError(f"class {few!r} has {counts.min()} images; a split needs more than {_CALTECH_PER_CLASS}")
    generator = np.random.default_rng(SPLIT_SEED)
    of_class = (np.flatnonzero(whole.labels == label) for label in range(len(classes)))
    chosen = np.sort(np.concatenate([generator.permutation(rows)[:_CALTECH_PER_CLASS] for rows in of_class]))
    return whole.take(chosen), whole.take(np.setdiff1d(np.arange(len(whole.labels)), chosen))


def _listed(name: str, root: Path, download: bool, advice: str) -> tuple[tuple[str, ...], list[Part], Part | None]:
    """Classes, published training parts, and the test part if there is one. Raises as `published`."""
    entry = PUBLISHED[name]
    sets = [_open(name, root, download, advice, part) for part in entry.train]
    test = None if entry.test is None else _part(entry, _open(name, root, download, advice, entry.test))
    return tuple(entry.classes(sets[0])), [_part(entry, dataset) for dataset in sets], test


def _part(entry: Published, dataset: Any) -> Part:
    items, labels = entry.read(dataset)
    return Part(items, np.asarray(labels, dtype=np.int64))


def _joined(parts: Sequence[Part]) -> Part:
    """Concatenate parts, of files or of arrays."""
    labels = np.concatenate([part.labels for part in parts])
    if isinstance(parts[0].items, np.ndarray):
        return Part(np.concatenate([part.items for part in parts]), labels)
    return Part([file for part in parts for file in part.items], labels)


def _open(name: str, root: Path, download: bool, advice: str, part: dict[str, Any]) -> Any:
    """The torchvision data set object for one part: from the disk, else after a download. Raises as `published`."""
    import torchvision.datasets

    entry = PUBLISHED[name]
    dataset = getattr(torchvision.datasets, entry.dataset)
    try:
        return dataset(root=str(root), download=False, **part)
    except (RuntimeError, FileNotFoundError) as error:
        if not (download and entry.downloadable):
            why = "download=False" if entry.downloadable else "it is no longer offered for download"
            raise FileNotFoundError(f"{name} not found under {root} ({why}): {error} {advice}") from error
    root.mkdir(parents=True, exist_ok=True)
    try:
        return dataset(root=str(root), download=True, **part)
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(f"cannot download {name}: {error}. {advice}") from error
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{name} is incomplete under {root} after its download: {error} {advice}") from error
