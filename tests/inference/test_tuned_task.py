"""Tuned tasks: what is saved is what was tuned, and a file that isn't that is refused."""

import copy
import dataclasses
import json
import os
import pickle
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from subtuning_lab import Chain, Recipe, Study, TunedTask, load_tuned, set_trainable
from subtuning_lab.inference.checkpoint import HEADER, checksum, read_task
from tests.helpers import tiny_chain, tiny_task

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
    assert loaded.pixels == (12, 12) == tuple(loaded.provenance["pixels"])
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


def test_the_size_table_counts_the_file_by_hand(tuned, file):
    table, half = tuned.size_table(), tuned.size_table("float16")
    assert list(table.index) == ["stem", "block1", "block2", "block3", "tail", "head"]
    block, stem = 6 * 6 * 9 + 4 * 6, 3 * 6 * 9 + 4 * 6
    assert table["tuned"].tolist() == [False, True, False, True, False, True]
    assert table["values"].tolist() == [0, block + 1, 0, block + 1, 0, 21]
    assert table["saved_bytes"].tolist() == [0, 4 * block + 8, 0, 4 * block + 8, 0, 84]
    assert table["backbone_bytes"].tolist() == [4 * stem + 8, *[4 * block + 8] * 3, 48, 0]
    assert half["saved_bytes"].tolist() == [0, 2 * block + 8, 0, 2 * block + 8, 0, 42]
    assert 0 < file.stat().st_size - table["saved_bytes"].sum() < 4000


def test_equal_tasks_give_equal_bytes_that_others_may_read(tuned, tmp_path):
    first, second = tuned.save(tmp_path / "1.safetensors"), tuned.save(tmp_path / "2.safetensors")
    assert first.read_bytes() == second.read_bytes()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(first.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bit_comes_back(dtype, tmp_path):
    tuned = tune(["block2"], tiny_chain(dtype=dtype))
    loaded = load_tuned(tuned.save(tmp_path / "t.safetensors"), tiny_chain(dtype=dtype))
    for part, state in tuned.weights.items():
        for key, tensor in state.items():
            assert loaded.weights[part][key].dtype == tensor.dtype and torch.equal(loaded.weights[part][key], tensor)
    assert tuned.weights["block2"]["bn.num_batches_tracked"] > 0
    assert not torch.equal(tuned.weights["block2"]["bn.running_var"], tiny_chain().blocks[1].bn.running_var.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_precision_rounds_to_11_bits_and_leaves_counters_alone(dtype, tmp_path):
    tuned = tune(["block2"], tiny_chain(dtype=dtype))
    path = tuned.save(tmp_path / "t.safetensors", dtype="float16")
    assert read_task(path)[0]["dtype"] == "float16"
    with safe_open(path, framework="pt") as content:
        kinds = {name: content.get_tensor(name).dtype for name in content.keys()}  # noqa: SIM118 - not a mapping
    assert kinds.pop("block2|bn.num_batches_tracked") == torch.int64 and set(kinds.values()) == {torch.float16}
    loaded = load_tuned(path, tiny_chain(dtype=dtype))
    for part, state in tuned.weights.items():
        for key, tensor in state.items():
            back = loaded.weights[part][key]
            error = (back - tensor).abs()
            assert back.dtype == tensor.dtype and (error <= tensor.abs() * 2**-11 + 2**-25).all()
    assert not torch.equal(loaded.weights["head"]["weight"], tuned.weights["head"]["weight"])
    assert torch.allclose(loaded.predict(IMAGES), tuned.predict(IMAGES), atol=0.01)


def changed(tuned, part, key, change):
    """The task with one tensor put through a function."""
    state = tuned.weights[part]
    return dataclasses.replace(tuned, weights={**tuned.weights, part: {**state, key: change(state[key])}})


def test_numbers_that_half_precision_cannot_hold_are_refused(tuned, tmp_path):
    large = changed(tuned, "block3", "bn.running_var", lambda t: torch.full_like(t, -7e4))
    with pytest.raises(ValueError, match=r"bn.running_var of block3 holds 70000, and float16 ends at 65504"):
        large.save(tmp_path / "t.safetensors", "float16")
    assert os.listdir(tmp_path) == []
    fits = changed(tuned, "block3", "bn.running_var", lambda t: torch.full_like(t, 65504.0))
    assert (
        load_tuned(fits.save(tmp_path / "t.safetensors", "float16"), tiny_chain())
        .weights["block3"]["bn.running_var"]
        .tolist()
        == [65504.0] * 6
    )
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of None, float16"):
        tuned.save(tmp_path / "u.safetensors", "int8")


def test_a_float64_network_computes_with_the_readouts_own_weights():
    tuned = tune(["block2"], tiny_chain(dtype=torch.float64))
    assert all(torch.equal(t, tuned.weights["head"][key]) for key, t in tuned.network().head.state_dict().items())


# ---------------------------------------------------------------- Siamese readouts


class InPlace(nn.Module):
    """A block that overwrites its input, as pre-activation networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x.relu_().add_(1)))


def in_place_chain() -> Chain:
    plain = tiny_chain()
    torch.manual_seed(0)
    chain = Chain(plain.stem, [InPlace() for _ in range(3)], plain.tail, 6, input_size=(3, 8, 8), name="in place")
    return chain


def siamese(chain, blocks, dtype=torch.float32):
    """A Siamese task whose blocks are far from the pretrained ones."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: {
            key: t if t.dtype == torch.int64 else t + torch.rand(t.shape, generator=generator).to(t) / 2
            for key, t in chain.part(name).state_dict().items()
        }
        for name in blocks
    }
    weights["head"] = {
        "weight": torch.randn(3, 12, generator=generator).to(dtype),
        "bias": torch.randn(3, generator=generator).to(dtype),
    }
    return TunedTask(chain, frozenset(blocks), weights, ("a", "b", "c"), siamese=True)


