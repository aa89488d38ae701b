"""Folders of images, the lists of VTAB-1k."""

import os
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.decode import image_suffixes, read_image
from subtuning_lab.data.folders import CIFAR10_CLASSES
from subtuning_lab.data.task import Task
from tests.data.material import copy_of, image_set, load, write_folder, write_image


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


HIDDEN = (".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found")
HIDDEN += ("@__thumb", "@tmp", "_gsdata_", "Temporary Items", "Network Trash Folder", "FOUND.000", "__MACOSX ")


@pytest.mark.parametrize("name", HIDDEN)
def test_copies_in_hidden_and_system_folders_are_not_read(tmp_path, name):
    """A copy that is read can land in the test part while its original is trained on."""
    write_folder(tmp_path, {"a": 4, "b": 4})
    for place in ("", "a", "a/deep"):
        copy_of(tmp_path / "b" / "000.png", tmp_path / place / name / "inner" / "000-checkpoint.png")
    write_image(tmp_path / "a" / "deep" / "x.PNG", seed=77)
    (tmp_path / "a" / "._000.png").write_bytes(b"not an image")
    task = load(f"folder:{tmp_path}")
    assert task.classes == ("a", "b") and len(task.train) + len(task.test) == 9


@pytest.mark.parametrize("name", ["Thumbs", "thumbnails", "_thumbs", "thumb"])
def test_thumbnails_inside_a_class_are_not_read_but_a_class_may_show_thumbs(tmp_path, name):
    write_folder(tmp_path, {"a": 4, name: 4})
    write_folder(tmp_path / "a", {name: 2}, seed=60)
    task = load(f"folder:{tmp_path}")
    assert name in task.classes and len(task.train) + len(task.test) == 8


SPLITS = {
    **{f"{train} / {test}": (train, test) for train, test in (("Train", "Test"), ("TRAIN", "VAL"), ("train", "dev"))},
    **{f"train / {test}": ("train", test) for test in ("valid", "validation", "Validation", "val", "eval", "testing")},
    **{f"{stem} set": (f"training{stem}", f"test{stem}") for stem in ("_set", "Set", "-set", "_data", " images")},
    "years": ("train2017", "val2017"),
    "joined": ("trainval", "test"),
}


@pytest.mark.parametrize(("train", "test"), SPLITS.values(), ids=SPLITS)
def test_parts_may_have_other_names(tmp_path, train, test):
    write_folder(tmp_path / train, {"a": 3, "b": 2})
    write_folder(tmp_path / test, {"a": 1, "b": 2}, seed=50)
    (tmp_path / "annotations").mkdir()
    task = load(f"folder:{tmp_path}")
    assert (task.classes, len(task.train), len(task.test)) == (("a", "b"), 5, 3)


@pytest.mark.parametrize(
    ("train", "test"), [("seg_train", "seg_test"), ("train_photos", "test_photos"), ("train of cats", "cats val")]
)
def test_parts_may_be_told_by_a_word_of_their_names_with_a_note(tmp_path, train, test):
    write_folder(tmp_path / train, {"a": 3, "b": 2})
    write_folder(tmp_path / test, {"a": 1, "b": 2}, seed=50)
    with pytest.warns(UserWarning, match="are taken for the parts of the data set, not for classes"):
        task = load(f"folder:{tmp_path}")
    assert (task.classes, len(task.train), len(task.test)) == (("a", "b"), 5, 3)


@pytest.mark.parametrize(
    "classes", [("steam_train", "test_tube", "bus"), ("negative_test", "positive_test"), ("#", "$", "@", "@home", "~")]
)
def test_classes_may_have_any_names(tmp_path, classes):
    write_folder(tmp_path, dict.fromkeys(classes, 3))
    assert set(load(f"folder:{tmp_path}").classes) == set(classes)


