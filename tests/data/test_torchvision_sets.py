"""Published data sets, in torchvision's layouts, whole and in VTAB-1k's sizes."""

import inspect
import json
import pickle
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torchvision.datasets

from subtuning_lab.data.torchvision_sets import PUBLISHED, VTAB, vtab_sized
from tests.data.material import load, noise, write_folder, write_image


def write_dtd(root: Path) -> None:
    for part, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        names = [f"{name}/{name}_{number}.png" for name in ("banded", "woven") for number in numbers]
        for name in names:
            write_image(root / "dtd/dtd/images" / name, seed=len(name))
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names))


def write_food(root: Path) -> None:
    (root / "food-101/meta").mkdir(parents=True)
    for part, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        names = {name: [f"{name}/{number}" for number in numbers] for name in ("pho", "ramen")}
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(names))
        for name in sum(names.values(), []):
            write_image(root / f"food-101/images/{name}.jpg")


def write_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, numbers in (("trainval", (1, 2, 3)), ("test", (4,))):
        rows = [(f"{name}_{number}", label) for label, name in ((1, "Bombay"), (2, "pug")) for number in numbers]
        (base / f"annotations/{part}.txt").write_text("\n".join(f"{name} {label} 1 1" for name, label in rows))
        for name, _ in rows:
            write_image(base / f"images/{name}.jpg")


def write_aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    data.mkdir(parents=True)
    (data / "variants.txt").write_text("707-320\nDH-82\n")
    for part, numbers in (("trainval", (1, 2, 3)), ("test", (4,))):
        rows = [f"{label}{number} {name}" for label, name in enumerate(("707-320", "DH-82")) for number in numbers]
        (data / f"images_variant_{part}.txt").write_text("\n".join(rows))
        for row in rows:
            write_image(data / f"images/{row.split()[0]}.jpg")


def write_cars(root: Path) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["Audi", "BMW"], dtype=object)
    scipy.io.savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    for part, path, count in (
        ("train", "devkit/cars_train_annos.mat", 6),
        ("test", "cars_test_annos_withlabels.mat", 2),
    ):
        rows = [(f"{number}.jpg", number % 2 + 1) for number in range(count)]
        annotations = np.array(rows, dtype=[("fname", object), ("class", "i4")])
        scipy.io.savemat(base / path, {"annotations": annotations})
        for name, _ in rows:
            write_image(base / f"cars_{part}/{name}")


def write_signs(root: Path) -> None:
    base = root / "gtsrb/GTSRB"
    for label in range(43):
        for number in range(3):
            write_image(base / f"Training/{label:05d}/{number:05d}.ppm")
    rows = [f"{label:05d}.ppm;8;8;0;0;8;8;{label}" for label in (0, 42)]
    for row in rows:
        write_image(base / "Final_Test/Images" / row.split(";")[0])
    (root / "gtsrb/GT-final_test.csv").write_text(
        "\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows])
    )


def write_caltech(root: Path) -> None:
    for name in ("BACKGROUND_Google", "ant", "anchor"):
        for number in range(1, 6):
            write_image(root / f"caltech101/101_ObjectCategories/{name}/image_{number:04d}.jpg")


def write_eurosat(root: Path) -> None:
    write_folder(root / "eurosat/2750", {"Forest": 5, "River": 5})


def write_cifar10(root: Path) -> None:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        data = noise(10, seed=number, side=32).reshape(10, -1).numpy()
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": list(range(10))}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {label}" for label in range(10)]}))


