"""Merged inference equals the separate networks, wherever tasks fork, and does no work twice."""

from copy import deepcopy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from subtuning_lab import Chain, Recipe, Study, TunedTask, load_backbone, merge_tasks, part_table, set_trainable
from subtuning_lab.nets.families import as_chain
from tests.helpers import Residual, own_blocks, randomize_norms, tiny_chain, tiny_task


def vision_transformer() -> Chain:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2, num_classes=5)
    return as_chain(model, name="vit")


def residual_network() -> Chain:
    chain = load_backbone("cifar_resnet14", weights="random", stem_stride=2)
    randomize_norms(chain)
    return chain


def convnext() -> Chain:
    torch.manual_seed(0)
    model = ConvNeXt(depths=(1, 2, 1, 1), dims=(4, 6, 8, 8), num_classes=5)
    return as_chain(model, name="convnext", config={"input_size": (3, 32, 32)})


BACKBONES = {"own": tiny_chain, "resnet": residual_network, "vit": vision_transformer, "convnext": convnext}


@cache
def backbone(name: str) -> Chain:
    return BACKBONES[name]().double()


def changed(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Far from the pretrained value, yet such that variances stay positive."""
    if not tensor.is_floating_point():
        return tensor + 1
    factors = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
    return tensor * factors.to(tensor) + 0.02


def tuned(chain: Chain, blocks, classes: int = 3, seed: int = 0, siamese: bool = False, **options) -> TunedTask:
    """A task whose weights are all its own."""
    generator, blocks = torch.Generator().manual_seed(seed), frozenset(blocks)
    weights = {
        name: {key: changed(tensor, generator) for key, tensor in chain.part(name).state_dict().items()}
        for name in chain.part_names
        if name in blocks
    }
    width = chain.num_features * (2 if siamese else 1)
    weights["head"] = {
        "weight": torch.randn(classes, width, generator=generator).to(chain.mean),
        "bias": torch.randn(classes, generator=generator).to(chain.mean),
    }
    return TunedTask(chain, blocks, weights, tuple("abcdefgh"[:classes]), siamese=siamese, **options)


def separate_logits(task: TunedTask, images: torch.Tensor) -> torch.Tensor:
    """Of the separate network; of a Siamese one written out once more, with both ways in full."""
    if not task.siamese:
        return task.network()(images)
    chain, x = set_trainable(deepcopy(task.backbone), []), task.backbone.normalize(images)
    for name in task.blocks:
        chain.part(name).load_state_dict(task.weights[name])
    return F.linear(torch.cat([task.backbone(x), chain(x)], dim=1), *task.weights["head"].values())


def images_for(chain: Chain, batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(batch, *chain.input_size, generator=torch.Generator().manual_seed(batch)).to(dtype)


def largest_difference(net, tasks: dict[str, TunedTask], images: torch.Tensor) -> float:
    """Between merged and separate logits, in units of the largest logit."""
    with torch.no_grad():
        merged = net(images)
        separate = {name: separate_logits(task, images) for name, task in tasks.items()}
    assert all(merged[name].shape == logits.shape for name, logits in separate.items())
    largest = max(float(logits.abs().max()) for logits in separate.values())
    return max(float((merged[name] - logits).abs().max()) for name, logits in separate.items()) / largest


def varied(chain: Chain) -> dict[str, TunedTask]:
    """Tasks that fork everywhere, with gaps, alone and in groups, of different numbers of classes."""
    names = chain.block_names
    subsets = {
        "middle": [names[1]],
        "gap": [names[0], names[-1]],
        "probing": [],
        "end": ["tail"],
        "stem and gap": ["stem", names[1]],
        "last two": names[-2:],
        "all": chain.part_names,
        "also middle": [names[1]],
        "ends": ["stem", "tail"],
        "a.b": [names[0], "tail"],
    }
    return {name: tuned(chain, blocks, 2 + i % 4, i) for i, (name, blocks) in enumerate(subsets.items())}


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_merged_equals_separate(name, keep_original, batch):
    chain = backbone(name)
    tasks, images = varied(chain), images_for(chain, batch)
    net = merge_tasks(chain, tasks, keep_original)
    assert largest_difference(net, tasks, images) < 1e-10
    with torch.no_grad():
        outputs = net(images)
    assert tuple(outputs) == net.output_names == ("original",) * keep_original + tuple(tasks)
    assert not torch.allclose(outputs["middle"][:, :2], outputs["also middle"][:, :2])  # weights of its own each
    if keep_original:
        features = chain(chain.normalize(images))
        expected = features if chain.source_head is None else chain.source_head(features)
        assert torch.allclose(outputs["original"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
def test_float32_agrees_to_rounding(name):
    chain = BACKBONES[name]()
    tasks = varied(chain)
    assert largest_difference(merge_tasks(chain, tasks), tasks, images_for(chain, 7, torch.float32)) < 1e-5


@pytest.mark.parametrize("name", BACKBONES)
def test_every_position_of_the_fork(name):
    chain = backbone(name)
    for part in chain.part_names:
        tasks = {"one": tuned(chain, [part], seed=1), "other": tuned(chain, [part], 4, seed=2)}
        for keep_original in (True, False):
            net = merge_tasks(chain, tasks, keep_original)
            assert largest_difference(net, tasks, images_for(chain, 2)) < 1e-10


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_subsets(data):
    chain = backbone(data.draw(st.sampled_from(["own", "vit", "convnext"])))
    some = st.frozensets(st.sampled_from(chain.part_names), max_size=4)
    subsets = data.draw(st.lists(some, min_size=1, max_size=5))
    keep_original, batch = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2, 7]))
    siamese = [data.draw(st.booleans()) for _ in subsets]
    tasks = {f"task {i}": tuned(chain, subsets[i], 2 + i, i, siamese[i]) for i in range(len(subsets))}
    net = merge_tasks(chain, tasks, keep_original)
    assert largest_difference(net, tasks, images_for(chain, batch)) < 1e-10
    table = net.rows_table()
    assert (table["frozen_rows"] + table["tuned_rows"] <= len(tasks) + 1).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_siamese_readouts(name):
    chain = backbone(name)
    tasks = {
        "siamese": tuned(chain, chain.block_names[:1], 3, 1, siamese=True),
        "plain": tuned(chain, chain.block_names[1:2], 4, 2),
        "siamese at the end": tuned(chain, ["tail"], 2, 3, siamese=True),
        "siamese without a block": tuned(chain, [], 2, 4, siamese=True),
    }
    net = merge_tasks(chain, tasks, keep_original=False)
    assert largest_difference(net, tasks, images_for(chain, 3)) < 1e-10
    assert net.rows_table()["trunk"].all()  # up to the end: the frozen features are needed


def test_uint8_images_and_resizing():
    chain = backbone("own")
    tasks = {"a": tuned(chain, ["block1"], image_size=12), "b": tuned(chain, ["tail"], seed=1, image_size=12)}
    net = merge_tasks(chain, tasks)
    images = (images_for(chain, 3) * 255).to(torch.uint8)
    assert largest_difference(net, tasks, images) < 1e-10
    with torch.no_grad():
        assert torch.allclose(net(images)["a"], net(images.double() / 255)["a"], rtol=0, atol=1e-12)


def test_tasks_of_a_study():
    chain, task = tiny_chain(), tiny_task()
    study = Study(chain, task, Recipe(epochs=2, batch_size=8, lr=0.05), folds=2, progress=False, device="cpu")
    tasks = {"probing": study.fit([]), "one": study.fit(["block2"]), "two": study.fit(["block1", "block3"])}
    net = merge_tasks(chain, tasks)
    assert largest_difference(net, tasks, task.test.images) < 1e-5


# ---------------------------------------------------------------- work and memory


class Counting(nn.Module):
    """Passes its input on and notes how many rows it sees, in the order of the calls."""

    def __init__(self, inner: nn.Module, calls: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self.inner, self.calls, self.name = inner, calls, name

    def __deepcopy__(self, memo):
        return Counting(deepcopy(self.inner, memo), self.calls, self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, len(x)))
        return self.inner(x)


def counting_chain(n_blocks: int) -> tuple[Chain, list[tuple[str, int]]]:
    plain, calls = tiny_chain(n_blocks), []
    parts = [Counting(part, calls, name) for name, part in zip(plain.part_names, plain.parts, strict=True)]
    return Chain(parts[0], parts[1:-1], parts[-1], plain.num_features, input_size=(3, 8, 8)), calls


def test_rows_grow_by_one_a_task_and_frozen_parts_run_once():
    chain, calls = counting_chain(4)
    subsets = [["block2"], ["block2", "block4"], ["block3"], []]
    net = merge_tasks(chain, {f"t{i}": tuned(chain, blocks, seed=i) for i, blocks in enumerate(subsets)})
    calls.clear()
    net(torch.rand(2, 3, 8, 8))
    rows = {name: sorted(n for part, n in calls if part == name) for name in chain.part_names}
    assert rows == {
        "stem": [2],
        "block1": [2],
        "block2": [2, 2, 2],  # frozen, and two tasks' own
        "block3": [2, 6],  # one task's own; frozen with the two that came back
        "block4": [2, 6],
        "tail": [8],
    }
    table = net.rows_table()
    assert table["frozen_rows"].tolist() == [1, 1, 1, 3, 3, 4] and table["tuned_rows"].tolist() == [0, 0, 2, 1, 1, 0]
    assert table.loc["block3", "tuned_by"] == ("t2",) and set(table.loc["block3", "shared_by"]) == {"t0", "t1"}


def test_the_trunk_stops_where_nobody_needs_it():
    chain, calls = counting_chain(4)
    tasks = {"a": tuned(chain, ["block1", "block2"]), "b": tuned(chain, ["block2"], seed=1)}
    net = merge_tasks(chain, tasks, keep_original=False)
    calls.clear()
    net(torch.rand(1, 3, 8, 8))
    assert sorted(calls) == [
        ("block1", 1),
        ("block1", 1),
        ("block2", 1),
        ("block2", 1),
        ("block3", 2),
        ("block4", 2),
        ("stem", 1),
        ("tail", 2),
    ]
    assert "2" not in net.frozen and set(net.tuned) == {"1", "2"}  # nobody goes through the frozen block2


def test_linear_probing_costs_no_rows():
    chain = backbone("own")
    net = merge_tasks(chain, {f"t{i}": tuned(chain, [], seed=i) for i in range(5)})
    table = net.rows_table()
    assert (table["frozen_rows"] == 1).all() and (table["tuned_rows"] == 0).all()


def test_rows_are_copied_only_where_they_come_together():
    chain = tiny_chain(6)
    subsets = [["block1"], ["block2", "block5"], ["block2", "block3"], ["block4", "block5"]]
    net = merge_tasks(chain, {f"t{i}": tuned(chain, blocks, seed=i) for i, blocks in enumerate(subsets)})
    joined = {step.part for step in net.schedule.steps if len(step.inputs) > 1}
    assert joined == {"block2", "block3", "block4", "block6"}  # where somebody comes back from parts of its own


def test_cost_counts_rows_and_weights():
    chain = tiny_chain()
    parts = part_table(chain)
    tasks = {"a": tuned(chain, ["block3"]), "b": tuned(chain, ["block2", "block3"], seed=1)}
    flops, params = parts["flops"], parts["params"]
    cost = merge_tasks(chain, tasks).schedule.cost(parts)
    shared = flops[["stem", "block1"]].sum()
    assert cost.loc["flops", "merged"] == shared + 2 * flops["block2"] + 3 * flops[["block3", "tail"]].sum()
    assert cost.loc["flops", "separate"] == 3 * flops.sum()
    assert cost.loc["bytes", "merged"] == 4 * (params.sum() + params["block2"] + 2 * params["block3"])
    assert cost.loc["bytes", "separate"] == 4 * 3 * params.sum()
    assert cost["ratio"].tolist() == (cost["separate"] / cost["merged"]).tolist()

    alone = {"a": tuned(chain, ["block3"])}
    assert merge_tasks(chain, alone, keep_original=False).schedule.cost(parts)["ratio"].tolist() == [1.0, 1.0]
    siamese = {"a": tuned(chain, ["block3"], siamese=True)}
    cost = merge_tasks(chain, siamese, keep_original=False).schedule.cost(parts)
    assert (cost["separate"] - cost["merged"]).tolist() == [0, 4 * params["tail"]]  # read twice when not merged


def storages(module: nn.Module) -> dict[int, int]:
    """Bytes by address of everything a module holds."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_twenty_tasks_hold_the_frozen_weights_once():
    chain = tiny_chain(8)
    tasks = {f"t{i}": tuned(chain, [f"block{1 + i % 8}"], seed=i) for i in range(20)}
    net = merge_tasks(chain, tasks)
    own = {t.untyped_storage().data_ptr() for task in tasks.values() for w in task.weights.values() for t in w.values()}
    assert storages(net).keys() - own == storages(chain).keys()  # the very tensors of the backbone, no copies
    assert own - storages(net).keys() == set()
    per_task = [sum(t.nbytes for w in task.weights.values() for t in w.values()) for task in tasks.values()]
    buffers = sum(b.nbytes for b in (chain.mean, chain.std))
    weights = sum(t.nbytes for part in chain.parts for t in part.state_dict().values())
    assert sum(t.nbytes for t in [*net.parameters(), *net.buffers()]) == weights + sum(per_task) + buffers


# ---------------------------------------------------------------- nobody harms another


def test_adding_a_task_leaves_the_others_alone():
    chain = backbone("resnet")
    names = chain.block_names
    tasks = {"a": tuned(chain, [names[2]]), "b": tuned(chain, [names[1], names[4]], seed=1)}
    more = tasks | {"new": tuned(chain, [names[0], names[3]], seed=2)}
    before, images = chain.fingerprint, images_for(chain, 2)
    weights = {name: deepcopy(task.weights) for name, task in tasks.items()}
    with torch.no_grad():
        few, many = merge_tasks(chain, tasks)(images), merge_tasks(chain, more)(images)
    for name, task in tasks.items():
        assert torch.allclose(few[name], many[name], rtol=1e-12, atol=1e-12)
        for part, state in weights[name].items():
            assert all(torch.equal(tensor, task.weights[part][key]) for key, tensor in state.items())
    assert torch.allclose(few["original"], many["original"], rtol=1e-12, atol=1e-12)
    assert chain.fingerprint == before


def test_everything_stays_in_eval_mode():
    chain = BACKBONES["resnet"]()
    tasks = {"a": tuned(chain, [chain.block_names[1]]), "b": tuned(chain, ["stem"], seed=1)}
    net = merge_tasks(set_trainable(chain, "all").train(), tasks)  # the state of the given chain doesn't matter
    images = images_for(chain, 4, torch.float32)
    with torch.no_grad():
        expected, before = net(images), {key: value.clone() for key, value in net.state_dict().items()}
    for careless in (lambda: net.train(), lambda: net.frozen.train(), lambda: [m.train() for m in net.modules()]):
        careless()
        with torch.no_grad():
            outputs = net(images)
        assert all(torch.equal(outputs[name], expected[name]) for name in expected)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())
    assert chain.training and all(p.requires_grad for part in chain.parts for p in part.parameters())


