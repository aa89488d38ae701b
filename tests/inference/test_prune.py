"""Pruned blocks compute what the whole ones would without the removed channels, and everything else stays as it was."""

import builtins
import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subtuning_lab import TunedTask, export_merged, load_backbone, load_tuned, merge_tasks, optimize, part_table
from subtuning_lab.inference.checkpoint import read_task
from subtuning_lab.inference.hub import model_card
from subtuning_lab.inference.prune import prune_backbone, prune_blocks
from subtuning_lab.nets.chain import Chain, copy_weights, count_parameters
from subtuning_lab.nets.families import as_chain
from subtuning_lab.theory.linearization import linearization_gap, tuned_distance
from tests.helpers import Residual, randomize_norms, tiny_chain
from tests.inference.test_tuned_task import rewrite
from tests.nets.test_families import new_model

pytest.importorskip("torch_pruning")

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Bottleneck(nn.Module):
    """Two convolutions with BatchNorm, of which the inner width is free, and a way around them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def chain_of(inner=(8, 8, 8), dtype=torch.float64) -> Chain:
    torch.manual_seed(0)
    stem, tail = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chain = Chain(stem, [Bottleneck(6, width) for width in inner], tail, 6, input_size=(3, 16, 16), name="inner")
    randomize_norms(chain)
    return chain.to(dtype)


def task_of(chain, blocks, siamese=False, seed=1) -> TunedTask:
    """A task whose blocks are some way from the pretrained ones."""
    draws = torch.Generator().manual_seed(seed)
    weights = copy_weights({name: chain.part(name) for name in sorted(blocks)})
    for state in weights.values():
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=draws, dtype=tensor.dtype)
    width = (1 + siamese) * chain.num_features
    head = {"weight": torch.randn(4, width, generator=draws), "bias": torch.randn(4, generator=draws)}
    weights["head"] = {key: tensor.to(chain.mean.dtype) for key, tensor in head.items()}
    return TunedTask(chain, frozenset(blocks), weights, tuple("abcd"), siamese=siamese)


def removed_columns(whole, small):
    """Input channels that a weight lost; those that it kept are found again by their numbers in one row."""
    whole, small = (weight.reshape(*weight.shape[:2], -1)[..., 0] for weight in (whole, small))
    ((row, _),) = (whole == small[0, 0]).nonzero().tolist()  # no number is there twice
    kept = torch.isin(whole[row], small[0])
    assert int(kept.sum()) == small.shape[1]
    return (~kept).nonzero().flatten()


def without_channels(whole, small):
    """The whole module, in which nothing reads the channels that the small one lacks."""
    silent = copy.deepcopy(whole)
    for name, module in silent.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            other = small.get_submodule(name).weight
            if other.shape[1] < module.weight.shape[1]:
                module.weight.data[:, removed_columns(module.weight, other)] = 0
    return silent


def inputs_of(chain, n=2):
    x, inputs = torch.randn(n, *chain.input_size, generator=torch.Generator().manual_seed(3)).to(chain.mean), {}
    with torch.no_grad():
        for name, part in zip(chain.part_names, chain.parts, strict=True):
            inputs[name], x = x, part(x.clone())
    return inputs


# ---------------------------------------------------------------- every family

# what has inner channels among the parts, told by the parts that have none
WHOLE = {
    "basic blocks": ["tail"],  # a deep stem's first convolutions are inner ones
    "bottlenecks": ["tail"],
    "class token": ["stem", "tail"],
    "layer scale": ["stem", "tail"],
    "attention pool": ["stem", "tail"],
    "convnext": ["stem", "tail"],
    "swin": ["stem", "tail"],
    "efficientnet": ["stem", "blocks.0.0", "tail"],
    "mobilenet v3": ["stem", "blocks.5.0", "tail"],
    "regnet x": ["stem", "tail"],
    "regnet y": ["stem", "tail"],
    "cifar_resnet20": ["stem", "tail"],
    "lab-resnet": ["stem", "tail"],
    "lab-vit": ["stem", "tail"],
}


def family_chain(case) -> Chain:
    if case in ("lab-resnet", "lab-vit", "cifar_resnet20"):
        chain = load_backbone(case, weights="random")
    else:
        chain = as_chain(new_model(case), name=case)
    chain, draws = chain.double(), torch.Generator().manual_seed(0)
    for parameter in chain.parameters():  # float32 draws the same number twice now and then
        parameter.data += 1e-6 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
    return chain


@pytest.mark.parametrize(("case", "whole"), WHOLE.items())
def test_pruned_parts_compute_what_is_left_of_the_whole_ones(case, whole):
    chain = family_chain(case)
    before, inputs = chain.fingerprint, inputs_of(chain)
    names = chain.part_names if len(chain.parts) < 9 else chain.part_names[:4] + chain.part_names[-3:]
    pruned = prune_backbone(chain, names, 0.5)
    shapes = [part_table(c)["output_shape"].tolist() for c in (chain, pruned)]
    assert chain.fingerprint == before and shapes[0] == shapes[1]
    for name in chain.part_names:
        own, small = chain.part(name), pruned.part(name)
        if name in whole or name not in names:
            assert all(torch.equal(a, b) for a, b in zip(own.parameters(), small.parameters(), strict=True))
            continue
        assert count_parameters(pruned, [name]) < count_parameters(chain, [name])
        with torch.no_grad():
            expected, given = (part(inputs[name].clone()) for part in (without_channels(own, small), small))
            assert torch.allclose(given, expected, rtol=0, atol=1e-10)
            assert not torch.allclose(given, own(inputs[name].clone()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", ["class token", "swin", "convnext", "regnet y", "mobilenet v3"])
def test_a_pruned_task_of_every_kind_is_saved_loaded_and_merged(case, tmp_path):
    chain = as_chain(new_model(case), name=case).double()
    tuned = task_of(chain, chain.block_names[1:3])
    pruned = prune_blocks(tuned, 0.4, "global", "l2")
    loaded = load_tuned(pruned.save(tmp_path / "t.safetensors"), chain)
    images = torch.rand(2, *chain.input_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = pruned.network()(images)
        assert torch.equal(loaded.network()(images), expected)
        merged = merge_tasks(chain, {"small": loaded, "tuned": tuned}, keep_original=False)(images)
        assert torch.allclose(merged["small"], expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(merged["tuned"], tuned.network()(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("siamese", [False, True])
def test_the_cost_of_merged_pruned_tasks_is_what_torch_counts(siamese):
    chain = chain_of()
    tasks = {"small": prune_blocks(task_of(chain, ["block1", "block3"], siamese), 0.5), "b": task_of(chain, ["block3"])}
    merged = merge_tasks(chain, tasks, keep_original=False)
    own = {"small": part_table(tasks["small"].network().backbone)}
    cost = merged.schedule.cost(part_table(chain), bytes_per_weight=8, own=own)
    assert counted_flops(merged) == cost.loc["flops", "merged"]
    separate = [task.network() for task in tasks.values()]
    if not siamese:  # whose separate network runs what comes before its fork once
        assert sum(map(counted_flops, separate)) == cost.loc["flops", "separate"]
        weights = sum(p.nbytes for net in separate for p in net.backbone.parameters())
        assert cost.loc["bytes", "separate"] == weights
    whole = merged.schedule.cost(part_table(chain), bytes_per_weight=8)
    assert (whole[["merged", "separate"]] > cost[["merged", "separate"]]).all(axis=None)


def counted_flops(net: nn.Module) -> int:
    """Of one image's forward pass, without the readouts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(IMAGES[:1])
    heads = [m for m in net.modules() if isinstance(m, nn.Linear)]
    return counter.get_total_flops() - sum(2 * head.weight.numel() for head in heads)