@pytest.mark.parametrize("name", ["cache", "previews", "deep/augmented"])
def test_images_below_others_of_their_name_are_told(tmp_path, name):
    write_folder(tmp_path, {"a": 4, "b": 4})
    write_folder(tmp_path / "a", {name: 4}, seed=70)  # other bytes, as resized copies have
    with pytest.warns(UserWarning, match="a: 4 images named as one in a folder above, e.g. .*000.png"):
        load(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"aeroplane": 3, "train": 3, "tvmonitor": 3})
    assert load(f"folder:{tmp_path}").classes == ("aeroplane", "train", "tvmonitor")


def test_classes_may_be_called_as_held_out_parts_are(tmp_path):
    write_folder(tmp_path, {"control": 3, "test": 3})
    assert load(f"folder:{tmp_path}").classes == ("control", "test")


UNCLEAR = {
    "two training parts": (["train/a", "train/b", "Training/a"], "has two train parts: '[Tt]rain.*' and"),
    "no training part": (["valid/a", "valid/b", "test/a", "test/b"], r"has \['test', 'valid'\], but no training part"),
    "part or class": (["train/a", "train/b", "misc"], "may be the training part or a class beside 'misc'"),
    "no labels": (["train/a", "train/b", "test"], "no class folders in .*test: without labels"),
    "flat parts": (["train", "test"], "no class folders in .*train"),
    "parts in classes": (["a/train", "a/test", "b/train", "b/test"], r"holds the parts \['test', 'train'\]"),
}


@pytest.mark.parametrize(("places", "message"), UNCLEAR.values(), ids=UNCLEAR)
def test_folders_that_are_not_clear_are_refused(tmp_path, places, message):
    for place in places:
        write_folder(tmp_path, {place: 3})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(f"folder:{tmp_path}")


LEFT_OUT = {
    "a folder beside the parts": (["train/a", "train/b", "test/a", "test/b", "misc"], r"left out: \['misc'\]"),
    "val beside test": (["train/a", "train/b", "test/a", "test/b", "val/a", "val/b"], "val is left out: .*test is"),
    "no labels in test": (["train/a", "train/b", "test", "val/a", "val/b"], "test is left out: .*val is the test part"),
}


@pytest.mark.parametrize(("places", "message"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_told(tmp_path, places, message):
    for seed, place in enumerate(places):
        write_folder(tmp_path, {place: 2}, seed=100 * seed)
    with pytest.warns(UserWarning, match=message):
        task = load(f"folder:{tmp_path}")
    assert (len(task.train), len(task.test)) == (4, 4)


@pytest.mark.parametrize("parts", [("fold1", "fold2", "fold3"), ("tr", "te"), ("dslr", "webcam")])
def test_classes_that_may_be_parts_are_told(tmp_path, parts):
    for seed, part in enumerate(parts):
        write_folder(tmp_path / part, {"cat": 2, "dog": 2}, seed=100 * seed)
    with pytest.warns(UserWarning, match=r"are taken for classes, and each holds \['cat', 'dog'\].* load folder:"):
        assert load(f"folder:{tmp_path}").classes == tuple(sorted(parts))


def test_files_of_other_kinds_are_counted(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3})
    for name in (
        "a/1.heic",
        "a/2.HEIC",
        "b/3.heic",
        "b/drawing.svg",
        "a/README",
        "a/.DS_Store",
        "a/Thumbs.db",
        "x.png",
    ):
        (tmp_path / name).write_bytes(b"?")
    with pytest.warns(UserWarning, match="left out: 3 .heic, 1 .svg, 1 beside the classes, 1 no suffix$") as told:
        assert len(load(f"folder:{tmp_path}").train) == 4
    assert len(told) == 1


@pytest.mark.parametrize("suffix", ["gif", "jfif", "JPE", "jp2", "pbm", "tga", "avif", "webp", "apng", "dib"])
def test_what_pillow_reads_is_read(tmp_path, suffix):
    if f".{suffix.lower()}" not in image_suffixes():
        pytest.skip("this Pillow was built without it")
    write_folder(tmp_path, {"a": 2, "b": 2})
    bright = Image.new("L" if suffix != "pbm" else "1", (8, 8), 255)
    bright.save(tmp_path / "a" / f"x.{suffix}")
    task = load(f"folder:{tmp_path}")
    assert len(task.train) + len(task.test) == 5
    whole = torch.cat([task.train.images, task.test.images])
    assert (whole.flatten(1).double().mean(dim=1) > 250).sum() == 1


LINKS = {
    "to itself": ("a/loop", "a"),
    "to the root": ("a/loop", "."),
    "above the root": ("b/loop", ".."),
    "to another class": ("a/other", "b"),
    "a class that is the root": ("c", "."),
    "a folder twice": ("a/twice", "a/deep"),
    "around two corners": ("a/deep/back", "a"),
    "to nothing": ("a/deep/gone", "none"),
}


@pytest.mark.parametrize(("link", "target"), LINKS.values(), ids=LINKS)
def test_linked_folders_are_read_once(tmp_path, link, target):
    root = write_folder(tmp_path / "root", {"a/deep": 3, "b": 3})
    (root / link).symlink_to((root / target).resolve(), target_is_directory=True)
    with warnings.catch_warnings(record=True):
        task = load(f"folder:{root}")
    assert task.classes == ("a", "b") and len(task.train) + len(task.test) == 6


def test_deep_folders_pipes_and_devices(tmp_path):
    """Reading a pipe or a device would not end."""
    write_folder(tmp_path, {"a": 3, "b": 3, "/".join(["b", *["x"] * 400]): 1})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "b" / "zero.png").symlink_to("/dev/zero")
    task = load(f"folder:{tmp_path}")
    assert len(task.train) + len(task.test) == 7
    with pytest.raises(ValueError, match=r"pipe\.png: not a regular file"):
        read_image(tmp_path / "a" / "pipe.png", (8, 8))