def test_moving_the_merged_network_leaves_backbone_and_tasks_where_they_are():
    chain = tiny_chain()
    tasks = {"a": tuned(chain, ["block1"])}
    net = merge_tasks(chain, tasks).double()
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert all(p.dtype == torch.float32 for p in chain.parameters())
    assert tasks["a"].weights["block1"]["conv.weight"].dtype == torch.float32
    assert net(images_for(chain, 2, torch.float32))["a"].dtype == torch.float64


def test_parts_that_write_into_their_input_do_not_spoil_other_rows():
    chain = own_blocks(*(nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)) for _ in range(3)))
    subsets = [[], ["block1"], ["block2"], ["block2"], ["block1", "block3"], ["block3"]]
    tasks = {f"t{i}": tuned(chain, blocks, seed=i) for i, blocks in enumerate(subsets)}
    for keep_original in (True, False):
        assert largest_difference(merge_tasks(chain, tasks, keep_original), tasks, images_for(chain, 3)) < 1e-10


def test_parts_that_hand_on_their_input():
    chain = own_blocks(nn.Identity(), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1)), nn.Identity())
    tasks = {"a": tuned(chain, ["block1"]), "b": tuned(chain, ["block2"], seed=1), "c": tuned(chain, ["block3"])}
    assert largest_difference(merge_tasks(chain, tasks), tasks, images_for(chain, 3)) < 1e-10


