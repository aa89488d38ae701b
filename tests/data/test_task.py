"""Tasks: what is accepted and refused, honest folds and subsets."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.task import Split, Task
from tests.data.material import load, noise


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
    "one class": ({"classes": ("ant",), "labels": [0] * 18}, ValueError, "at least 2 values"),
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


RARE = {
    "three of four folds have it": ([0] * 8 + [1] * 3 + [2] * 7, 4, "class 'bee' first .3."),
    "all classes are rare": ([0, 1, 2] * 6, 7, "3 classes have fewer than 7"),
    "one image, a holdout": ([0] * 8 + [1] + [2] * 9, 1, "1 class has fewer than 2"),
    "fewer held out than classes": ([0, 1, 2, 0, 1, 2, 0, 1], 1, "a holdout of 2 images can't hold all 3 classes"),
}


@pytest.mark.parametrize(("labels", "k", "message"), RARE.values(), ids=RARE)
def test_rare_classes_are_dealt_out_with_a_note(labels, k, message):
    with pytest.warns(UserWarning, match=message):
        folds = make_task(labels=labels).folds(k)
    held = [part.tolist() for _, part in folds]
    assert len(folds) == k and all(held)
    assert all(sorted(kept.tolist() + part.tolist()) == list(range(len(labels))) for kept, part in folds)
    if k > 1:
        assert sorted(sum(held, [])) == list(range(len(labels)))
        assert max(map(len, held)) - min(map(len, held)) <= 3


def test_a_class_without_training_images_is_left_out_of_folds_and_may_be_tested():
    task = make_task()
    task = Task("rare", ("ant", "bee", "cat", "dog"), task.train, Split(task.test.images, task.test.labels + 1))
    assert task.class_counts.tolist() == [6, 6, 6, 0] and len(task.folds(3)) == 3


def test_more_folds_than_images_are_refused():
    with pytest.raises(ValueError, match="k is 19; it must be at most the number of training images, 18"):
        make_task().folds(19)


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
    with pytest.raises(ValueError, match="train_size (is|must be)"):
        make_task().subset(size)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("ant", "bee", "bee")},
        {"classes": (name for name in ("ant", "bee", "cat"))},
        {"classes": ("ant", "bee", 3)},
        {"classes": ("ant", "bee", "")},
        {"classes": ("ant", "bee", "\x1b[31mcat")},
        {"classes": ("ant", "bee", "c\udce9t")},
        {"classes": ("ant", "bee", "cat\u202egnp")},
        {"classes": "abc"},
        {"classes": {"ant", "bee", "cat"}},
        {"classes": ("ant", "bee")},
        {"name": ""},
        {"name": "a\nb"},
        {"labels": [0, 1, 2**62] * 6, "classes": None},
        {"labels": np.array([0, 1, 2**63] * 6, dtype=np.uint64), "classes": None},
        {"labels": [[0], [1, 2]] * 9},
        {"images": None},
        {"images": np.zeros((18, 3, 8, 8), dtype=object)},
    ],
)
def test_names_and_labels_that_would_fail_later_are_refused_at_once(changes):
    with pytest.raises((TypeError, ValueError), match="classes|name|labels?|images"):
        make_task(**changes)


def test_classes_may_have_names_of_any_language():
    names = ("Ameise \U0001f41c", "ねこ\u3000二", "گربه\u200cها")
    assert make_task(classes=list(names)).classes == make_task(classes=np.array(names)).classes == names


def test_numpys_integers_are_integers():
    task, n = make_task(), np.int64
    assert torch.equal(task.folds(n(3), n(1))[1][0], task.folds(3, 1)[1][0])
    assert torch.equal(task.subset(n(9), n(2)).train.images, task.subset(9, 2).train.images)
    same = [
        load("glyphs+fog@3", train_size=a(40), test_size=a(20), seed=a(1), image_size=a(16)) for a in (int, n, np.uint8)
    ]
    assert len({task.fingerprint for task in same}) == 1
    assert torch.equal(corrupt(noise(2), "fog", n(2), n(1)), corrupt(noise(2), "fog", 2, 1))


def test_shared_images_are_counted():
    images = noise(18)
    test = torch.cat([images[[3, 5, 5]], noise(3, seed=1)])
    with pytest.warns(UserWarning, match="3 of 6 test images are training images, too"):
        make_task(images=images, test_images=test)
