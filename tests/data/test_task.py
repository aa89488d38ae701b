"""Tasks: what is accepted and refused, honest folds and splits, and every way to name a task."""

import inspect
import json
import pickle
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.task import Split, Task, load_task, task_names
from subtuning_lab.data.torchvision_sets import PUBLISHED, VTAB, vtab_sized

OFFLINE = ("digits", "source", "glyphs", "count", "position")


def noise(n: int, seed: int = 0, side: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), dtype=np.uint8))


def make_task(labels=(0, 1, 2) * 6, **changes) -> Task:
    """18 images of three classes and 6 test images, unless changed."""
    arguments = {
        "images": noise(len(labels)),
        "labels": list(labels),
        "test_images": noise(6, seed=1),
        "test_labels": [0, 1, 2] * 2,
        "classes": ("ant", "bee", "cat"),
    }
    arguments |= changes
    return Task.from_arrays(arguments.pop("images"), arguments.pop("labels"), **arguments)


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


# ---------------------------------------------------------------- Task


def test_from_arrays_keeps_images_labels_and_names():
    task = make_task(name="insects")
    assert (task.name, task.classes, task.num_classes, task.image_size) == ("insects", ("ant", "bee", "cat"), 3, (8, 8))
    assert torch.equal(task.train.images, noise(18)) and torch.equal(task.test.images, noise(6, seed=1))
    assert task.train.labels.dtype == torch.int64 and task.train.labels.tolist() == [0, 1, 2] * 6
    assert len(task.train) == 18 and len(task.test) == 6 and task.validation is None


def test_classes_default_to_numbers():
    assert Task.from_arrays(noise(4), np.array([0, 1, 1, 0], dtype=np.uint8)).classes == ("0", "1")


