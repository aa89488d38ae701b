"""Listings of folders: images in class folders, the lists of VTAB-1k, the arrays of CIFAR-10-C.

`folder:DIR` takes the class folders of DIR itself, or of its training and held-out parts: folders named train, test
and val, or alike ("Train", "training_set", "valid"); test is preferred to val, and without either 20 % are held out.
Images anywhere in a class folder count. Hidden and system folders don't, nor do links back to a folder above.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from subtuning_lab.data.arrays import MOST_CLASSES
from subtuning_lab.data.corruptions.registry import SEVERITIES
from subtuning_lab.data.decode import image_suffixes
from subtuning_lab.data.images import NpyRows
from subtuning_lab.data.splits import Listing, Part, seeded_split
from subtuning_lab.utils.text import printable
from subtuning_lab.utils.validation import shown

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Folders that systems keep beside one's own, in lower case; hidden ones begin with a dot.
_SYSTEM = re.compile(
    r"[.].*|__macosx|_gsdata_|lost\+found|found\.\d+|system volume information|temporary items|network trash folder"
    r"|@eadir|@__thumb|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|\$recycle\.bin|__pycache__|thumbs\.db"
    r"|desktop\.ini"
)
_INSIDE = re.compile(r"[@#$~].*|_*thumb(nail)?s?_*")  # further ones in a class; a class may be called "#" or "thumbs"
_PARTS = {"train": "train|training|trainval", "test": "test|testing|eval|evaluation", "val": "val|valid|validation|dev"}
_LARGEST_LIST = 2**26  # bytes of a list of images


def folder(root: Path) -> Listing:
    """List the images of class folders, in `root` itself or in its training and held-out parts.

    Raises:
        FileNotFoundError: no such folder, or no class folders in it.
        ValueError: a class without images, fewer than two classes, a test class that train lacks, or folders that are
            parts and classes at once.
    Warns:
        UserWarning: files and folders that are left out.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder not found: {_shown(root)}")
    parts = _parts(root)
    base = parts.get("train", root)
    classes = _class_folders(base)
    train, names = _list_classes(base, classes), tuple(classes)
    source = _published(names, base)
    held = _held_out(root, parts)
    if held is None:
        return Listing(names, *seeded_split(train.items, train.labels, names), source=source)
    tested = _class_folders(held)
    if unknown := sorted(set(tested) - set(names)):
        raise ValueError(f"{_shown(held)} has classes that {_shown(base)} lacks: {unknown}")
    return Listing(
        names, train, _list_classes(held, {name: tested.get(name, held / name) for name in names}), source=source
    )


def part_of(name: str) -> str | None:
    """The part of a data set that a folder's name says: "train", "test", "val", or None."""
    return _part_word(re.sub(r"[^a-z]", "", name.lower()))


def _part_within(name: str) -> str | None:
    """The part that the last or first of several words says, as in "seg_train" and "train-images-2"."""
    words = re.findall("[a-z]+", name.lower()) or [""]
    return _part_word(words[-1]) or _part_word(words[0])


def _part_word(word: str) -> str | None:
    word = re.sub(r"(set|data|images|split)*$", "", word)
    return next((part for part, names in _PARTS.items() if re.fullmatch(names, word)), None)


def _parts(root: Path) -> dict[str, Path]:
    """The folders in `root` that are parts of the data set; none where its folders are classes.

    A class may be called "train": then it has images itself, and there are classes beside it, but no held-out part.
    """
    folders = _folders(root)
    parts: dict[str, Path] = {}
    for entry in folders:
        if part := part_of(entry.name):
            if part in parts:
                raise ValueError(f"{_shown(root)} has two {part} parts: {parts[part].name!r} and {entry.name!r}")
            parts[part] = entry
    others = [entry.name for entry in folders if part_of(entry.name) is None and any(_pictures(entry))]
    if not parts and (parts := _parts_by_words(folders)):
        named = {part: entry.name for part, entry in parts.items()}
        warnings.warn(f"{_shown(root)}: {named} are taken for the parts of the data set, not for classes", stacklevel=6)
        return parts
    if "train" not in parts:
        if parts and not others:
            raise ValueError(f"{_shown(root)} has {[entry.name for entry in parts.values()]}, but no training part")
        _check_classes(root, folders)
        return {}
    if others and len(parts) == 1:
        if _holds_pictures(parts["train"]):
            return {}
        raise ValueError(
            f"{_shown(parts['train'])} may be the training part or a class beside {others[0]!r}: name the folder that "
            f"has the classes, e.g. folder:{_shown(parts['train'])}"
        )
    if others:
        warnings.warn(f"{_shown(root)}: folders beside its parts are left out: {others}", stacklevel=6)
    return parts


