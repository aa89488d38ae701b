"""One preparation of images: what training saw is what prediction, merging and the command line see."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from typer.testing import CliRunner

from subtuning_lab import Recipe, Split, Study, TunedTask, load_backbone, load_task, load_tuned, merge_tasks, optimize
from subtuning_lab.cli.main import app
from subtuning_lab.data.images import StreamedImages
from tests.helpers import tiny_chain
from tests.inference.test_merge import tuned

FIXTURES = Path(__file__).parents[1] / "fixtures"
BYTES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def wide_images(folder, n: int = 12):
    """Photographs of 96 x 32 whose class is told by a colour at the far left, which a centre crop cuts off."""
    draws = np.random.default_rng(0)
    for split, name, i in ((s, c, i) for s in ("train", "test") for c in ("red", "blue") for i in range(n)):
        image = draws.integers(90, 160, (32, 96, 3), dtype=np.uint8)
        image[:, :30] = (255, 0, 0) if name == "red" else (0, 0, 255)
        path = folder / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A task on images that training squashes to a third of their width, and its file."""
    folder = tmp_path_factory.mktemp("wide")
    task = load_task(wide_images(folder / "data"), progress=False)
    recipe = Recipe(epochs=12, lr=3e-3, batch_size=8, image_size=32)
    study = Study(load_backbone("lab-resnet"), task, recipe, folds=2, device="cpu", progress=False)
    tuned = study.fit([study.block_names[0]])
    return folder, task, tuned, tuned.save(folder / "wide.safetensors")


def test_what_training_squashed_is_squashed_everywhere(wide):
    folder, task, tuned, file = wide
    assert task.image_size == (32, 96) == tuned.crop_size and tuned.pixels == (32, 32)
    assert tuned.accuracy(task.test) == 1.0
    paths = sorted((folder / "data" / "test").rglob("*.png"))
    labels = [task.classes.index(path.parent.name) for path in paths]
    assert tuned.predict(paths).argmax(1).tolist() == labels
    loaded = load_tuned(file, load_backbone("lab-resnet"))
    assert loaded.preparation == tuned.preparation
    assert loaded.predict([str(path) for path in paths]).equal(tuned.predict(paths))
    merged = merge_tasks(loaded.backbone, {"colour": loaded}, keep_original=False)
    assert merged(merged.prepare(paths))["colour"].argmax(1).tolist() == labels
    options = [text for path in paths for text in ("--image", str(path))]
    run = CliRunner().invoke(app, ["merge", str(file), *options, "--json"])
    answers = json.loads(run.stdout)["answers"]
    assert [row["answer"] for row in answers] == [path.parent.name for path in paths]
    cropped = [v2.functional.center_crop(torch.from_numpy(np.array(Image.open(p))).movedim(2, 0), 32) for p in paths]
    assert (tuned.network()(torch.stack(cropped)).argmax(1) == torch.tensor(labels)).double().mean() < 0.8


def test_images_of_every_layout_give_the_same(tmp_path):
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 8))
    expected = task.predict(BYTES)
    paths = []
    for i, image in enumerate(BYTES):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image.movedim(0, 2).numpy()).save(paths[-1])
    same = [BYTES.numpy(), BYTES.movedim(1, 3), BYTES.movedim(1, 3).numpy(), paths, tuple(map(str, paths))]
    for images in (*same, StreamedImages(paths, (8, 8)), StreamedImages(paths, (99, 99))):
        assert torch.allclose(task.predict(images, batch_size=2), expected, atol=1e-6)
    for images in (BYTES / 255, (BYTES / 255).double(), (BYTES / 255).numpy(), (BYTES.movedim(1, 3) / 255).numpy()):
        assert torch.allclose(task.predict(images), expected, atol=1e-6)
    for image in (BYTES[0], BYTES[0].movedim(0, 2).numpy(), paths[0], str(paths[0])):
        assert torch.allclose(task.predict(image), expected[:1], atol=1e-6)
    with pytest.warns(UserWarning, match=r"\(3, 8, 8\) are taken for one RGB image; .*for 3 grey images\[:, None\]"):
        task.predict(BYTES[0])
    grey = BYTES[:, :1]
    assert torch.equal(task.predict(grey), task.predict(grey.expand(-1, 3, -1, -1)))