WRONG = {
    "lengths": ({"images": noise(18), "labels": [0, 1, 2] * 5}, ValueError, "18 images but 15 labels"),
    "label range": ({"labels": [0, 1, 2] * 5 + [0, 1, 3]}, ValueError, r"train label 3 at index 17 is outside 0\.\.2"),
    "negative label": ({"labels": [-1, 1, 2] * 6}, ValueError, "train label -1 at index 0"),
    "test label range": ({"test_labels": [0, 1, 5] * 2}, ValueError, "test label 5 at index 2"),
    "float labels": ({"labels": [0.0, 1.0, 2.0] * 6}, TypeError, "labels must be integers"),
    "string labels": ({"labels": ["ant"] * 18}, TypeError, "labels must be integers"),
    "class without images": ({"labels": [0, 2] * 9}, ValueError, "class 'bee' has no training images"),
    "one class": ({"classes": ("ant",), "labels": [0] * 18}, ValueError, "at least two classes"),
    "NaN": ({"images": torch.full((18, 3, 8, 8), float("nan"))}, ValueError, r"images\[0\] has values that are NaN"),
    "bad test image": ({"test_images": torch.full((6, 3, 8, 8), 2.0)}, ValueError, r"test_images\[0\]"),
    "dtype": ({"images": np.zeros((18, 3, 8, 8), dtype=np.int32)}, TypeError, "int32"),
    "shape": ({"images": np.zeros((18, 5, 8, 8), dtype=np.uint8)}, ValueError, r"\(18, 5, 8, 8\)"),
    "sizes differ": ({"test_images": noise(6, side=9)}, ValueError, "differ in size"),
    "no test labels": ({"test_labels": None}, ValueError, "both"),
    "no test images": ({"test_images": None}, ValueError, "both"),
    "validation range": ({"validation": [0, 18]}, ValueError, r"0\.\.17"),
    "validation twice": ({"validation": [3, 3]}, ValueError, "distinct"),
    "validation is all": ({"validation": list(range(18))}, ValueError, "1 to 17"),
    "validation empty": ({"validation": np.zeros(0, dtype=int)}, ValueError, "1 to 17"),
    "validation floats": ({"validation": [0.5]}, TypeError, "validation must be integers"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_from_arrays_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        make_task(**changes)


@pytest.mark.parametrize("images", [noise(2).float(), noise(2)[0], noise(2)[:, :2]])
def test_a_split_refuses_what_is_not_uint8_rgb(images):
    with pytest.raises(ValueError, match="uint8"):
        Split(images, torch.zeros(len(images), dtype=torch.int64))


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        Split(noise(0), torch.zeros(0, dtype=torch.int64))


def test_the_fingerprint_follows_content_not_name():
    pixel = noise(18)
    pixel[17, 2, 7, 7] ^= 1
    swapped = [1, 0, 2] + [0, 1, 2] * 5
    test_pixel = noise(6, seed=1)
    test_pixel[0, 0, 0, 0] ^= 1
    others = [
        make_task(images=pixel),
        make_task(labels=swapped),
        make_task(classes=("ant", "bee", "dog")),
        make_task(test_images=test_pixel),
        make_task(test_labels=[2, 1, 0] * 2),
        make_task(test_images=None, test_labels=None),
        make_task(validation=[0, 1, 2]),
        make_task(validation=[0, 1, 3]),
        make_task().subset(9),
    ]
    base = make_task().fingerprint
    assert len({base, *(task.fingerprint for task in others)}) == len(others) + 1
    assert make_task(name="other").fingerprint == base
    assert make_task(images=noise(18).double() / 255).fingerprint == base
    assert pickle.loads(pickle.dumps(make_task())).fingerprint == base


# ---------------------------------------------------------------- folds and subsets


@st.composite
def label_lists(draw):
    counts = draw(st.lists(st.integers(5, 23), min_size=2, max_size=6))
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return draw(st.permutations(labels))


@settings(max_examples=40, deadline=None)
@given(labels=label_lists(), k=st.integers(2, 5), seed=st.integers(0, 2**31 - 1))
def test_folds_are_disjoint_complete_and_stratified(labels, k, seed):
    task = Task.from_arrays(noise(len(labels), side=1), labels)
    folds = task.folds(k, seed)
    everything = list(range(len(labels)))
    assert len(folds) == k
    assert sorted(index for _, held in folds for index in held.tolist()) == everything
    for kept, held in folds:
        assert kept.dtype == held.dtype == torch.int64
        assert sorted(kept.tolist() + held.tolist()) == everything
        shares = Counter(task.train.labels[held].tolist())
        for label, count in Counter(labels).items():
            assert count // k <= shares[label] <= -(-count // k)


def test_folds_repeat_with_the_seed_and_leave_global_randomness_alone():
    task = make_task()
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    first, again, other = task.folds(3, seed=1), task.folds(3, seed=1), task.folds(3, seed=2)
    assert all(
        torch.equal(a, b) for pair, twin in zip(first, again, strict=True) for a, b in zip(pair, twin, strict=True)
    )
    assert any(not torch.equal(pair[1], twin[1]) for pair, twin in zip(first, other, strict=True))
    assert np.random.get_state()[1].tolist() == before


def test_one_fold_is_a_stratified_fifth():
    task = make_task(labels=(0, 1, 2) * 20)
    ((kept, held),) = task.folds(1)
    assert sorted(kept.tolist() + held.tolist()) == list(range(60))
    assert Counter(task.train.labels[held].tolist()) == {0: 4, 1: 4, 2: 4}


def test_one_fold_is_the_official_validation_part():
    ((kept, held),) = make_task(validation=[16, 2, 5]).folds(1, seed=9)
    assert held.tolist() == [2, 5, 16]
    assert kept.tolist() == [i for i in range(18) if i not in (2, 5, 16)]


def test_folds_name_the_class_with_too_few_images():
    task = make_task(labels=[0] * 8 + [1] * 4 + [2] * 6)
    with pytest.raises(ValueError, match="class 'bee' has 4 training images; k=5"):
        task.folds(5)
    assert len(task.folds(4)) == 4
    with pytest.raises(ValueError, match="class 'bee' has 1 training images"):
        make_task(labels=[0] * 8 + [1] + [2] * 9).folds(1)


def test_a_holdout_smaller_than_the_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="holdout of 8 images has 2.*3 classes"):
        make_task(labels=[0, 1, 2, 0, 1, 2, 0, 1]).folds(1)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "5", None])