def _parts_by_words(folders: list[Path]) -> dict[str, Path]:
    """Parts that a word of each folder's name says; none unless that holds of all, and none has images itself."""
    parts = {_part_within(entry.name): entry for entry in folders}
    whole = len(parts) == len(folders) > 1 and "train" in parts and None not in parts
    return parts if whole and not any(_holds_pictures(entry) for entry in folders) else {}


def _holds_pictures(folder: Path) -> bool:
    """Whether there are images in a folder itself."""
    return any(entry.suffix.lower() in image_suffixes() for entry in folder.iterdir() if _counts(entry.name))


def _check_classes(root: Path, folders: list[Path]) -> None:
    """Raises ValueError for classes that hold parts; warns where classes may be parts under names of their own."""
    inside = [{entry.name for entry in _folders(entry)} for entry in folders]
    common = sorted(set.intersection(*inside)) if inside else []
    if len(folders) < 2 or len(common) < 2 or any(map(_holds_pictures, folders)):
        return
    names = [entry.name for entry in folders]
    if any(map(part_of, common)):
        raise ValueError(
            f"each class of {_shown(root)}, {shown(names)}, holds the parts {shown(common)}: put parts above classes, "
            f"{_shown(root)}/{common[0]}/{names[0]}"
        )
    warnings.warn(
        f"{_shown(root)}: {shown(names)} are taken for classes, and each holds {shown(common)}; if these are the "
        f"classes, load folder:{_shown(folders[0])}",
        stacklevel=7,
    )


def _held_out(root: Path, parts: dict[str, Path]) -> Path | None:
    """The test part, else the validation part; one without class folders has no labels."""
    candidates = [parts[part] for part in ("test", "val") if part in parts]
    labelled = [part for part in candidates if _folders(part)]
    if candidates and not labelled:
        raise FileNotFoundError(
            f"no class folders in {_shown(candidates[0])}: without labels it can't be the test part; to hold out some "
            f"training images instead, load folder:{_shown(parts['train'])}"
        )
    for part in candidates:
        if part not in labelled[:1]:
            warnings.warn(f"{_shown(part)} is left out: {_shown(labelled[0])} is the test part", stacklevel=6)
    return labelled[0] if labelled else None


def _folders(root: Path) -> list[Path]:
    """The folders in `root`, sorted by name, without hidden and system ones and links to folders above."""
    above = _above(root)
    return sorted(
        entry for entry in root.iterdir() if _counts(entry.name) and entry.is_dir() and _identity(entry) not in above
    )


def _class_folders(root: Path) -> dict[str, Path]:
    """The class folders in `root`, sorted, by name in Unicode's composed form: systems write accents in two ways."""
    folders = _folders(root)
    names = {unicodedata.normalize("NFC", printable(entry.name)): entry for entry in folders}
    if not names:
        raise FileNotFoundError(f"no class folders in {_shown(root)}: expected {_shown(root)}/<class>/<image files>")
    if len(names) < len(folders):
        twice = next(entry.name for entry in folders if entry not in names.values())
        raise ValueError(f"{_shown(root)} has two folders {twice!r}, whose names only Unicode's forms tell apart")
    if len(names) < 2:
        ((name, place),) = names.items()
        inside = f"; if its folders are the classes, load folder:{_shown(place)}" if _folders(place) else ""
        raise ValueError(f"{_shown(root)} has the one class {name!r}; a task needs at least two{inside}")
    places = defaultdict(list)
    for entry in folders:
        places[_identity(entry)].append(entry.name)
    if same := next((several for several in places.values() if len(several) > 1), None):
        raise ValueError(f"classes {same} of {_shown(root)} are one folder")
    return names


def _list_classes(root: Path, classes: Mapping[str, Path]) -> Part:
    """All image files in the folders of classes in `root`, by class and path; warns of the number of other files."""
    files: list[Path] = []
    labels: list[int] = []
    suffixes, left_out = image_suffixes(), Counter()
    elsewhere = _above(root) | {_identity(place) for place in classes.values() if place.is_dir()}
    for label, (name, place) in enumerate(classes.items()):
        everything = sorted(_walk(place, set(elsewhere))) if place.is_dir() else []
        images = [file for file in everything if file.suffix.lower() in suffixes]
        left_out.update(
            file.suffix.lower() or "no suffix" for file in everything if file.suffix.lower() not in suffixes
        )
        if not images:
            others = f", but {sum(left_out.values())} files of other kinds" if everything else ""
            raise ValueError(f"class {name!r} has no images in {_shown(place)}{others}; allowed: {sorted(suffixes)}")
        files += images
        labels += [label] * len(images)
        _warn_of_copies(place, images)
    left_out.update({"beside the classes": sum(_counts(entry.name) and entry.is_file() for entry in root.iterdir())})
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    if named := ", ".join(f"{count} {printable(suffix)}" for suffix, count in ordered if count):
        warnings.warn(f"{_shown(root)}: files that are no images here are left out: {named}", stacklevel=6)
    return Part(files, np.array(labels, dtype=np.int64))