def test_images_of_another_size_are_scaled_and_cropped_as_torchvision_does():
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 8))
    large = torch.randint(0, 256, (3, 3, 16, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    reference = v2.Compose([v2.Resize(8), v2.CenterCrop(8)])
    expected = [reference(Image.fromarray(image.movedim(0, 2).numpy())) for image in large]
    expected = torch.stack([torch.from_numpy(np.array(image)).movedim(2, 0) for image in expected])
    assert torch.equal(task.prepare(large), expected)
    assert torch.equal(task.predict(large), task.predict(expected))
    assert task.accuracy(Split(large, torch.tensor([0, 1, 2]))) == task.accuracy(
        Split(expected, torch.tensor([0, 1, 2]))
    )
    unknown = tuned(tiny_chain(), ["block1"])  # nothing tells what it was trained on
    assert torch.equal(unknown.prepare(large), large)


REFUSED = {
    "bytes as floats": (BYTES.float(), ValueError, r"images\[0\].*outside \[0, 1\]: 0 to 255"),
    "normalized": ((BYTES / 255 - 0.5) / 0.25, ValueError, r"outside \[0, 1\]: -2 to 2"),
    "not a number": (torch.full((2, 3, 8, 8), torch.nan), ValueError, r"images\[0\].*NaN"),
    "whole numbers": (BYTES.long(), TypeError, "must be uint8, or floating point .*int64"),
    "truths": (BYTES > 9, TypeError, "bool"),
    "four channels": (torch.rand(2, 4, 8, 8), ValueError, r"\(2, 4, 8, 8\)"),
    "two axes": (torch.rand(8, 8), ValueError, r"\(8, 8\)"),
    "grey without an axis": (torch.rand(2, 8, 8), ValueError, r"one image with 3 channels; got \(2, 8, 8\)"),
}
IN_MEMORY = {
    "no images": (torch.rand(0, 3, 8, 8), ValueError, "none empty"),
    "no paths": ([], ValueError, "at least one path"),
    "a list of arrays": ([np.zeros((8, 8, 3))], TypeError, "it must hold paths"),
    "nothing": (None, TypeError, "NoneType"),
    "a missing file": ("none.png", FileNotFoundError, "none.png"),
    "text": (np.array(["a"]), TypeError, "<U1"),
    "a sparse tensor": (torch.rand(2, 3, 8, 8).to_sparse(), TypeError, "dense tensor, got torch.sparse_coo"),
    "a tensor without data": (torch.rand(2, 3, 8, 8, device="meta"), TypeError, "dense tensor, got no data"),
    "complex numbers": (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), TypeError, "complex64"),
    "an opened file": (Image.new("RGB", (8, 8)), TypeError, "got Image"),
}


@pytest.mark.parametrize("case", [*REFUSED, *IN_MEMORY])
def test_images_that_could_be_misread_are_refused(case):
    images, error, message = (REFUSED | IN_MEMORY)[case]
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 8))
    with pytest.raises(error, match=message):
        task.predict(images)
    if case in REFUSED:
        network, merged = task.network(), merge_tasks(task.backbone, {"a": task})
        message = r"\(batch, 3, height, width\), got" if images.dim() < 4 else message
        for net in (network, merged):
            with pytest.raises(error, match=message):
                net(images)


def test_networks_warn_once_of_images_of_another_shape():
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 16), image_size=12)
    for net in (task.network(), merge_tasks(task.backbone, {"a": task})):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for size in ((8, 16), (16, 32), (12, 12)):  # its own, as wide, already squashed
                net(torch.rand(2, 3, *size))
        with pytest.warns(UserWarning, match="images are 10 x 10, those of training were 8 x 16; prepare"):
            net(torch.rand(2, 3, 10, 10))


def test_resizing_may_leave_a_hair_outside_the_range():
    task = tuned(tiny_chain(), ["block1"])
    white = torch.ones(1, 3, 8, 8)
    assert torch.allclose(task.network()(white * (1 + 1e-6)), task.network()(white), atol=1e-4)