def test_a_number_of_folds_that_is_none_is_refused(k):
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        make_task().folds(k)


@settings(max_examples=40, deadline=None)
@given(labels=label_lists(), data=st.data(), seed=st.integers(0, 1000))
def test_a_subset_is_exact_and_stratified(labels, data, seed):
    n, counts = len(labels), Counter(labels)
    images = torch.arange(n)[:, None, None, None].expand(n, 3, 1, 1).to(torch.uint8)
    task = Task.from_arrays(images, labels)
    size = data.draw(st.integers(len(counts), n))
    subset = task.subset(size, seed)
    chosen = subset.train.images[:, 0, 0, 0].tolist()  # each image carries its index
    assert len(chosen) == size == len(set(chosen))
    assert subset.train.labels.tolist() == [labels[index] for index in chosen]
    shares = Counter(subset.train.labels.tolist())
    if size * min(counts.values()) >= n:  # no class is below one image by proportion
        assert all(abs(shares[label] - size * count / n) < 1 for label, count in counts.items())
    assert all(shares[label] >= 1 for label in counts)


def test_a_subset_repeats_with_its_seed_and_keeps_the_test_part():
    task = make_task()
    subset = task.subset(9, seed=1)
    assert torch.equal(subset.train.images, task.subset(9, seed=1).train.images)
    assert not torch.equal(subset.train.images, task.subset(9, seed=2).train.images)
    assert subset.test is task.test


def test_a_subset_has_no_official_validation_part():
    task = make_task(validation=[0, 1, 2])
    assert task.subset(9).validation is None
    assert task.subset(18).validation is task.validation


@pytest.mark.parametrize("size", [2, 19, 0, -3])
def test_a_subset_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="train_size must be"):
        make_task().subset(size)


# ---------------------------------------------------------------- named tasks


def test_digits_are_scikit_learns_with_a_fixed_test_part():
    task = load("digits")
    assert (len(task.train), len(task.test), task.num_classes, task.image_size) == (1000, 797, 10, (32, 32))
    whole = Counter((task.train.labels.tolist()) + task.test.labels.tolist())
    assert whole == Counter(load_digits().target.tolist())
    # Means over 4 x 4 pixels give the original 8 x 8 digits back, nearly.
    small = torch.nn.functional.avg_pool2d(task.test.images[:, :1].double(), 4).flatten(1) / 255 * 16
    originals = torch.from_numpy(load_digits().data)
    found = torch.cdist(small, originals).argmin(dim=1)
    assert torch.equal(torch.from_numpy(load_digits().target)[found], task.test.labels)
    assert len(found.unique()) > 790  # a few originals are near twins
    assert not image_set(task.train) & image_set(task.test)
    assert torch.equal(load("digits", train_size=50, seed=7).test.images, task.test.images)


@pytest.mark.parametrize("name", ["source", "glyphs", "count", "position"])
def test_generated_tasks_draw_new_training_images_and_keep_the_test_part(name):
    task, other = (load(name, train_size=60, test_size=50, seed=seed) for seed in (0, 1))
    assert len(task.train) == 60 and len(task.test) == 50 and task.image_size == (32, 32)
    assert torch.equal(task.test.images, other.test.images) and not torch.equal(task.train.images, other.train.images)
    assert not image_set(task.train) & image_set(task.test)
    assert load(name, train_size=60, test_size=50).fingerprint == task.fingerprint


