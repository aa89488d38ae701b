"""Procedurally generated images: shapes, seeds, balance, and masks that mean what their labels say."""

import math

import pretrain
import pretraining_images
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from subtuning_lab.data import synthetic

CLASSES = {"source": 40, "glyphs": 20, "count": 6, "position": 8, "pretraining": 100}
TOUCHING = torch.ones(3, 3).numpy()  # pixels that share a corner belong together


def images_of(kind: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        pretraining_images.source_images(n, seed)
        if kind == "pretraining"
        else synthetic.synthetic_images(kind, n, seed)
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_images_are_uint8_rgb_and_labels_cover_all_classes(kind: str) -> None:
    images, labels = images_of(kind, 2 * CLASSES[kind], seed=0)
    assert images.shape == (2 * CLASSES[kind], 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(CLASSES[kind]))
    assert images.float().std(dim=(2, 3)).amax(dim=1).min() > 2  # nothing is blank


@pytest.mark.parametrize("kind", CLASSES)
def test_the_seed_alone_decides(kind: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    images, labels = images_of(kind, 300, seed=4)  # more than one chunk
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    again_images, again_labels = images_of(kind, 300, seed=4)
    assert torch.equal(images, again_images)
    assert torch.equal(labels, again_labels)
    other_images, other_labels = images_of(kind, 300, seed=5)
    assert (images != other_images).float().mean() > 0.9
    assert not torch.equal(labels, other_labels)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), n_classes=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_labels_are_balanced(n: int, n_classes: int, seed: int) -> None:
    labels = synthetic.balanced_labels(n, n_classes, torch.Generator().manual_seed(seed))
    counts = labels.bincount(minlength=n_classes)
    assert counts.sum() == n
    assert len(counts) == n_classes
    assert counts.max() - counts.min() <= 1


def test_labels_are_shuffled() -> None:
    _, labels = synthetic.synthetic_images("count", 600, seed=0)
    assert labels[:100].bincount(minlength=6).min() > 5
    assert not torch.equal(labels[:6], labels[6:12]) or not torch.equal(labels[6:12], labels[12:18])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_count_masks_have_as_many_parts_as_the_label_says(seed: int) -> None:
    labels = torch.arange(60) % 6
    masks = synthetic.count_masks(labels, torch.Generator().manual_seed(seed))
    for mask, label in zip(masks, labels, strict=True):
        _, parts = ndimage.label((mask > 0.5).numpy(), structure=TOUCHING)
        assert parts == label + 1


def test_position_masks_show_the_disc_in_the_direction_of_the_label() -> None:
    labels = torch.arange(400) % 8
    masks = synthetic.position_masks(labels, torch.Generator().manual_seed(0))
    clear = 0
    for mask, label in zip(masks, labels, strict=True):
        parts, n_parts = ndimage.label((mask > 0.5).numpy(), structure=TOUCHING)
        assert n_parts == 2
        boxes = ndimage.find_objects(parts)
        full = [bool((parts[box] == part).all()) for part, box in enumerate(boxes, start=1)]
        assert any(full), "a square fills its bounding box"
        if sum(full) == 1:  # a very small disc can fill its box, too: then nobody can tell
            clear += 1
            square = full.index(True) + 1
            (y0, x0), (y1, x1) = ndimage.center_of_mass(parts > 0, parts, [square, 3 - square])
            direction = math.atan2(y1 - y0, x1 - x0) / (math.pi / 4)
            assert round(direction) % 8 == label
    assert clear > 350


def test_masks_stay_between_zero_and_one() -> None:
    generator = torch.Generator().manual_seed(0)
    points, maps = synthetic.glyph_control_points(5, 0), pretraining_images.fractal_maps(5, 0)
    masks = [
        synthetic.glyph_masks(torch.arange(5), points, generator),
        pretraining_images.fractal_masks(torch.arange(5), maps, generator),
        pretraining_images.polygon_masks(torch.arange(16), generator),
        pretraining_images.texture_masks(torch.arange(16), generator),
    ]
    for mask in masks:
        assert mask.shape[1:] == (32, 32)
        assert mask.min() >= 0
        assert mask.max() <= 1
        assert mask.std(dim=(1, 2)).min() > 0.01


def test_outlined_polygons_are_hollow() -> None:
    """Labels 4 to 7 are the outlines of 0 to 3: with the same numbers drawn, they lie inside and leave a hole."""
    filled = pretraining_images.polygon_masks(torch.arange(4), torch.Generator().manual_seed(3))
    outlined = pretraining_images.polygon_masks(torch.arange(4, 8), torch.Generator().manual_seed(3))
    assert ((filled > 0.5) | (outlined < 0.5)).all()
    for shape, ring in zip(filled > 0.5, outlined > 0.5, strict=True):
        assert ndimage.label(shape.numpy(), structure=TOUCHING)[1] == 1
        assert ndimage.binary_fill_holes(ring.numpy()).sum() > ring.sum()


def test_fractal_classes_are_contractions() -> None:
    maps = pretraining_images.fractal_maps(28, seed=2)
    assert torch.linalg.matrix_norm(maps.linear, ord=2).max() < 0.8501
    with pytest.raises(ValueError, match="shapes do not fit"):
        pretraining_images.FractalMaps(maps.linear, maps.offset[:3])


def test_shape_and_background_differ_in_luminance() -> None:
    generator = torch.Generator().manual_seed(0)
    halves = torch.zeros(500, 32, 32)
    halves[:, :, 16:] = 1
    images = synthetic.paint(halves, generator).float() / 255
    luminance = torch.einsum("nchw,c->nhw", images, torch.tensor(synthetic.LUMINANCE))
    contrast = (luminance[:, :, 16:].mean(dim=(1, 2)) - luminance[:, :, :16].mean(dim=(1, 2))).abs()
    assert contrast.median() > synthetic.MIN_CONTRAST
    assert contrast.min() > 0.15  # the smooth pattern may lower it a little


def test_every_class_has_its_own_name() -> None:
    names = {kind: classes for kind, (classes, _) in synthetic.KINDS.items()}
    names["pretraining"] = pretraining_images.class_names()
    assert {kind: len(set(classes)) for kind, classes in names.items()} == CLASSES
    assert names["pretraining"][:40] == names["source"]


def test_pretraining_augmentation_shifts_and_inverts() -> None:
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 200
    augmented = pretrain.augment(images, torch.Generator().manual_seed(0))
    inverted = augmented[:, 0, 0, 0] == 255
    assert 0.2 < inverted.float().mean() < 0.4
    upright = torch.where(inverted[:, None, None, None], 255 - augmented, augmented)
    assert upright.flatten(1).sum(dim=1).eq(3 * 200).all()  # the one bright pixel is still there, in every channel
    position = upright[:, 0].flatten(1).argmax(dim=1)
    assert set((position // 32).tolist()) == set((position % 32).tolist()) == set(range(13, 20))


def test_pretraining_recipe_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="precision.*'float32'.*'int8'"):
        pretrain.PretrainingRecipe(epochs=1, images=1000, lr=1e-3, precision="int8")
    with pytest.raises(ValueError, match="images.*5"):
        pretrain.PretrainingRecipe(epochs=1, images=5, lr=1e-3)