def test_attention_keeps_its_heads_and_widths():
    chain = load_backbone("lab-vit", weights="random")
    pruned = prune_backbone(chain, ["blocks.0"], 0.5).part("blocks.0")
    assert pruned.attn.qkv.weight.shape == (288, 96) and pruned.attn.num_heads == 3
    assert pruned.mlp.fc1.weight.shape == (96, 96) and pruned.mlp.fc2.weight.shape == (96, 96)


# ---------------------------------------------------------------- which channels go


def inner(task, block="block1"):
    """The inner channels that are left of a `Bottleneck`, by their places in the whole one."""
    kept, whole = (t.weights[block]["bn1.weight"].tolist() for t in (task, task_of(task.backbone, task.blocks)))
    return {whole.index(value) for value in kept}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.99])
def test_the_ratio_is_that_of_the_channels_and_one_stays(ratio):
    pruned = prune_blocks(task_of(chain_of(), ["block1", "block3"]), ratio)
    assert len(inner(pruned)) == len(inner(pruned, "block3")) == 8 - min(7, round(8 * ratio))
    assert pruned.pruned == {"block1", "block3"}


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_the_weakest_channels_go(scope, importance):
    tuned = task_of(chain_of(), ["block1"])
    for key, tensor in tuned.weights["block1"].items():
        if key == "conv2.weight":
            tensor[:, [2, 5]] *= 1e-3
        elif key in ("conv1.weight", "bn1.weight"):
            tensor[[2, 5]] *= 1e-3
    kept = prune_blocks(tuned, 0.25, scope, importance).weights["block1"]["bn1.weight"].tolist()
    assert kept == [v for i, v in enumerate(tuned.weights["block1"]["bn1.weight"].tolist()) if i not in (2, 5)]