# ---------------------------------------------------------------- bad input


def test_a_part_that_mixes_images_is_refused():
    chain = own_blocks(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match="block2 of custom mixes the images of a batch"):
        merge_tasks(chain, {"a": tuned(chain, ["block1"])})


def test_tasks_of_another_backbone_are_refused():
    chain, other = tiny_chain(), tiny_chain(seed=1)
    tasks = {"fine": tuned(chain, ["block1"]), "stray": tuned(other, ["block1"])}
    expected = rf'task "stray" .* {other.fingerprint[:12]}; this backbone is tiny with {chain.fingerprint[:12]}'
    with pytest.raises(ValueError, match=expected):
        merge_tasks(chain, tasks)
    dimmed = deepcopy(chain)
    dimmed.mean += 0.1  # another normalization makes another backbone
    with pytest.raises(ValueError, match='task "dimmed" was tuned from tiny'):
        merge_tasks(chain, {"fine": tasks["fine"], "dimmed": tuned(dimmed, ["block1"])})
    equal = {"fine": tuned(chain, ["block1"]), "of a copy": tuned(deepcopy(chain), ["block1"])}
    assert merge_tasks(chain, equal).output_names == ("original", "fine", "of a copy")


def test_other_bad_tasks_are_refused():
    chain = tiny_chain()
    good = tuned(chain, ["block1"])
    with pytest.raises(ValueError, match='"a" has image_size None, task "b" has image_size 12'):
        merge_tasks(chain, {"a": good, "b": tuned(chain, [], image_size=12)})
    sizes = {"s": [8, 8], "l": [8, 12]}
    trained = {name: tuned(chain, ["block1"], provenance={"pixels": size}) for name, size in sizes.items()}
    with pytest.raises(ValueError, match='"s" has images of 8 x 8, task "l" has images of 8 x 12; merged'):
        merge_tasks(chain, {"unknown": good} | trained)
    with pytest.raises(ValueError, match='named "original"'):
        merge_tasks(chain, {"original": good})
    assert merge_tasks(chain, {"original": good}, keep_original=False).output_names == ("original",)


def test_two_blocks_of_one_kind_are_told_apart():
    chain = own_blocks(Residual(6), Residual(6))
    one, other = tuned(chain, ["block1"], seed=1), tuned(chain, ["block2"], seed=1)
    outputs = merge_tasks(chain, {"one": one, "other": other})(images_for(chain, 2))
    assert not torch.allclose(outputs["one"], outputs["other"])