def siamese_reference(task, images):
    """Two whole chains and the readout, written out."""
    frozen, tuned = (set_trainable(copy.deepcopy(task.backbone), []).eval() for _ in range(2))
    for name in task.blocks:
        tuned.part(name).load_state_dict(task.weights[name])
    x = frozen.normalize(images.to(frozen.mean.dtype) / 255)
    with torch.no_grad():
        features = torch.cat([frozen(x.clone()), tuned(x.clone())], dim=1)
        return features @ task.weights["head"]["weight"].T + task.weights["head"]["bias"]


@pytest.mark.parametrize("make", [tiny_chain, in_place_chain])
@pytest.mark.parametrize("blocks", [[], ["block2"], ["stem", "block3"], ["tail"], ["block1", "block2", "block3"]])
def test_a_siamese_readout_sees_frozen_features_then_tuned_ones(make, blocks):
    task = siamese(make().double(), blocks, torch.float64)
    with torch.no_grad():
        logits = task.network()(IMAGES)
    assert torch.allclose(logits, siamese_reference(task, IMAGES), atol=1e-12)
    assert logits.shape == (5, 3)


def test_a_siamese_task_trained_by_the_study_comes_back(tmp_path):
    tuned = tune(["block2"], siamese=True)
    assert tuned.siamese and tuned.weights["head"]["weight"].shape == (3, 12)
    loaded = load_tuned(tuned.save(tmp_path / "t.safetensors"), tiny_chain())
    assert loaded.siamese and read_task(tmp_path / "t.safetensors")[0]["siamese"] is True
    with torch.no_grad():
        assert torch.equal(loaded.network()(IMAGES), tuned.network()(IMAGES))
    with pytest.raises(ValueError, match=r"weight of head is \(3, 12\) float32, expected \(3, 6\) float32"):
        dataclasses.replace(tuned, siamese=False)


def test_a_siamese_network_never_drifts_and_holds_frozen_parts_once():
    task = siamese(tiny_chain(), ["block2"])
    network = task.network()
    before, expected = {k: v.clone() for k, v in network.state_dict().items()}, siamese_reference(task, IMAGES)
    for module in network.train().modules():
        module.training = True
    with torch.no_grad():
        logits = network(IMAGES)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())
    chain = tiny_chain()
    once = sum(p.numel() for p in chain.parameters()) + sum(p.numel() for p in chain.part("block2").parameters())
    assert sum(p.numel() for p in network.parameters()) == once + 3 * 12 + 3