def test_global_pruning_takes_more_from_where_channels_differ_more():
    tuned = task_of(chain_of((8, 8)), ["block1", "block2"])
    for key in ("conv1.weight", "bn1.weight"):
        tuned.weights["block1"][key][:5] *= 1e-3
    tuned.weights["block1"]["conv2.weight"][:, :5] *= 1e-3
    pruned = prune_blocks(tuned, 0.25, "global")
    sizes = [len(pruned.weights[name]["bn1.weight"]) for name in ("block1", "block2")]
    assert sizes == [4, 8] and pruned.pruned == {"block1"}  # 4 of 16 channels, all of them among the weak ones


def test_random_channels_are_those_of_the_seed():
    tuned = task_of(chain_of((32,)), ["block1"])
    first, again, other = (inner(prune_blocks(tuned, 0.5, importance="random", seed=s)) for s in (0, 0, 1))
    assert first == again != other and len(first) == len(other) == 16
    assert first != inner(prune_blocks(tuned, 0.5))


# ---------------------------------------------------------------- the pruned task


def test_frozen_parts_and_the_given_task_stay_as_they_were():
    tuned = task_of(chain_of(), ["block2"])
    before = copy.deepcopy(tuned.weights)
    fingerprint = tuned.backbone.fingerprint
    pruned = prune_blocks(tuned, 0.5)
    network = pruned.network().train()
    assert pruned.backbone is tuned.backbone and tuned.backbone.fingerprint == fingerprint
    assert all(torch.equal(t, before[part][key]) for part, own in tuned.weights.items() for key, t in own.items())
    assert torch.equal(pruned.weights["head"]["weight"], tuned.weights["head"]["weight"])
    for name in ("stem", "block1", "block3", "tail"):
        own, base = network.backbone.part(name).state_dict(), tuned.backbone.part(name).state_dict()
        assert all(torch.equal(own[key], base[key]) for key in base)
    assert not any(p.requires_grad for p in network.parameters()) and not network.backbone.part("block2").training
    assert pruned.scores == {} and pruned.provenance["pruning"]["ratio"] == 0.5


def test_a_pruned_task_is_pruned_further():
    once = prune_blocks(task_of(chain_of(), ["block1", "block2"]), 0.5)
    twice = prune_blocks(once, 0.5)
    assert twice.weights["block1"]["conv1.weight"].shape == (2, 6, 3, 3) and inner(twice) < inner(once)


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_pruned_task_comes_back_smaller(siamese, dtype, tmp_path):
    tuned = task_of(chain_of(dtype=torch.float32), ["block1", "block3"], siamese)
    pruned = prune_blocks(tuned, 0.5)
    files = [task.save(tmp_path / f"{i}.safetensors", dtype) for i, task in enumerate((tuned, pruned))]
    loaded = load_tuned(files[1], chain_of(dtype=torch.float32))
    assert loaded.pruned == pruned.pruned == {"block1", "block3"} and "pruned" in str(loaded)
    assert torch.allclose(loaded.predict(IMAGES), pruned.predict(IMAGES), atol=0 if dtype is None else 0.02)
    sizes = [file.stat().st_size for file in files]
    tables = [task.size_table(dtype)["saved_bytes"].sum() for task in (tuned, pruned)]
    assert sizes[0] - sizes[1] == pytest.approx(tables[0] - tables[1], abs=200)
    assert tables[1] < 0.6 * tables[0]


@pytest.mark.parametrize("siamese", [False, True])
def test_merged_pruned_tasks_equal_the_separate_networks(siamese):
    chain = chain_of()
    tasks = {
        "small": prune_blocks(task_of(chain, ["block1"], siamese), 0.5),
        "smaller": prune_blocks(task_of(chain, ["block1", "block3"], siamese, seed=2), 0.75),
        "tuned": task_of(chain, ["block2"], seed=3),
    }
    merged = merge_tasks(chain, tasks)
    with torch.no_grad():
        outputs, folded = merged(IMAGES), optimize(merged, images=torch.rand(2, 3, 16, 16).double())(IMAGES)
        for name, task in tasks.items():
            expected = task.network()(IMAGES)
            assert torch.allclose(outputs[name], expected, rtol=0, atol=1e-10)
            assert torch.allclose(folded[name], expected, rtol=0, atol=1e-10)


def test_a_merged_network_with_pruned_blocks_is_exported(tmp_path):
    chain = chain_of(dtype=torch.float32)
    net = merge_tasks(chain, {"small": prune_blocks(task_of(chain, ["block2"]), 0.5)}, keep_original=False)
    program = torch.export.load(export_merged(net, tmp_path / "net.pt2"))
    images = IMAGES.float() / 255
    with torch.no_grad():
        assert torch.allclose(program.module()(images)["small"], net(images)["small"], atol=1e-5)


# ---------------------------------------------------------------- what is refused