def test_sizes_seed_and_image_size_are_used():
    task = load("digits", train_size=60, test_size=40, seed=3, image_size=16)
    assert (len(task.train), len(task.test), task.image_size) == (60, 40, (16, 16))
    assert set(Counter(task.train.labels.tolist()).values()) == {6}
    assert not torch.equal(task.train.images, load("digits", train_size=60, seed=4, image_size=16).train.images)


def test_corruptions_apply_in_order_to_both_parts_with_noise_of_their_own():
    clean = load("digits", train_size=20, test_size=20)
    noisy = load("digits+gaussian_noise@3+contrast@2", train_size=20, test_size=20)
    for part, seed in (("train", 0), ("test", 1)):
        expected = corrupt(getattr(clean, part).images, "gaussian_noise", 3, seed=seed)
        assert torch.equal(getattr(noisy, part).images, corrupt(expected, "contrast", 2))
    assert noisy.name == "digits+gaussian_noise@3+contrast@2"


def test_a_small_memory_limit_streams_the_same_images():
    spec = "digits+shot_noise@2"
    tensor, stream = load(spec, train_size=30), load(spec, train_size=30, memory_limit=30 * 3 * 32 * 32)
    assert isinstance(stream.train.images, torch.Tensor) and isinstance(stream.test.images, StreamedImages)
    assert torch.equal(stream.test.images[:], tensor.test.images)
    both = load(spec, train_size=30, memory_limit=0)
    assert torch.equal(both.train.images[:], tensor.train.images)
    subset = both.subset(12, seed=5)
    assert isinstance(subset.train.images, StreamedImages)
    assert torch.equal(subset.train.images[:], tensor.subset(12, seed=5).train.images)
    assert both.fingerprint == load(spec, train_size=30, memory_limit=0).fingerprint != subset.fingerprint


REFUSED = {
    "unknown name": ("cifar", {}, ValueError, "unknown task 'cifar'.*digits.*cifar10.*folder:DIR"),
    "case": ("Digits", {}, ValueError, "unknown task 'Digits'"),
    "empty": ("", {}, ValueError, "unknown task ''"),
    "no folder": ("folder:", {}, ValueError, "unknown task 'folder:'"),
    "not a string": (["digits"], {}, TypeError, "named by a string"),
    "corruption": ("digits+fogg@3", {}, ValueError, "unknown corruption 'fogg'; allowed are gaussian_noise"),
    "no severity": ("digits+contrast", {}, ValueError, r"\+name@severity"),
    "severity 0": ("digits+contrast@0", {}, ValueError, "from 1 to 5, got 0"),
    "severity 6": ("digits+contrast@6", {}, ValueError, "from 1 to 5, got 6"),
    "severity word": ("digits+contrast@high", {}, ValueError, "from 1 to 5, got 'high'"),
    "no severity after @": ("digits+contrast@", {}, ValueError, "from 1 to 5"),
    "too many": ("digits", {"train_size": 1001}, ValueError, r"train_size must be 10 .* to 1000 .*got 1001"),
    "too few": ("digits", {"train_size": 9}, ValueError, "train_size must be 10 .*got 9"),
    "too few glyphs": ("glyphs", {"train_size": 5, "test_size": 20}, ValueError, "class .* has no training images"),
    "too many tests": ("digits", {"test_size": 798}, ValueError, "test_size must be 10 .*got 798"),
    "zero": ("digits", {"train_size": 0}, ValueError, "train_size must be at least 2, got 0"),
    "float size": ("digits", {"train_size": 100.0}, TypeError, "train_size must be an int, got 100.0"),
    "image size": ("digits", {"image_size": 0}, ValueError, "image_size must be at least 1, got 0"),
    "pair": ("digits", {"image_size": (32, 32)}, TypeError, "image_size must be an int"),
    "seed": ("digits", {"seed": -1}, ValueError, "seed must be at least 0"),
    "large seed": ("digits", {"seed": 2**31}, ValueError, "at most 2147483647"),
    "memory": ("digits", {"memory_limit": -1}, ValueError, "memory_limit must be at least 0"),
    "missing folder": ("folder:/no/such", {}, FileNotFoundError, "folder not found: /no/such"),
    "missing lists": ("vtab:/no/such", {}, FileNotFoundError, r"/no/such/train800val200\.txt"),
}