def test_one_folder_as_two_classes_is_refused(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match=r"classes \['b', 'c'\] of .* are one folder"):
        load(f"folder:{tmp_path}")


def test_names_that_are_no_utf_8_or_hold_control_characters_are_shown_escaped(tmp_path):
    names = (os.fsdecode(b"caf\xe9"), "\x1b[31mred", "日本 \u202e")
    for seed, name in enumerate(names):
        write_folder(tmp_path, {name: 3}, seed=10 * seed)
        (tmp_path / name / "001.png").rename(tmp_path / name / os.fsdecode(b"\xff.png"))
    task = load(f"folder:{tmp_path}")
    assert set(task.classes) == {r"caf\xe9", r"\x1b[31mred", r"日本 \u202e"}
    assert len(task.train) + len(task.test) == 9 and len(task.fingerprint) == 64
    streamed = load(f"folder:{tmp_path}", memory_limit=0)
    assert torch.equal(streamed.train.images[:], task.train.images) and streamed.fingerprint
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"9 of 9 images|caf\\xe9") as raised:
        load(f"folder:{tmp_path}", image_size=8)
    str(raised.value).encode()


def test_accents_are_one_letter_however_a_system_writes_them(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    write_folder(tmp_path / "a" / "train", {composed: 2, "tea": 2})
    write_folder(tmp_path / "a" / "test", {apart: 1, "tea": 1}, seed=50)
    task = load(f"folder:{tmp_path / 'a'}")
    assert task.classes == (composed, "tea") and task.test.labels.tolist() == [0, 1]
    write_folder(tmp_path / "b", {composed: 2, apart: 2})
    with pytest.raises(ValueError, match="two folders .*, whose names only Unicode's forms tell apart"):
        load(f"folder:{tmp_path / 'b'}")
    with pytest.raises(ValueError, match="only Unicode's forms tell two of its names apart"):
        Task("cafes", (composed, apart), task.train, None)


def test_identical_photographs_in_train_and_test_are_counted(tmp_path):
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    write_folder(tmp_path / "test", {"a": 2, "b": 2}, seed=50)
    copy_of(tmp_path / "train" / "b" / "002.png", tmp_path / "test" / "a" / "copy.png")
    for limit in (None, 8 * 8 * 8 * 3, 0):
        with pytest.warns(UserWarning, match="1 of 5 test images are training images, too"):
            load(f"folder:{tmp_path}", memory_limit=limit)


def test_all_bad_files_are_named_at_once(tmp_path):
    write_folder(tmp_path / "train", {"a": 40, "b": 4})
    write_folder(tmp_path / "test", {"a": 2, "b": 2}, seed=50)
    bad = [tmp_path / "train" / "a" / f"{number:03d}.png" for number in range(3, 33)]
    for path in bad[:-1]:
        path.write_bytes(b"broken")
    bad[-1].unlink()
    bad[-1].symlink_to("nowhere")
    for limit in (None, 0):
        with pytest.raises(ValueError, match="30 of 44 images cannot be read:") as raised:
            load(f"folder:{tmp_path}", memory_limit=limit)
        lines = str(raised.value).splitlines()
        assert all(path.name in line for path, line in zip(bad[:20], lines[1:21], strict=True))
        assert lines[21:] == ["and 10 more"]


SOURCES = {
    "train": "cifar10/train",
    "training_set": "cifar10/train",
    "Test": "cifar10/test",
    "some": "cifar10",
}


@pytest.mark.parametrize(("name", "source"), SOURCES.items())
def test_published_images_are_known_by_their_folders(tmp_path, name, source):
    write_folder(tmp_path / name, dict.fromkeys(CIFAR10_CLASSES, 2))
    assert load(f"folder:{tmp_path / name}").source == source
    if source == "cifar10/train":
        task = load(f"folder:{tmp_path}+contrast@1", train_size=10)
        assert task.source == source == task.subset(10).source
    other = write_folder(tmp_path / "other", {"airplane": 2, "cat": 2})
    assert load(f"folder:{other}").source is None
    wordnet = write_folder(tmp_path / "nette" / "val", {"n01440764": 2, "n02102040": 2})
    assert load(f"folder:{wordnet}").source == "imagenet/val"


@pytest.mark.parametrize("name", ["c++@home+contrast@3/data+set", "me+work@home", "a+contrast@3", "a+fog@1+b@2", "+x@"])
def test_a_path_may_contain_plus_and_at_signs(tmp_path, name):
    root = write_folder(tmp_path / name, {"a": 3, "b": 3})
    clean, noisy = load(f"folder:{root}"), load(f"folder:{root}+contrast@3")
    assert torch.equal(noisy.train.images, corrupt(clean.train.images, "contrast", 3))
    with pytest.raises(ValueError, match="corruption is 'fogg'"):
        load(f"folder:{root}+fogg@3")
    with pytest.raises(FileNotFoundError, match=r"folder not found: .*/gone\+work@home"):
        load(f"folder:{root.parent}/gone+work@home+contrast@3")


def test_only_chosen_files_are_decoded(tmp_path, monkeypatch):
    write_folder(tmp_path / "train", {"a": 30, "b": 30})
    write_folder(tmp_path / "test", {"a": 10, "b": 10})
    read = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: (read.append(path), real(path, **options))[1])
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