def test_what_comes_before_the_first_tuned_part_runs_once():
    network = siamese(tiny_chain(), ["block3"]).network()
    calls = []
    for name, part in zip(network.backbone.part_names, network.backbone.parts, strict=True):
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(IMAGES)
    # of block3 the frozen one is another module, without the hook
    assert calls == ["stem", "block1", "block2", "tail", "block3", "tail"]


# ---------------------------------------------------------------- what a task says of itself


def test_a_task_tells_what_it_is(tuned):
    assert tuned.pixels == (8, 8) and dataclasses.replace(tuned, provenance={}, crop_size=None).pixels is None
    assert str(tuned) == "tiny on tiny: block1, block3 tuned, readout of 3 classes; no scores"
    scored = dataclasses.replace(siamese(tiny_chain(), []), scores={"test accuracy": 0.91234, "n": 500})
    assert str(scored).endswith("no block tuned, Siamese readout of 3 classes; test accuracy 0.912, n 500")


def test_numbers_of_numpy_are_saved_as_plain_ones(tuned, tmp_path):
    scores = {"n": np.int64(12), "share": np.float32(0.25), "of": np.float64(1 / 3), "one": 1}
    sizes = {"image_size": np.int64(8), "crop_size": [np.int64(9), np.int64(7)], "head_depth": np.int32(1)}
    task = dataclasses.replace(tuned, scores=scores, **sizes)
    loaded = load_tuned(task.save(tmp_path / "t.safetensors"), tiny_chain())
    assert loaded.scores == {"n": 12, "share": 0.25, "of": 1 / 3, "one": 1} == task.scores
    assert [type(value) for value in loaded.scores.values()] == [int, float, float, int]
    assert (loaded.image_size, loaded.crop_size, loaded.head_depth) == (8, (9, 7), 1)