def write_cifar100(root: Path) -> None:
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    for name in ("train", "test"):
        data = noise(100, seed=len(name), side=32).reshape(100, -1).numpy()
        (base / name).write_bytes(pickle.dumps({"data": data, "fine_labels": list(range(100))}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {label}" for label in range(100)]}))


def write_svhn(root: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        pixels = noise(20, seed=seed, side=32).permute(2, 3, 1, 0).numpy()
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": np.arange(20)[:, None] % 10 + 1})


def write_stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    for part in ("train", "test"):
        (base / f"{part}_X.bin").write_bytes(noise(20, side=96).numpy().tobytes())
        (base / f"{part}_y.bin").write_bytes((np.arange(20) % 10 + 1).astype(np.uint8).tobytes())
    (base / "class_names.txt").write_text("\n".join(f"thing {label}" for label in range(10)))


def write_flowers(root: Path) -> None:
    base = root / "flowers-102"
    base.mkdir(parents=True)
    ids = np.arange(1, 3 * 102 + 1)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    scipy.io.savemat(base / "setid.mat", {"trnid": ids[:102], "valid": ids[102:204], "tstid": ids[204:]})
    for number in ids:
        write_image(base / f"jpg/image_{number:05d}.jpg")


# name -> (writer, training images, test images, first class); the md5 sums of real files are not those of tiny ones
LAYOUTS = {
    "dtd": (write_dtd, 6, 2, "banded"),
    "food101": (write_food, 6, 2, "pho"),
    "oxford_pets": (write_pets, 6, 2, "Bombay"),
    "fgvc_aircraft": (write_aircraft, 6, 2, "707-320"),
    "stanford_cars": (write_cars, 6, 2, "Audi"),
    "gtsrb": (write_signs, 129, 2, "0"),
    "caltech101": (write_caltech, 8, 2, "anchor"),
    "eurosat": (write_eurosat, 8, 2, "Forest"),
    "cifar10": (write_cifar10, 50, 10, "thing 0"),
    "cifar100": (write_cifar100, 100, 100, "thing 0"),
    "svhn": (write_svhn, 20, 20, "0"),
    "stl10": (write_stl10, 20, 20, "thing 0"),
    "flowers102": (write_flowers, 204, 102, "pink primrose"),
}
CHECKED = {"cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "stl10": "stl10", "flowers102": "flowers102"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_data_sets_are_read_from_torchvisions_layout(tmp_path, monkeypatch, name):
    writer, n_train, n_test, first = LAYOUTS[name]
    writer(tmp_path)
    if name in CHECKED:
        monkeypatch.setattr(f"torchvision.datasets.{CHECKED[name]}.check_integrity", lambda *args: True)
    task = load(name, data_dir=tmp_path, download=False)
    assert (len(task.train), len(task.test), task.classes[0]) == (n_train, n_test, first)
    entry = PUBLISHED[name]
    dataset = getattr(torchvision.datasets, entry.dataset)(str(tmp_path), **entry.train[0])
    if entry.test is not None and task.image_size != (224, 224) and len(entry.train) == 1:
        for index in (0, len(dataset) - 1):
            image, label = dataset[index]
            assert np.array_equal(task.train.images[index].permute(1, 2, 0).numpy(), np.asarray(image))
            assert int(task.train.labels[index]) == label


def test_all_published_data_sets_have_a_layout_test_and_a_class_in_torchvision():
    assert set(LAYOUTS) == set(PUBLISHED)
    for entry in PUBLISHED.values():
        signature = inspect.signature(getattr(torchvision.datasets, entry.dataset))
        for part in (*entry.train, entry.test or {}):
            signature.bind(root="x", download=False, **part)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_without_a_connection_the_error_names_what_works(tmp_path, monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    error = ConnectionError if PUBLISHED[name].downloadable else FileNotFoundError
    with pytest.raises(error, match=rf"{name}.*'digits', 'source'.*'folder:DIR'"):
        load(name, data_dir=tmp_path / "new")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_without_download_a_missing_data_set_is_not_found(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("tried to download"))
    with pytest.raises(FileNotFoundError, match=rf"{name} not found under .*new.*'folder:DIR'"):
        load(name, data_dir=tmp_path / "new", download=False)


def test_the_data_folder_comes_from_the_environment(tmp_path, monkeypatch):
    write_dtd(tmp_path)
    monkeypatch.setenv("SUBTUNING_LAB_DATA", str(tmp_path))
    assert len(load("dtd").train) == 6


def write_large_cifar100(root: Path) -> None:
    """1,500 training images, whose first two pixels tell their number, and 100 test images."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    for name, count in (("train", 1500), ("test", 100)):
        data, numbers = np.zeros((count, 3 * 32 * 32), dtype=np.uint8), np.arange(count)
        data[:, 0], data[:, 1], data[:, 2] = numbers // 256, numbers % 256, name == "test"
        (base / name).write_bytes(pickle.dumps({"data": data, "fine_labels": (numbers % 100).tolist()}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {label}" for label in range(100)]}))


def link_images(folder: Path, names: list[str]) -> None:
    """Files that all have the same content, quickly."""
    image = write_image(folder / names[0])
    for name in names[1:]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(image)


def write_large_flowers(root: Path) -> None:
    """10 training, 5 validation and 1 test image of each of 102 flowers."""
    base = root / "flowers-102"
    base.mkdir(parents=True)
    ids, cuts = np.arange(1, 16 * 102 + 1), (10 * 102, 15 * 102)
    train, validation, test = np.split(ids, cuts)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": (ids - 1) % 102 + 1})
    scipy.io.savemat(base / "setid.mat", {"trnid": train, "valid": validation, "tstid": test})
    link_images(base / "jpg", [f"image_{number:05d}.jpg" for number in ids])


def write_large_caltech(root: Path, per_class: int = 32) -> None:
    """101 objects and the background, which has another file in its folder, as in the real archive."""
    base = root / "caltech101/101_ObjectCategories"
    names = [f"object {label:03d}" for label in range(101)] + ["BACKGROUND_Google"]
    link_images(base, [f"{name}/image_{number:04d}.jpg" for name in names for number in range(1, per_class + 1)])
    (base / "BACKGROUND_Google" / "tmp").write_text("no image")


VTAB_SIZED = {
    "vtab-cifar100": (write_large_cifar100, 100, 100),
    "vtab-flowers102": (write_large_flowers, 102, 102),
    "vtab-caltech101": (write_large_caltech, 102, 2 * 102),
}


def vtab_listing(root: Path, monkeypatch, name: str, writer=None):
    (writer or VTAB_SIZED[name][0])(root)
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *args: True)
    return vtab_sized(name, root, download=False)


def identities(part) -> list:
    """What tells an image from all others: its file, or its first pixels."""
    return [tuple(item[0, :3, 0]) if isinstance(item, np.ndarray) else item for item in part.items]


def test_every_vtab_sized_task_has_a_test():
    assert set(VTAB_SIZED) == set(VTAB)


@pytest.mark.parametrize("name", VTAB_SIZED)
def test_vtab_sized_tasks_have_800_200_and_the_test_images(tmp_path, monkeypatch, name):
    _, n_classes, n_test = VTAB_SIZED[name]
    listing = vtab_listing(tmp_path, monkeypatch, name)
    assert len(listing.classes) == len(set(listing.classes)) == n_classes
    assert (len(listing.train.items), len(listing.test.items)) == (1000, n_test)
    assert listing.validation.tolist() == list(range(800, 1000))
    for labels, size in ((listing.train.labels[:800], 800), (listing.train.labels[800:], 200)):
        counts = np.bincount(labels, minlength=n_classes)
        assert len(labels) == size and counts.min() == size // n_classes and counts.max() <= counts.min() + 1
    assert set(listing.test.labels) == set(range(n_classes))
    train, test = identities(listing.train), identities(listing.test)
    assert len(set(train)) == 1000 and len(set(test)) == n_test and not set(train) & set(test)
    again = vtab_sized(name, tmp_path, download=False)
    assert identities(again.train) == train and identities(again.test) == test


def test_cifars_test_images_are_the_published_ones(tmp_path, monkeypatch):
    listing = vtab_listing(tmp_path, monkeypatch, "vtab-cifar100")
    numbers = np.arange(100)
    assert np.array_equal(listing.test.items[:, 0, 1, 0], numbers) and (listing.test.items[:, 0, 2, 0] == 1).all()
    assert np.array_equal(listing.test.labels, numbers)
    train = listing.train.items[:, 0, :, 0].astype(int)
    assert np.array_equal((256 * train[:, 0] + train[:, 1]) % 100, listing.train.labels)


def test_flowers_training_and_validation_images_come_from_their_own_parts(tmp_path, monkeypatch):
    listing = vtab_listing(tmp_path, monkeypatch, "vtab-flowers102")
    numbers = np.array([int(file.stem.removeprefix("image_")) for file in listing.train.items])
    assert numbers[:800].max() <= 1020 < numbers[800:].min() and numbers.max() <= 1530
    assert np.array_equal((numbers - 1) % 102, listing.train.labels)


def test_caltechs_labels_are_those_of_its_folders_background_included(tmp_path, monkeypatch):
    listing = vtab_listing(tmp_path, monkeypatch, "vtab-caltech101")
    assert listing.classes[-1] == "BACKGROUND_Google"
    for part in (listing.train, listing.test):
        assert [file.parent.name for file in part.items] == [listing.classes[label] for label in part.labels]
    # 30 of 32 are for training: 2 of each class are left for testing, whichever are among the 1,000
    assert set(Counter(listing.test.labels.tolist()).values()) == {2}


def test_a_vtab_sized_task_is_loaded_with_its_validation_part(tmp_path, monkeypatch):
    vtab_listing(tmp_path, monkeypatch, "vtab-cifar100")
    task = load("vtab-cifar100", data_dir=tmp_path, download=False)
    ((train, held),) = task.folds(1)
    assert (len(train), held.tolist(), len(task.test)) == (800, list(range(800, 1000)), 100)
    assert load("vtab-cifar100+contrast@2", data_dir=tmp_path, download=False).image_size == (32, 32)
    assert load("vtab-cifar100", data_dir=tmp_path, seed=3).fingerprint == task.fingerprint


def test_too_few_images_for_a_vtab_sized_task_are_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="class 'object 000' has 30 images; a split needs more than 30"):
        vtab_listing(tmp_path, monkeypatch, "vtab-caltech101", lambda root: write_large_caltech(root, 30))
    with pytest.raises(ValueError, match=r"number of training images must be 100 .* to 100 .*got 800"):
        vtab_listing(tmp_path, monkeypatch, "vtab-cifar100", write_cifar100)
    with pytest.raises(FileNotFoundError, match="flowers102 not found under .*new.*'folder:DIR'"):
        load("vtab-flowers102", data_dir=tmp_path / "new", download=False)
