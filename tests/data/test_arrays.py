"""Arrays that callers hand in: every layout, and what is refused."""

import numpy as np
import pytest
import torch

from subtuning_lab.data.arrays import as_images, as_integers
from subtuning_lab.utils.text import printable


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_as_images_brings_all_layouts_to_one():
    array = np.stack([pixels(8, 9, seed=number) for number in range(4)])
    expected = torch.from_numpy(array).permute(0, 3, 1, 2)
    layouts = [array, torch.from_numpy(array), expected, expected.numpy(), array / 255.0]
    layouts += [(expected.float() / 255), np.asarray(array / 255, dtype=np.float32), array[:, ::-1].copy()[:, ::-1]]
    for images in layouts:
        converted = as_images(images)
        assert converted.dtype == torch.uint8 and converted.is_contiguous()
        assert torch.equal(converted, expected)
    for grey in (array[..., 0], torch.from_numpy(array[:, None, :, :, 0])):
        assert torch.equal(as_images(grey), expected[:, :1].expand(-1, 3, -1, -1))


def test_as_images_copies():
    array = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images = as_images(array)
    array += 1
    assert not images.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.01, -0.01, 255.0])
def test_as_images_names_the_first_bad_image(bad):
    images = torch.rand(5, 3, 4, 4)
    images[3, 1, 2, 2] = images[4, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"images\[3\].*NaN or outside \[0, 1\]"):
        as_images(images)


@pytest.mark.parametrize(
    "shape", [(4, 8), (4, 2, 8, 8), (4, 8, 8, 4), (0, 3, 8, 8), (4, 3, 0, 8), (3,), (1, 2, 3, 8, 8)]
)
def test_as_images_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="must be"):
        as_images(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, bool, complex, "U1", object])
def test_as_images_refuses_other_types(dtype):
    with pytest.raises(TypeError, match="must be uint8"):
        as_images(np.zeros((2, 3, 4, 4), dtype=dtype))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4, dtype=torch.int32), [[[1]]], None])
def test_as_images_refuses_other_objects(images):
    with pytest.raises(TypeError, match="must be"):
        as_images(images)


@pytest.mark.parametrize("values", [[0.0, 1.0], [True, False], ["a", "b"], torch.rand(2), [None, 1]])
def test_as_integers_refuses_other_types(values):
    with pytest.raises(TypeError, match="labels must be integers"):
        as_integers(values, "labels")


@pytest.mark.parametrize("values", [[[0, 1]], np.int64(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_as_integers_refuses_other_shapes(values):
    with pytest.raises(ValueError, match=r"labels must have shape \(n,\)"):
        as_integers(values, "labels")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Straße 東京 \U0001f600 a\u200cb\u3000\xa0", None),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\r\n\t\0", r"a\r\n\t\x00"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800 \u2028 \u202e \x9b", r"\ud800 \u2028 \u202e \x9b"),
    ],
)
def test_text_is_made_printable(text, shown):
    assert printable(text) == (shown or text)
    printable(text).encode()