def narrower(tensors, key, rows):
    tensors[f"block1|{key}"] = tensors[f"block1|{key}"][rows].contiguous()


TAMPERED = {
    "a smaller tensor of a part that isn't pruned": (
        lambda t, h: h.update(pruned=[]),
        r"bn1.bias of block1 is \(4,\) float64, expected \(8,\) float64",
    ),
    "widths that don't fit": (lambda t, h: narrower(t, "bn1.bias", slice(3)), "sizes"),
    "a norm that is narrower than its input": (
        lambda t, h: [narrower(t, f"bn1.{key}", slice(3)) for key in ("weight", "bias", "running_mean", "running_var")],
        "don't fit together",
    ),
    "a bias of one number": (lambda t, h: narrower(t, "conv2.bias", slice(1)), "sizes"),
    "a narrower output": (
        lambda t, h: [narrower(t, f"conv2.{key}", slice(5)) for key in ("weight", "bias")],
        "don't fit together",
    ),
    "a wider tensor": (
        lambda t, h: t.update({"block1|bn1.bias": torch.zeros(9, dtype=torch.float64)}),
        r"bn1.bias of block1, which is pruned, is \(9,\); it must be at most \(8,\)",
    ),
    "another type": (
        lambda t, h: t.update({"block1|bn1.bias": torch.zeros(4)}),
        r"bn1.bias of block1 is \(4,\) float32, expected \(4,\) float64",
    ),
    "a tensor too few": (lambda t, h: t.pop("block1|bn1.bias"), "bn1.bias of block1 is missing"),
    "a block that isn't tuned": (lambda t, h: h.update(pruned=["block1", "block2"]), "block2, which is not tuned"),
    "no list": (lambda t, h: h.update(pruned="block1"), "pruned in its header is 'block1'"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tensors_that_are_not_those_of_a_pruned_part_are_refused(case, tmp_path):
    change, message = TAMPERED[case]
    path = prune_blocks(task_of(chain_of(), ["block1"]), 0.5).save(tmp_path / "t.safetensors")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_tuned(path, chain_of())


def test_a_whole_part_doesnt_count_as_pruned():
    with pytest.raises(ValueError, match="block1 counts as pruned, but none of its tensors is smaller"):
        dataclasses.replace(task_of(chain_of(), ["block1"]), pruned=frozenset({"block1"}))


def test_files_from_before_pruning_are_read(tmp_path):
    tuned = task_of(chain_of(), ["block1"])
    path = tuned.save(tmp_path / "t.safetensors")

    def older(tensors, header):
        for name in ("pruned", "head_depth"):
            header.pop(name)
        header["format"] = "subtuning-lab tuned task 2"

    rewrite(path, older)
    assert "pruned" not in path.read_bytes().decode(errors="replace")
    loaded = load_tuned(path, chain_of())
    assert (loaded.pruned, loaded.head_depth) == (frozenset(), 1) and read_task(path)[0]["pruned"] == []
    assert torch.equal(loaded.predict(IMAGES), tuned.predict(IMAGES))


def test_no_way_leads_from_the_backbone_to_pruned_blocks_and_the_card_names_them():
    pruned = prune_blocks(task_of(chain_of(), ["block1", "block3"]), 0.5)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for measure in (tuned_distance, lambda task: linearization_gap(task, images)):
        with pytest.raises(ValueError, match="block1, block3 is pruned"):
            measure(pruned)
    assert "| pruned blocks | block1, block3 |" in model_card(pruned, "me/task", 1)


@pytest.mark.parametrize("blocks", [["block1"], ["tail"], []])
def test_blocks_without_inner_channels_are_told(blocks):
    """`Residual` has one convolution, which the next block reads."""
    chain = tiny_chain()
    assert isinstance(chain.part("block1"), Residual)
    with pytest.raises(ValueError, match=f"{blocks[0] if blocks else 'no block'} of tiny: nothing to prune"):
        prune_blocks(task_of(chain, blocks), 0.5)


def test_an_output_of_two_channels_is_no_inner_width():
    """One channel less would be broadcast against the way around, and give the right shape."""
    torch.manual_seed(0)
    stem, tail = nn.Conv2d(3, 2, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    chain = Chain(stem, [Bottleneck(2, 8)], tail, 2, input_size=(3, 8, 8))
    pruned = prune_backbone(chain, ["block1"], 0.5).part("block1")
    assert pruned.conv1.weight.shape == (4, 2, 3, 3) and pruned.conv2.weight.shape == (2, 4, 3, 3)


def test_a_missing_library_is_named(monkeypatch):
    tuned, real = task_of(chain_of(), ["block1"]), builtins.__import__

    def importing(name, *rest):
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match=r'pip install "subtuning-lab\[pruning\]"'):
        prune_blocks(tuned, 0.5)