def test_merged_tasks_must_be_prepared_alike():
    chain = tiny_chain()
    wide, square, small = (
        tuned(chain, ["block1"], image_size=12, crop_size=size) for size in ((8, 16), (16, 16), (8, 8))
    )
    merged = merge_tasks(chain, {"small": small, "square": square})
    assert merged.preparation.crop_size == (16, 16) and merged.preparation.other_sizes == ((8, 8),)
    with pytest.raises(ValueError, match='"wide" has images of height / width 0.5, task "small" has .* 1.0; merged'):
        merge_tasks(chain, {"wide": wide, "small": small})


def test_merged_tasks_of_images_of_several_sizes_tell_whose_answers_differ(tmp_path):
    chain = tiny_chain()
    small, large = (tuned(chain, ["block1"], image_size=12, crop_size=size) for size in ((8, 8), (16, 16)))
    merged = merge_tasks(chain, {"small": small, "large": large}, keep_original=False)
    wide = torch.randint(0, 256, (2, 3, 16, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "wide.png"
    Image.fromarray(wide[0].movedim(0, 2).numpy()).save(file)
    for images in (wide, file, StreamedImages([file], (20, 20))):
        with pytest.warns(UserWarning, match="are cut to 16 x 16 for all merged tasks; tasks that cut them to 8 x 8"):
            shares = {name: logits.softmax(-1) for name, logits in merged(merged.prepare(images)).items()}
        assert torch.allclose(shares["large"], large.predict(images), atol=1e-6)
        assert not torch.allclose(shares["small"], small.predict(images), atol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged.prepare(file, (8, 8))  # one's own choice
        outputs = merged(merged.prepare(wide[:, :, :12, :12]))  # what no task would cut
        for name, task in {"small": small, "large": large}.items():
            assert torch.allclose(outputs[name].softmax(-1), task.predict(wide[:, :, :12, :12]), atol=1e-6)
        alike = merge_tasks(chain, {"a": small, "b": tuned(chain, ["block2"], image_size=12, crop_size=(8, 8))})
        assert torch.equal(alike.prepare(file), small.prepare(file))


@pytest.mark.parametrize("image_size", [12, None])
def test_files_are_not_cut_in_silence_where_nothing_tells_how_training_cut(image_size, tmp_path):
    task, files = tuned(tiny_chain(), ["block1"], image_size=image_size), {}
    side = 12 if image_size else 8
    for width in (side, 2 * side, 3 * side):
        files[width] = tmp_path / f"{width}.png"
        Image.new("RGB", (width, side)).save(files[width])
    with pytest.warns(UserWarning, match=rf"crop_size is None.*: {2 * side}.png of {side} x {2 * side} is cut to"):
        task.predict(list(files.values()))
    wide = torch.zeros(1, 3, side, 2 * side, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.predict(files[side])
        assert torch.equal(task.prepare(wide), wide)  # arrays stay as they are
        replace(task, crop_size=(side, 2 * side)).predict(list(files.values()))


@pytest.mark.parametrize("images", [BYTES.numpy(), StreamedImages(BYTES.movedim(1, 3).numpy(), (8, 8)), [1, 2], None])
def test_networks_take_nothing_but_tensors(images):
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 8))
    for net in (task.network(), merge_tasks(task.backbone, {"a": task}), optimize(task.network())):
        with pytest.raises(TypeError, match=r"images is .*; it must be a tensor \(batch, 3, height, width\); see"):
            net(images)


def test_tasks_without_a_record_keep_their_old_meaning(tmp_path):
    chain = tiny_chain()
    path = tmp_path / "i.png"
    Image.fromarray(BYTES[0].movedim(0, 2).numpy()).save(path)
    for options, size in (
        ({"provenance": {"pixels": [6, 10]}}, (6, 10)),
        ({"image_size": 12, "provenance": {"pixels": [12, 12]}}, (12, 12)),
        ({}, chain.input_size[1:]),
    ):
        assert tuned(chain, [], **options).prepare(path).shape == (1, 3, *size)


def test_the_first_releases_file_gives_its_accuracy():
    loaded = load_tuned(FIXTURES / "probe_of_0.1.0.safetensors", load_backbone("lab-resnet"))
    task = load_task("digits", train_size=60, seed=0, progress=False)
    assert loaded.blocks == frozenset() and loaded.accuracy(task.test) == 0.15558343789209536
    assert isinstance(loaded, TunedTask) and loaded.preparation.crop_size == (32, 32)