@pytest.mark.parametrize(("spec", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_load_task_refuses(spec, options, error, message):
    with pytest.raises(error, match=message):
        load(spec, **options)


def test_every_name_is_described():
    names = task_names()
    assert set(names) == {*OFFLINE, *PUBLISHED, *VTAB, "folder:DIR", "vtab:DIR", "cifar10c:DIR/NAME@SEVERITY"}
    assert list(names)[:5] == list(OFFLINE)
    assert all(text and "\n" not in text for text in names.values())


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("held", ["test", "val"])
def test_a_folder_with_its_own_split(tmp_path, held):
    write_folder(tmp_path / "train", {"bee": 4, "ant": 3})
    write_folder(tmp_path / held, {"ant": 2, "bee": 1}, seed=50)
    task = load(f"folder:{tmp_path}")
    assert task.classes == ("ant", "bee") and task.image_size == (8, 8)
    assert Counter(task.train.labels.tolist()) == {0: 3, 1: 4} and Counter(task.test.labels.tolist()) == {0: 2, 1: 1}
    expected = np.asarray(Image.open(tmp_path / held / "ant" / "001.png")).transpose(2, 0, 1)
    assert np.array_equal(task.test.images[1].numpy(), expected)


def test_test_is_preferred_to_val(tmp_path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "val", {"a": 5, "b": 5}, seed=50)
    write_folder(tmp_path / "test", {"a": 1, "b": 1}, seed=90)
    assert len(load(f"folder:{tmp_path}").test) == 2


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_folder_without_a_split_is_split_the_same_way_for_every_seed(tmp_path, inner):
    write_folder(tmp_path / inner, {"a": 20, "b": 10})
    task, other = load(f"folder:{tmp_path}"), load(f"folder:{tmp_path}", train_size=10, seed=5)
    assert Counter(task.train.labels.tolist()) == {0: 16, 1: 8} and Counter(task.test.labels.tolist()) == {0: 4, 1: 2}
    assert not image_set(task.train) & image_set(task.test)
    assert torch.equal(task.test.images, other.test.images)
    assert image_set(other.train) <= image_set(task.train)


def test_nested_upper_case_and_hidden_files(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    write_image(tmp_path / "a" / "deep" / "x.PNG", seed=77)
    write_image(tmp_path / ".ipynb_checkpoints" / "x.png")
    (tmp_path / "a" / "._000.png").write_bytes(b"not an image")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    task = load(f"folder:{tmp_path}")
    assert task.classes == ("a", "b") and len(task.train) + len(task.test) == 5


def test_a_path_may_contain_plus_and_at_signs(tmp_path):
    root = write_folder(tmp_path / "c++@home+contrast@3" / "data+set", {"a": 3, "b": 3})
    clean, noisy = load(f"folder:{root}"), load(f"folder:{root}+contrast@3")
    assert torch.equal(noisy.train.images, corrupt(clean.train.images, "contrast", 3))


def test_only_chosen_files_are_decoded(tmp_path, monkeypatch):
    write_folder(tmp_path / "train", {"a": 30, "b": 30})
    write_folder(tmp_path / "test", {"a": 10, "b": 10})
    read = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: (read.append(path), real(path, *rest))[1])
    load(f"folder:{tmp_path}", train_size=6, test_size=4, image_size=8)
    assert len(read) == len(set(read)) == 10


@pytest.mark.parametrize(("size", "expected"), [((8, 12), (8, 12)), ((300, 300), (224, 224))])
def test_images_keep_a_common_size_up_to_256(tmp_path, size, expected):
    for name in ("a/0", "a/1", "b/0", "b/1"):
        write_image(tmp_path / f"{name}.png", size=size)
    assert load(f"folder:{tmp_path}").image_size == expected
    assert load(f"folder:{tmp_path}", image_size=6).image_size == (6, 6)


def test_folder_errors_name_folder_class_or_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no class folders"):
        load(f"folder:{tmp_path}")
    write_folder(tmp_path, {"a": 3})
    with pytest.raises(ValueError, match="one class 'a'"):
        load(f"folder:{tmp_path}")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="class 'b' has no images"):
        load(f"folder:{tmp_path}")
    write_image(tmp_path / "b" / "0.png")
    with pytest.raises(ValueError, match="class 'b' has 1 images"):
        load(f"folder:{tmp_path}")
    write_image(tmp_path / "b" / "1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot decode image .*b/1\.png"):
        load(f"folder:{tmp_path}")


def test_a_test_class_that_train_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "test", {"a": 1, "b": 1, "wasp": 1})
    with pytest.raises(ValueError, match="wasp"):
        load(f"folder:{tmp_path}")