def _warn_of_copies(folder: Path, images: list[Path]) -> None:
    """Warns of images below others of their name, such as previews: a copy of a test image may be trained on."""
    known = set(images)
    below = [file for file in images if file.parent != folder]
    copies = [file for file in below if any(above / file.name in known for above in file.parents[1:])]
    if copies:
        warnings.warn(
            f"{_shown(folder)}: {len(copies)} images named as one in a folder above, e.g. {_shown(copies[0])}; "
            "if they are copies, test images will be training images, too",
            stacklevel=7,
        )


def _walk(root: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files anywhere under `root`; folders in `seen` and those met before are not entered again."""
    waiting = [root]
    seen.add(_identity(root))
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if not _counts(entry.name) or (entry.is_dir() and _INSIDE.fullmatch(entry.name.lower())):
                    continue
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    if (place := _identity(entry.path)) not in seen:
                        seen.add(place)
                        waiting.append(Path(entry.path))
                elif os.path.isfile(entry.path) or not os.path.exists(entry.path):  # a link to nothing is named later
                    yield Path(entry.path)


def _pictures(root: Path) -> Iterator[Path]:
    """Image files anywhere under `root`."""
    suffixes = image_suffixes()
    return (file for file in _walk(root, _above(root)) if file.suffix.lower() in suffixes)


def _above(root: Path) -> set[tuple[int, int]]:
    """`root` and the folders that it is in."""
    resolved = root.resolve()
    return {_identity(place) for place in (resolved, *resolved.parents)}


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _counts(name: str) -> bool:
    """Whether a file or folder is neither hidden nor a system's own."""
    return _SYSTEM.fullmatch(name.lower().strip()) is None


def _published(classes: Sequence[str], base: Path) -> str | None:
    """The published images that class folders hold, as far as their names say; see `Task.source`."""
    names = {name.lower() for name in classes}
    if names == set(CIFAR10_CLASSES):
        data = "cifar10"
    elif all(re.fullmatch(r"n\d{8}", name) for name in names):  # WordNet's numbers
        data = "imagenet"
    else:
        return None
    part = part_of(base.resolve().name)
    return f"{data}/{part}" if part else data


def _shown(path: Path) -> str:
    return printable(str(path))


def vtab(root: Path) -> Listing:
    """List the 1,000 training images, 200 of them for validation, and the test images of a VTAB-1k folder.

    The 200 are found among the 1,000 by their paths, else by their bytes, else by their labels: the usual generator
    writes every list's images to a folder of its own. Classes may lack training images.

    Args:
        root: folder with train800val200.txt, val200.txt and test.txt, whose lines are `path label`.
    Raises:
        FileNotFoundError: the folder, one of the lists, or a validation image is missing.
        ValueError: a bad line or an image's second one (file and number named), a validation image that is not among
            the training images or has another label there, or a test image that is.
    """
    train, validation, test = (_read_list(root, f"{name}.txt") for name in ("train800val200", "val200", "test"))
    tested = set(map(os.path.normpath, test.items))
    for name, part in (("train800val200.txt", train), ("val200.txt", validation)):
        if both := [file for file in part.items if os.path.normpath(file) in tested]:
            raise ValueError(f"{_shown(root / name)} lists {_shown(both[0])}, which is a test image: see test.txt")
    if len(validation.labels) >= len(train.labels):
        raise ValueError(f"{_shown(root / 'val200.txt')} leaves no image of train800val200.txt to train on")
    n_classes = 1 + max(int(part.labels.max()) for part in (train, validation, test))
    return Listing(tuple(map(str, range(n_classes))), train, test, _validation_rows(root, train, validation))


def _read_list(root: Path, name: str) -> Part:
    """Read one VTAB list: `path label` per line, paths relative to `root`."""
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{_shown(path)} not found; vtab:DIR needs train800val200.txt, val200.txt and test.txt")
    if path.stat().st_size > _LARGEST_LIST:
        raise ValueError(f"{_shown(path)} has {path.stat().st_size:,} bytes; a list has at most {_LARGEST_LIST:,}")
    files: list[Path] = []
    labels: list[int] = []
    places: dict[str, int] = {}
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names need not be UTF-8
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        file, label = (line.rsplit(maxsplit=1) + [""])[:2]
        if "\0" in line or not (label.isascii() and label.isdecimal()):
            raise ValueError(
                f"{_shown(path)}, line {number}: expected 'path label' with a label >= 0, got {shown(line)}"
            )
        if len(label) > 9 or int(label) >= MOST_CLASSES:
            raise ValueError(f"{_shown(path)}, line {number}: label {label:.20} is not below {MOST_CLASSES}")
        file = root / file.strip()
        if place := places.get(os.path.normpath(file)):
            raise ValueError(f"{_shown(path)}, line {number}: {_shown(file)} is in line {place} already")
        places[os.path.normpath(file)] = number
        files.append(file)
        labels.append(int(label))
    if not files:
        raise ValueError(f"{_shown(path)} lists no images")
    return Part(files, np.array(labels, dtype=np.int64))


def _validation_rows(root: Path, train: Part, validation: Part) -> np.ndarray:
    """Which training images the validation images are; int64, all different. Raises as `vtab`."""
    by_path = _matched(list(map(os.path.normpath, train.items)), list(map(os.path.normpath, validation.items)))
    if None not in by_path:
        rows = np.array(by_path, dtype=np.int64)
        if (other := train.labels[rows] != validation.labels).any():
            file = _shown(validation.items[int(other.argmax())])
            raise ValueError(f"{_shown(root / 'val200.txt')} gives {file} another label than train800val200.txt does")
        return rows
    by_content = _matched(_keys(train), _keys(validation))
    if None not in by_content:
        return np.array(by_content, dtype=np.int64)
    n = len(validation.labels)
    if set(by_path) == set(by_content) == {None} and np.array_equal(train.labels[-n:], validation.labels):
        warnings.warn(
            f"{_shown(root)}: val200.txt lists other files; taken for the last {n} training images", stacklevel=6
        )
        return np.arange(len(train.labels) - n, len(train.labels))
    missing = validation.items[by_content.index(None)]
    raise ValueError(f"{_shown(root / 'val200.txt')} lists {_shown(missing)}, which train800val200.txt lacks")


def _keys(part: Part) -> list[tuple[bytes, int]]:
    """What an image has in common with a copy of it: its bytes and its label."""
    keys = []
    for file, label in zip(part.items, part.labels.tolist(), strict=True):
        if not file.is_file():
            raise FileNotFoundError(f"image file not found: {_shown(file)}")
        keys.append((hashlib.sha256(file.read_bytes()).digest(), label))
    return keys


def _matched(keys: Sequence[object], wanted: Sequence[object]) -> list[int | None]:
    """For each wanted key the index of one that equals it, none twice; None where there is none left."""
    places: defaultdict[object, list[int]] = defaultdict(list)
    for index, key in reversed(list(enumerate(keys))):
        places[key].append(index)
    return [places[key].pop() if places[key] else None for key in wanted]


def cifar10c(path: Path) -> Listing:
    """List one corruption of CIFAR-10-C at one severity; no image is read.

    The published files hold CIFAR-10's test images five times over, at severity 1, 2, ... 5. All have the same order,
    so that every corruption gets the same 80/20 split: no image is trained on under one and tested under another.

    Args:
        path: `root/NAME@SEVERITY`, for root/NAME.npy, uint8 (5 n, 32, 32, 3), and root/labels.npy, (5 n,).
    Raises:
        FileNotFoundError: the folder or one of the files is missing.
        ValueError: a severity outside 1 to 5, a file of another shape or type, or a label outside 0 to 9.
    Source: Hendrycks and Dietterich (ICLR 2019), the published data.
    """
    root, (name, _, severity) = path.parent, path.name.rpartition("@")
    if not name or severity not in map(str, SEVERITIES):
        raise ValueError(
            f"cannot read 'cifar10c:{path}': write cifar10c:DIR/NAME@SEVERITY with a severity from 1 to 5, "
            "as in 'cifar10c:CIFAR-10-C/gaussian_noise@5'"
        )
    images, labels = _read_array(root, name), _read_array(root, "labels")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images) or len(images) % len(SEVERITIES):
        raise ValueError(f"{root / name}.npy must be uint8 (5 n, 32, 32, 3), got {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"{root}/labels.npy must be ints ({len(images)},), got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise ValueError(f"{root}/labels.npy must have labels from 0 to 9, got {labels.min()} to {labels.max()}")
    n = len(images) // len(SEVERITIES)
    rows = np.arange(n) + n * (int(severity) - 1)
    items = NpyRows(root / f"{name}.npy", rows)
    parts = seeded_split(items, labels[rows].astype(np.int64), CIFAR10_CLASSES)
    return Listing(CIFAR10_CLASSES, *parts, source="cifar10/test")


def _read_array(root: Path, name: str) -> np.ndarray:
    """Map `root/name.npy` into memory."""
    if not root.is_dir():
        raise FileNotFoundError(f"folder not found: {root}")
    file = root / f"{name}.npy"
    if not file.is_file():
        names = sorted(path.stem for path in root.glob("*.npy"))
        raise FileNotFoundError(f"{file} not found; the .npy files of {root} are {names}")
    try:
        array = np.load(file, mmap_mode="r")
    except Exception as error:  # what damaged headers raise is of many kinds
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file} is an archive of arrays; it must be one array")
    return array
