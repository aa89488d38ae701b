"""Tuned tasks: what is saved is what was tuned, and a file that isn't that is refused."""

import json
import os
import pickle

import pytest
import torch
from conftest import tiny_chain, tiny_task
from safetensors import safe_open
from safetensors.torch import save_file

from subtuning_lab.deltas import load_tuned
from subtuning_lab.recipe import Recipe
from subtuning_lab.study import Study

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tune(blocks, chain=None, **recipe):
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-2, **recipe)
    return Study(chain or tiny_chain(), tiny_task(), recipe, folds=2, device="cpu", progress=False).fit(blocks)


@pytest.fixture(scope="module")
def tuned():
    return tune(["block1", "block3"])


@pytest.fixture
def file(tuned, tmp_path):
    return tuned.save(tmp_path / "deep" / "er" / "t.safetensors")


@pytest.mark.parametrize("blocks", [[], ["block2"], ["stem", "tail"], "all"])
def test_what_is_loaded_computes_what_was_saved(blocks, tmp_path):
    tuned = tune(blocks, image_size=12)
    loaded = load_tuned(str(tuned.save(str(tmp_path / "t.safetensors"))), tiny_chain())
    with torch.no_grad():
        assert torch.equal(loaded.network()(IMAGES), tuned.network()(IMAGES))
    assert (loaded.blocks, loaded.classes, loaded.image_size) == (tuned.blocks, tuned.classes, 12)
    assert loaded.provenance == json.loads(json.dumps(tuned.provenance))
    assert loaded.provenance["recipe"]["image_size"] == 12 and loaded.provenance["n_train"] == 24
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_predictions_are_probabilities_of_bytes_and_floats_alike(tuned):
    probabilities = tuned.predict(IMAGES, batch_size=2)
    assert probabilities.shape == (5, 3) and torch.allclose(probabilities.sum(1), torch.ones(5))
    assert torch.allclose(tuned.predict(IMAGES.float() / 255), probabilities, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(tuned.network()(IMAGES).softmax(1), probabilities, atol=1e-6)


def test_a_tuned_network_is_frozen_and_leaves_the_backbone_alone(tuned):
    network = tuned.network().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert not any(p.requires_grad for p in network.parameters())
    network(IMAGES)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert tuned.backbone.fingerprint == tiny_chain().fingerprint
    assert not torch.equal(network.backbone.part("block1").conv.weight, tuned.backbone.part("block1").conv.weight)
    assert torch.equal(network.backbone.part("block2").conv.weight, tuned.backbone.part("block2").conv.weight)


def test_the_file_holds_the_tuned_part_only(tuned, file):
    with safe_open(file, framework="pt") as content:
        names = set(content.keys())
    block = {"conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert names == {f"{b}|{key}" for b in ("block1", "block3") for key in block} | {"head|weight", "head|bias"}
    size = 4 * (2 * (6 * 6 * 9 + 4 * 6) + 6 * 3 + 3) + 2 * 8
    assert size < file.stat().st_size < size + 4000  # the rest is the header


def test_another_backbone_is_refused(file):
    with pytest.raises(ValueError, match=r"tuned from tiny with fingerprint [0-9a-f]{12}; this backbone is tiny with"):
        load_tuned(file, tiny_chain(seed=1))
    chain = tiny_chain()
    chain.blocks[1].bn.running_var[0] += 1e-3  # a block that was not tuned
    with pytest.raises(ValueError, match="fingerprint"):
        load_tuned(file, chain)
    with pytest.raises(TypeError, match="backbone is a str"):
        load_tuned(file, "tiny")


def rewrite(path, change):
    with safe_open(path, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
        header = content.metadata()
    change(tensors, header)
    save_file(tensors, path, metadata=header or None)


EDITS = {
    "no header": (lambda t, h: h.clear(), "holds no tuned task"),
    "another format": (lambda t, h: h.update(format="x"), "'x'"),
    "no base": (lambda t, h: h.pop("base"), "lacks base"),
    "no classes": (lambda t, h: h.pop("classes"), "lacks classes"),
    "another base": (lambda t, h: h.update(base="0" * 64), "000000000000"),
    "an unknown block": (lambda t, h: h.update(blocks='["block9"]'), "block9"),
    "fewer blocks": (lambda t, h: h.update(blocks='["block1"]'), "block3"),
    "more blocks": (lambda t, h: h.update(blocks='["block1", "block2", "block3"]'), "block2"),
    "blocks that are no list": (lambda t, h: h.update(blocks='"all"'), "blocks"),
    "more classes": (
        lambda t, h: h.update(classes='["a", "b", "c", "d"]'),
        r"\(3, 6\), expected \(4, 6\)|\(3,\), expected \(4,\)",
    ),
    "no JSON": (lambda t, h: h.update(provenance="{"), "provenance"),
    "a size that is none": (lambda t, h: h.update(image_size='"big"'), "image_size"),
    "a missing tensor": (lambda t, h: t.pop("block1|bn.running_mean"), "bn.running_mean of block1"),
    "a missing readout": (lambda t, h: (t.pop("head|weight"), t.pop("head|bias")), "of head"),
    "another tensor": (lambda t, h: t.update({"block1|new": torch.zeros(1)}), "new of block1"),
    "another shape": (lambda t, h: t.update({"block1|bn.bias": torch.zeros(5)}), r"bn.bias of block1 is \(5,\)"),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
def test_edited_files_are_refused(file, change, message):
    rewrite(file, lambda tensors, header: None)
    assert load_tuned(file, tiny_chain()).blocks == {"block1", "block3"}
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_tuned(file, tiny_chain())


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_damaged_files_are_refused_and_nothing_is_unpickled(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    content = file.read_bytes()
    for damaged in (content[:-40], content[:50], b"", b"\xff" * len(content), pickle.dumps(Exploit())):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t.safetensors is not a readable .safetensors file"):
            load_tuned(file, tiny_chain())
    torch.save(Exploit(), file)
    with pytest.raises(ValueError, match="not a readable"):
        load_tuned(file, tiny_chain())
    assert os.listdir() == ["t.safetensors"]


def test_missing_files_and_other_names_are_refused(tuned, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_tuned(tmp_path / "none.safetensors", tiny_chain())
    with pytest.raises(ValueError, match=r'"t.pth"; a tuned task is a .safetensors file'):
        tuned.save("t.pth")
    assert os.listdir(tmp_path) == []
