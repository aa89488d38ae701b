"""Every way to name a task, and what loading does with it."""

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import StreamedImages
from subtuning_lab.data.load import task_names
from subtuning_lab.data.torchvision_sets import PUBLISHED, VTAB
from tests.data.material import image_set, load

OFFLINE = ("digits", "source", "glyphs", "count", "position")


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
    "no folder": ("folder:", {}, ValueError, "unknown task 'folder:'"),
    "corruption": ("digits+fogg@3", {}, ValueError, "corruption is 'fogg'; it must be one of gaussian_noise"),
    "no severity": ("digits+contrast", {}, ValueError, r"\+name@severity"),
    "severity 0": ("digits+contrast@0", {}, ValueError, "severity of contrast is '0'; it must be a whole number"),
    "severity 6": ("digits+contrast@6", {}, ValueError, "severity of contrast is '6'; it must be a whole number"),
    "severity word": ("digits+contrast@high", {}, ValueError, "severity of contrast is 'high'"),
    "no severity after @": ("digits+contrast@", {}, ValueError, "severity of contrast is ''"),
    "too many": ("digits", {"train_size": 1001}, ValueError, r"train_size must be 10 .* to 1000 .*got 1001"),
    "too few": ("digits", {"train_size": 9}, ValueError, "train_size must be 10 .*got 9"),
    "too few glyphs": (
        "glyphs",
        {"train_size": 5, "test_size": 20},
        ValueError,
        "train_size is 5; 'glyphs' needs at least one image of each of 20",
    ),
    "too many tests": ("digits", {"test_size": 798}, ValueError, "test_size must be 10 .*got 798"),
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


def test_what_half_of_the_free_memory_does_not_hold_is_streamed(monkeypatch):
    monkeypatch.setattr("subtuning_lab.data.load.free_main_memory", lambda: 2 * 40 * 3 * 32 * 32)
    task = load("digits", train_size=40, test_size=40)
    assert isinstance(task.train.images, torch.Tensor) and isinstance(task.test.images, StreamedImages)