# ---------------------------------------------------------------- VTAB lists


@pytest.fixture
def vtab(tmp_path):
    """Ten training images of two classes, the last four for validation, and three test images."""
    lines = [f"images/train {n}.png {n % 2}" for n in range(10)]  # with a space in the path
    held = [f"images/test{n}.png {n % 2}" for n in range(3)]
    for seed, line in enumerate(lines + held):
        write_image(tmp_path / line.rpartition(" ")[0], seed=seed)
    for name, content in (("train800", lines[:6]), ("val200", lines[6:]), ("train800val200", lines), ("test", held)):
        (tmp_path / f"{name}.txt").write_text("\n".join(content) + "\n")
    return tmp_path


def test_vtab_lists_with_their_validation_part(vtab):
    task = load(f"vtab:{vtab}")
    assert (len(task.train), len(task.test), task.classes) == (10, 3, ("0", "1"))
    assert task.validation.tolist() == [6, 7, 8, 9]
    assert [part.tolist() for part in task.folds(1)[0]] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert len(task.folds(5)) == 5
    expected = np.asarray(Image.open(vtab / "images" / "train 3.png")).transpose(2, 0, 1)
    assert np.array_equal(task.train.images[3].numpy(), expected)
    assert load(f"vtab:{vtab}", train_size=6).validation is None


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "test",
            "images/test0.png 0\nimages/test1.png one\n",
            ValueError,
            r"test\.txt, line 2: .*'images/test1.png one'",
        ),
        ("test", "images/test0.png\n", ValueError, r"test\.txt, line 1"),
        ("test", "images/test0.png -1\n", ValueError, r"test\.txt, line 1"),
        ("test", "\nimages/test0.png 2\n", ValueError, r"test\.txt, line 2: label 2.*end at 1"),
        ("test", "images/gone.png 0\n", FileNotFoundError, r"gone\.png"),
        ("test", "", ValueError, r"test\.txt lists no images"),
        ("val200", "images/test0.png 0\n", ValueError, r"val200\.txt.*test0\.png"),
        ("train800val200", "images/test0.png 0\nimages/test1.png 2\n", ValueError, "."),
    ],
)
def test_bad_vtab_lists_are_named(vtab, name, content, error, message):
    (vtab / f"{name}.txt").write_text(content)
    with pytest.raises(error, match=message):
        load(f"vtab:{vtab}")


def test_a_missing_vtab_list_is_named(vtab):
    (vtab / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200\.txt"):
        load(f"vtab:{vtab}")


# ---------------------------------------------------------------- published data sets, in torchvision's layouts


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


# ---------------------------------------------------------------- published data sets in VTAB-1k's sizes


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