def test_where_the_classes_may_be_is_said(tmp_path):
    write_folder(tmp_path / "data", {"a": 2, "b": 2})
    with pytest.raises(ValueError, match=r"the one class 'data'.*load folder:.*data$"):
        load(f"folder:{tmp_path}")


def test_a_test_class_that_train_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "test", {"a": 1, "b": 1, "wasp": 1})
    with pytest.raises(ValueError, match="wasp"):
        load(f"folder:{tmp_path}")


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
        ("test", "images/gone.png 0\n", FileNotFoundError, r"gone\.png"),
        ("test", "", ValueError, r"test\.txt lists no images"),
        ("val200", "images/test0.png 0\n", ValueError, r"val200\.txt.*test0\.png.*is a test image"),
        (
            "train800val200",
            "images/test0.png 0\nimages/test1.png 1\n",
            ValueError,
            r"test0\.png, which is a test image",
        ),
        ("val200", "images/train 1.png 1\nimages/./train 1.png 1\n", ValueError, r"line 2: .* is in line 1 already"),
        ("val200", "images/train 1.png 0\n", ValueError, r"val200\.txt gives .*train 1\.png another label"),
        ("val200", "".join(f"images/train {n}.png {n % 2}\n" for n in range(10)), ValueError, "no image .* train on"),
        ("test", "images/test0.png 100000\n", ValueError, "label 100000 is not below 100000"),
        ("test", f"images/test0.png {2**62}\n", ValueError, "is not below 100000"),
        ("test", f"images/test0.png {'9' * 9000}\n", ValueError, "is not below 100000"),
        ("test", "images/test0.png \u0663\n", ValueError, "line 1: expected 'path label'"),
        ("test", "images/te\0st.png 1\n", ValueError, "line 1: expected 'path label'"),
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