def test_scores_and_normalization_are_in_the_file(tuned, tmp_path):
    scores = {"fold accuracy": 0.25, "test accuracy": 1 / 3, "n": 12}
    path = dataclasses.replace(tuned, scores=scores).save(tmp_path / "t.safetensors")
    header, _ = read_task(path)
    assert list(load_tuned(path, tiny_chain()).scores.items()) == list(scores.items())  # in their order, too
    assert header["mean"] == torch.tensor([0.485, 0.456, 0.406]).tolist() and header["input_size"] == [3, 8, 8]
    assert header["versions"]["torch"] == version("torch") and header["blocks"] == ["block1", "block3"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"blocks": frozenset({"block9"})}, ValueError, "tiny has no block block9"),
        ({"blocks": frozenset({"block1"})}, ValueError, "of block3 is"),
        ({"classes": ("a", "b")}, ValueError, r"\(3,\) float32, expected \(2,\) float32"),
    ],
)
def test_a_task_that_is_not_whole_is_refused(tuned, values, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(tuned, **values)


def test_weights_of_another_dtype_are_refused(tuned):
    with pytest.raises(ValueError, match=r"conv.weight of block1 is \(6, 6, 3, 3\) float64, expected .* float32"):
        changed(tuned, "block1", "conv.weight", torch.Tensor.double)


def test_provenance_that_is_no_plain_value_is_refused(tuned, tmp_path):
    for value in (torch.zeros(1), float("inf")):
        with pytest.raises(ValueError, match="plain finite values only"):
            dataclasses.replace(tuned, provenance={"x": value}).save(tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- files that are refused


def test_another_backbone_is_refused(file):
    with pytest.raises(ValueError, match=r"tuned from tiny with fingerprint [0-9a-f]{12}; this backbone is tiny with"):
        load_tuned(file, tiny_chain(seed=1))
    chain = tiny_chain()
    chain.blocks[1].bn.running_var[0] += 1e-3  # a block that was not tuned
    with pytest.raises(ValueError, match="fingerprint"):
        load_tuned(file, chain)
    with pytest.raises(ValueError, match="fingerprint"):
        load_tuned(file, tiny_chain(dtype=torch.float64))
    with pytest.raises(TypeError, match="backbone is 'tiny'"):
        load_tuned(file, "tiny")


def test_another_normalization_is_refused_by_name(file):
    chain = tiny_chain()
    chain.std += 0.25
    with pytest.raises(ValueError, match=r"its std is \[0.229\d*, .*\], this backbone's \[0.479"):
        load_tuned(file, chain)


def rewrite(path, change, sign=True):
    """Edits a file's tensors and header; signed, it is as if `save` had written it so."""
    with safe_open(path, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
        header = json.loads(content.metadata()["tuned_task"])
    change(tensors, header)
    if sign and "sha256" in header:
        header["sha256"] = checksum({k: v for k, v in header.items() if k != "sha256"}, tensors)
    text = json.dumps(header, separators=(",", ":"))
    save_file(tensors, path, metadata={"tuned_task": text} if header else None)


EDITS = {
    "no header": (lambda t, h: h.clear(), "holds no tuned task"),
    "another format": (lambda t, h: h.update(format="x"), "'x'"),
    "the format before": (lambda t, h: h.update(format="subtuning-lab tuned task 1"), "tuned task 1', not .*task 4"),
    "no base": (lambda t, h: h.pop("base"), "lacks base"),
    "no classes": (lambda t, h: h.pop("classes"), "lacks classes"),
    "no checksum": (lambda t, h: h.pop("sha256"), "lacks sha256"),
    "another base": (lambda t, h: h.update(base="0" * 64), "000000000000"),
    "another normalization": (lambda t, h: h.update(mean=[0, 0, 0]), r"its mean is \[0, 0, 0\], this"),
    "an unknown block": (lambda t, h: h.update(blocks=["block9"]), "block9"),
    "fewer blocks": (lambda t, h: h.update(blocks=["block1"]), "block3"),
    "more blocks": (lambda t, h: h.update(blocks=["block1", "block2", "block3"]), "block2 is missing"),
    "blocks that are no list": (lambda t, h: h.update(blocks="all"), "blocks"),
    "blocks that are no names": (lambda t, h: h.update(blocks=[["block1"]]), "blocks"),
    "more classes": (lambda t, h: h.update(classes=["a", "b", "c", "d"]), r"\(3,\) float32, expected \(4,\)"),
    "a size that is none": (lambda t, h: h.update(image_size="big"), "image_size"),
    "a size that is a truth": (lambda t, h: h.update(image_size=True), "image_size"),
    "a Siamese readout": (lambda t, h: h.update(siamese=True), r"\(3, 6\) float32, expected \(3, 12\) float32"),
    "an unknown dtype": (lambda t, h: h.update(dtype="int4"), "int4"),
    "a size of nothing": (lambda t, h: h.update(image_size=0), "image_size is 0"),
    "scores that are none": (lambda t, h: h.update(scores={"n": "many"}), r"scores\[.n.\] is .many."),
    "a missing tensor": (lambda t, h: t.pop("block1|bn.running_mean"), "bn.running_mean of block1"),
    "a missing readout": (lambda t, h: (t.pop("head|weight"), t.pop("head|bias")), "of head"),
    "another tensor": (lambda t, h: t.update({"block1|new": torch.zeros(1)}), "new of block1"),
    "another shape": (lambda t, h: t.update({"block1|bn.bias": torch.zeros(5)}), r"bn.bias of block1 is \(5,\)"),
    "another dtype": (
        lambda t, h: t.update({"block1|bn.bias": torch.zeros(6).half()}),
        r"bn.bias of block1 is \(6,\) float16, expected \(6,\) float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS)
def test_edited_files_are_refused(file, change, message):
    rewrite(file, lambda tensors, header: None)
    assert load_tuned(file, tiny_chain()).blocks == {"block1", "block3"}
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_tuned(file, tiny_chain())


CARELESS = {
    "a class renamed": lambda t, h: h.update(classes=["x", "b", "c"]),
    "a better score": lambda t, h: h.update(scores={"test accuracy": 1.0}),
    "another recipe": lambda t, h: h["provenance"].update(recipe={}),
    "another size": lambda t, h: h.update(image_size=16),
    "a new entry": lambda t, h: h.update(note="mine"),
    "a weight": lambda t, h: t["head|bias"].add_(1e-6),
    "two tensors swapped": lambda t, h: t.update(
        {"block1|bn.bias": t["block1|bn.weight"], "block1|bn.weight": t["block1|bn.bias"]}
    ),
}


@pytest.mark.parametrize("change", CARELESS.values(), ids=CARELESS)
def test_careless_edits_are_noticed_by_the_checksum(file, change):
    rewrite(file, change, sign=False)
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_tuned(file, tiny_chain())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(HEADER)), value=JSON | st.sampled_from([10**6, 2**62, -1, [2**40] * 2, ["a"] * 3]))
def test_any_value_in_a_header_is_taken_or_refused_by_name(file, name, value):
    content = file.read_bytes()
    rewrite(file, lambda tensors, header: header.update({name: value}))
    try:
        loaded = load_tuned(file, tiny_chain())
        assert loaded.predict(IMAGES).shape == (5, 3) and str(loaded)
    except ValueError as error:
        assert "t.safetensors" in str(error) and len(str(error)) < 2000
    finally:
        file.write_bytes(content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_bytes_in_the_place_of_others_are_refused_by_name(file, data):
    content = file.read_bytes()
    start = data.draw(st.integers(0, 3000))
    put = data.draw(st.binary(min_size=1, max_size=40) | st.sampled_from([b"9" * 20, b"[" * 40, b'":{"', b"-1", b"e9"]))
    damaged = content[:start] + put + content[start + data.draw(st.integers(0, 40)) :]
    file.write_bytes(damaged)
    try:
        if damaged != content:
            with pytest.raises(ValueError, match="t.safetensors"):
                load_tuned(file, tiny_chain())
    finally:
        file.write_bytes(content)


FORGED = {
    "a readout of 100,000 layers": {"head_depth": 100_000},
    "images of 20,000 pixels": {"image_size": 20_000, "pruned": ["block1"]},
    "a crop of 10^9 pixels": {"crop_size": [10**9, 10**9]},
    "a million classes": {"classes": [str(i) for i in range(300_000)]},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_numbers_are_refused_before_any_work(file, case):
    rewrite(file, lambda tensors, header: header.update(FORGED[case]))
    start = time.process_time()
    with pytest.raises(ValueError, match="t.safetensors"):
        load_tuned(file, tiny_chain())
    assert time.process_time() - start < 5


def test_a_header_that_is_too_long_is_not_read(file):
    length = 17 * 2**20
    file.write_bytes(length.to_bytes(8, "little") + b" " * (length + 9))
    with pytest.raises(ValueError, match="t.safetensors has a header of 17,825,792 bytes"):
        load_tuned(file, tiny_chain())


def test_threads_that_save_one_path_leave_one_whole_file(tuned, tmp_path):
    tasks = [changed(tuned, "head", "bias", lambda t, i=i: torch.full_like(t, i)) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            list(pool.map(lambda task: task.save(tmp_path / "t.safetensors"), tasks))
    assert float(load_tuned(tmp_path / "t.safetensors", tiny_chain()).weights["head"]["bias"][0]) in range(6)
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_tensors_of_a_diverged_training_are_refused(tuned, tmp_path):
    for part, key, value in (("block1", "bn.running_var", torch.nan), ("head", "weight", torch.inf)):
        with pytest.raises(ValueError, match=f"tensor {key} of {part} holds NaN or infinity, as a diverged"):
            changed(tuned, part, key, lambda t, value=value: torch.full_like(t, value))
    path = tuned.save(tmp_path / "t.safetensors")
    rewrite(path, lambda tensors, header: tensors["head|bias"].fill_(torch.nan))
    with pytest.raises(ValueError, match="t.safetensors doesn't fit: tensor bias of head holds NaN"):
        load_tuned(path, tiny_chain())


def test_half_precision_networks_work_and_half_precision_backbones_are_named(tuned, file):
    network = tuned.network().half()
    with torch.no_grad():
        assert torch.allclose(network(IMAGES).float().softmax(1), tuned.predict(IMAGES), atol=0.02)
    with pytest.raises(ValueError, match="in float16: convert networks, not the backbone"):
        load_tuned(file, tiny_chain().half())


def test_a_header_beside_ours_or_in_another_spelling_is_noticed(file):
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
        text = content.metadata()["tuned_task"]
    for metadata in ({"tuned_task": text, "format": "pt"}, {"tuned_task": text + " "}):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(ValueError, match="was changed"):
            read_task(file)
    save_file(tensors, file, metadata={"tuned_task": text})
    assert read_task(file)[0]["base_name"] == "tiny"


@pytest.mark.parametrize("value", ["[" * 20000 + "]" * 20000, "NaN", "1" * 5000], ids=["deep", "NaN", "long"])
def test_a_header_that_breaks_its_reader_is_refused_by_name(file, value):
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a mapping
        text = content.metadata()["tuned_task"]
    save_file(tensors, file, metadata={"tuned_task": text.replace('"scores":{}', f'"scores":{value}')})
    with pytest.raises(ValueError, match="t.safetensors holds no tuned task"):
        read_task(file)


def test_every_flipped_bit_is_noticed(file):
    """In the length, the header, its padding and the tensors: a bit of every 31st byte, and its complement."""
    content = file.read_bytes()
    for position in [*range(16), *range(16, len(content), 31), len(content) - 1]:
        for flip in (1 << position % 8, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= flip
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="t.safetensors"):
                read_task(file)
    file.write_bytes(content)
    assert read_task(file)[0]["base_name"] == "tiny"


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_damaged_files_are_refused_and_nothing_is_unpickled(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    content = file.read_bytes()
    cuts = [content[:length] for length in (0, 1, 7, 8, 9, 50, 1000, len(content) // 2, len(content) - 1)]
    for damaged in (*cuts, content + b"x", b"\xff" * len(content), pickle.dumps(Exploit())):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t.safetensors is not a readable .safetensors file"):
            load_tuned(file, tiny_chain())
    torch.save(Exploit(), file)
    with pytest.raises(ValueError, match="not a readable"):
        load_tuned(file, tiny_chain())
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="holds no tuned task"):
        load_tuned(file, tiny_chain())
    assert os.listdir() == ["t.safetensors"]


@pytest.mark.parametrize("moment", ["half written", "before the exchange"])
def test_a_crash_while_saving_leaves_the_old_file(file, tuned, monkeypatch, moment):
    before = file.read_bytes()

    def crash(*_):
        raise OSError(28, "No space left on device")

    if moment == "half written":
        monkeypatch.setattr(type(file), "write_bytes", lambda path, data: (path.open("wb").write(data[:100]), crash()))
    else:
        monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match=f"{file} can't be written: No space left on device; make room"):
        changed(tuned, "head", "bias", torch.zeros_like).save(file)
    monkeypatch.undo()
    assert file.read_bytes() == before and os.listdir(file.parent) == ["t.safetensors"]


def test_places_that_take_no_file_are_named(tuned, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    for place in ("taken/t.safetensors", "."):
        with pytest.raises((OSError, ValueError), match="taken/t.safetensors can't be written|is a .safetensors file"):
            tuned.save(tmp_path / place)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.save("~/deep/t.safetensors") == tmp_path / "deep" / "t.safetensors"
    assert load_tuned("~/deep/t.safetensors", tiny_chain()).blocks == tuned.blocks


def test_missing_files_and_other_names_are_refused(tuned, tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no tuned task at {path}"):
            load_tuned(path, tiny_chain())
    with pytest.raises(ValueError, match=r'"t.pth"; a tuned task is a .safetensors file'):
        tuned.save("t.pth")
    assert os.listdir(tmp_path) == []
