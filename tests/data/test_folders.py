"""Folders of images, the lists of VTAB-1k."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from subtuning_lab.data.corruptions.registry import corrupt
from tests.data.material import image_set, load, write_folder, write_image


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