@pytest.fixture
def community(tmp_path):
    """The layout of the usual generator: every list's images in a folder of its own, numbered, as JPEG files.

    Labels of 12 classes, of which 3 and 11 have no training image; 60 + 20 training images in a random order.
    """
    labels = {"train800": [n % 11 for n in range(66) if n % 11 != 3], "val200": [(7 * n) % 3 for n in range(20)]}
    labels["train800val200"] = labels["train800"] + labels["val200"]
    labels["test"] = [3, 11, 0, 1]
    for part, numbers in labels.items():
        seeds = {"train800": 0, "val200": 60, "train800val200": 0, "test": 500}
        for number, _ in enumerate(numbers):
            write_image(tmp_path / f"images/{part}/{number:06d}.jpg", seed=seeds[part] + number)
        lines = [f"images/{part}/{number:06d}.jpg {label}" for number, label in enumerate(numbers)]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    return tmp_path


def test_the_usual_generators_folders_are_read(community):
    task = load(f"vtab:{community}")
    assert (len(task.train), len(task.test), task.num_classes) == (80, 4, 12)
    assert task.validation.tolist() == list(range(60, 80))
    assert task.test.labels.tolist() == [3, 11, 0, 1] and task.class_counts[[3, 11]].tolist() == [0, 0]
    assert [len(part) for part in task.folds(1)[0]] == [60, 20]
    with pytest.warns(UserWarning, match="fewer than 8 training images"):
        assert len(task.folds(8)) == 8


def test_validation_images_are_found_by_content_in_any_order_and_only_once(community):
    lines = (community / "train800val200.txt").read_text().splitlines()
    (community / "train800val200.txt").write_text("\n".join(lines[::-1]))
    assert load(f"vtab:{community}").validation.tolist() == list(range(19, -1, -1))
    copy_of(community / "images/val200/000001.jpg", community / "images/val200/000000.jpg")
    with pytest.raises(ValueError, match=r"val200.txt lists .*00000\d.jpg, which train800val200.txt lacks"):
        load(f"vtab:{community}")


def test_validation_images_that_were_written_anew_are_found_by_their_labels_with_a_note(community):
    for number in range(20):
        with Image.open(community / f"images/val200/{number:06d}.jpg") as image:
            image.save(community / f"images/val200/{number:06d}.jpg", quality=40)
    with pytest.warns(UserWarning, match="taken for the last 20 training images"):
        assert load(f"vtab:{community}").validation.tolist() == list(range(60, 80))
    lines = (community / "val200.txt").read_text().splitlines()
    (community / "val200.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"val200/000000.jpg, which train800val200.txt lacks"):
        load(f"vtab:{community}")


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n") + "\r\n \r\n"]
)
def test_lists_may_begin_with_a_mark_and_have_windows_lines(vtab, change):
    plain = load(f"vtab:{vtab}").fingerprint
    for file in vtab.glob("*.txt"):
        file.write_bytes(change(file.read_text()).encode())
    assert load(f"vtab:{vtab}").fingerprint == plain


@settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300) | st.text(alphabet="ab/. \t\n0123\0\ufeff²", max_size=80).map(str.encode),
    name=st.sampled_from(["test", "val200", "train800val200"]),
)
def test_any_list_is_read_or_refused_with_its_name(vtab, content, name):
    path = vtab / f"{name}.txt"
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        load(f"vtab:{vtab}")
    except (ValueError, FileNotFoundError) as error:
        assert any(word in str(error) for word in (f"{name}.txt", "not found", "image", "test.txt", "classes"))
        str(error).encode()
    finally:
        path.write_bytes(before)
