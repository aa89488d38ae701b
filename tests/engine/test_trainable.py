"""What a recipe can do to a subset: biases, norms, adapters, learning rates by part, and where the readout starts."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from subtuning_lab.engine.batches import Training
from subtuning_lab.engine.fit import ENGINES, fit_together
from subtuning_lab.engine.optim import lr_factor
from subtuning_lab.engine.recipe import Recipe, recipe_grid
from subtuning_lab.engine.trainable import count_trained, plain_part, tune, tune_parts
from subtuning_lab.nets.chain import Chain, copy_weights, count_parameters, put_parts
from tests.helpers import Residual, randomize_norms, tiny_chain, tiny_split

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, head_lr=3e-2)
RECIPE_OF_FOUR = replace(RECIPE, batch_size=4, epochs=3)
TRAIN = tiny_split()
VARIANTS = {
    "bias": {"params": "bias"},
    "norm": {"params": "norm"},
    "lora": {"adapter": "lora", "rank": 2},
    "ia3": {"adapter": "ia3"},
    "ln_tuning": {"adapter": "ln_tuning"},
    "lr_decay": {"lr_decay": 0.5},
    "rgn": {"lr_scaling": "rgn"},
    "probe": {"head_start": "probe"},
    "source": {"head_start": "source"},
    "siamese": {"siamese": True},
    "siamese from a probe": {"siamese": True, "head_start": "probe"},
    "re-initialized": {"init": "random"},
    "deep readout": {"head_depth": 2},
    "deep Siamese readout from a probe": {"head_depth": 2, "siamese": True, "head_start": "probe"},
    "everything": {"lr_decay": 0.7, "lr_scaling": "rgn", "head_start": "probe", "siamese": True},
}
SUBSETS = [("block1",), ("block1", "block3"), ("block3", "tail"), (), "all"]


def sourced_chain(dtype=torch.float64):
    """A tiny chain with a pretrained readout for 3 classes."""
    chain = tiny_chain(dtype=dtype)
    torch.manual_seed(5)
    chain.source_head = nn.Linear(6, 3).to(dtype)
    return chain


def fit(subsets, recipe, chain=None, **options):
    return fit_together(chain or sourced_chain(), subsets, TRAIN, recipe, **{"num_classes": 3} | options)


def one_step(chain=None, blocks="all", **changes):
    """A fit of a single step, whose AdamW update has the size of the learning rate in every number."""
    own = {"epochs": 1, "batch_size": 64, "weight_decay": 0.0, "warmup": 0.0} | changes
    return fit([blocks], replace(RECIPE, **own), chain)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_equals_separate_trainings(variant):
    recipe = replace(RECIPE, **VARIANTS[variant])
    subsets = [own for own in SUBSETS if variant != "ln_tuning" or not own or "tail" in own or own == "all"]
    together, alone = (fit(subsets, recipe, engine=engine, validation=TRAIN) for engine in ("one_pass", "sequential"))
    for one, other in zip(together, alone, strict=True):
        assert one.accuracy == other.accuracy
        for part, tensors in one.weights.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, other.weights[part][name], rtol=1e-9, atol=1e-9)


def test_variants_differ_from_the_plain_recipe_and_share_a_pass_with_it():
    plain = fit([("block1", "tail")], RECIPE)[0]
    recipes = [replace(RECIPE, **changes) for changes in VARIANTS.values()]
    fits = fit([("block1", "tail")] * len(recipes), recipes)
    for name, own in zip(VARIANTS, fits, strict=True):
        assert not torch.equal(own.losses, plain.losses), name
        alone = fit([("block1", "tail")], replace(RECIPE, **VARIANTS[name]))[0]
        torch.testing.assert_close(own.losses, alone.losses)


@pytest.mark.parametrize("params", ["bias", "norm"])
def test_what_the_recipe_does_not_name_stays_bit_identical(params):
    chain = sourced_chain(torch.float32)
    before = copy_weights(dict(zip(chain.part_names, chain.parts, strict=True)))
    (own,) = fit(["all"], replace(RECIPE, params=params, bn="frozen"), chain)
    changed = {
        f"{part}.{name}"
        for part, tensors in own.weights.items()
        if part != "head"
        for name, tensor in tensors.items()
        if not torch.equal(tensor, before[part][name])
    }
    norms = {
        f"{place}.{kind}" for place in ("stem.1", "block1.bn", "block2.bn", "block3.bn", "tail.2") for kind in "wb"
    }
    named = {f"{name.rpartition('.')[0]}.{name.rpartition('.')[2][0]}" for name in changed}
    assert named == (norms if params == "norm" else {name for name in norms if name.endswith(".b")})


def test_a_low_rank_addition_has_low_rank():
    chain = sourced_chain()
    (own,) = fit([("block2",)], replace(RECIPE, adapter="lora", rank=2, epochs=3), chain)
    change = own.weights["block2"]["conv.weight"] - chain.part("block2").conv.weight.detach()
    ranks = torch.linalg.matrix_rank(change.flatten(1), atol=1e-10)
    assert 0 < ranks <= 2
    assert set(own.weights["block2"]) == set(chain.part("block2").state_dict())


@pytest.mark.parametrize("adapter", ["lora", "ia3", "ln_tuning"])
def test_an_adapter_starts_as_nothing_and_merges_into_the_same_function(adapter):
    x = torch.rand(3, 6, 4, 4, dtype=torch.float64)
    part = nn.Sequential(Residual(6), nn.LayerNorm([6, 4, 4])).double().eval()
    randomize_norms(part)
    adapted = tune(part, Recipe(adapter=adapter, rank=2)).eval()
    torch.testing.assert_close(adapted(x), part(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter) * parameter.requires_grad)
    merged = plain_part(adapted)
    assert list(merged.state_dict()) == list(part.state_dict())
    assert not torch.allclose(merged(x), part(x))
    torch.testing.assert_close(merged(x), adapted(x), rtol=1e-10, atol=1e-10)


class Attending(nn.Module):
    """Torch's own attention, which reads weights without calling layers, and an MLP; (batch, tokens, 8)."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2, self.spare = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


def attending_chain():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), Attending(), Attending()]
    tail = nn.Sequential(nn.Flatten(), nn.LayerNorm(64))
    return Chain(stem, blocks, tail, 64, input_size=(3, 8, 8), name="attending").double()


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_low_rank_additions_reach_torchs_attention(targets):
    """In the projections that attention reads as well as in called layers; what nothing uses isn't counted."""
    chain, recipe = attending_chain(), replace(RECIPE, adapter="lora", rank=2, lora_targets=targets)
    attention = 2 * (8 + 24) + 2 * (8 + 8)  # rank times both sides of the joint and of the last projection
    expected = attention + (2 * 2 * (8 + 16) if targets == "all" else 0)
    assert count_trained(tune_parts(chain, ["block2"], recipe).values()) == expected
    together, alone = (fit([("block2",), ("block2", "block3")], recipe, chain, engine=engine) for engine in ENGINES)
    before = chain.part("block2").state_dict()
    for one, other in zip(together, alone, strict=True):
        assert one.weights["block2"].keys() == before.keys()
        for key, tensor in one.weights["block2"].items():
            torch.testing.assert_close(tensor, other.weights["block2"][key], rtol=1e-9, atol=1e-9)
            changed = key.endswith("weight") and ("attn" in key or (targets == "all" and "fc" in key))
            assert torch.equal(tensor, before[key]) != changed, key
            if changed:
                assert torch.linalg.matrix_rank(tensor - before[key], atol=1e-10) <= 2
    tuned = tune_parts(chain, ["block2"], recipe)["block2"]
    x = torch.rand(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(tuned(x), chain.part("block2")(x))  # as nothing at first
    for parameter in tuned.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    torch.testing.assert_close(plain_part(tuned)(x), tuned(x))
    assert not torch.allclose(tuned(x), chain.part("block2")(x))


class Odd(Residual):
    """A block (batch, 6, ...) whose layers do more than be called under one name."""

    def __init__(self, kind):
        super().__init__(6)
        self.kind, self.first, self.second = kind, nn.Linear(6, 6), nn.Linear(6, 6)
        if kind == "two names":
            self.second = self.first
        elif kind == "tied":
            self.second.weight = self.first.weight
        elif kind == "parametrized":
            nn.utils.parametrizations.weight_norm(self.second)

    def forward(self, x):
        x = super().forward(x).movedim(1, -1)
        x = self.second(torch.tanh(self.first(x)))
        return (x @ self.first.weight if self.kind == "called and read" else x).movedim(-1, 1)


def odd_chain(block):
    plain = sourced_chain()
    randomize_norms(block)
    return Chain(plain.stem, [block.double()], plain.tail, 6, name="odd").double()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
@pytest.mark.parametrize("kind", ["two names", "tied", "called and read", "parametrized"])
def test_a_block_that_would_not_be_saved_as_it_is_trained_is_refused(kind, adapter, engine):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"adapter {adapter} can't be used on block1 of odd: what it trains"):
        fit([("stem",), ("block1",)], replace(RECIPE, adapter=adapter), odd_chain(Odd(kind)), engine=engine)


def test_the_networks_own_parametrizations_outlive_an_adapter():
    torch.manual_seed(0)
    block = Odd("parametrized")
    block.norm_of_maps = nn.LayerNorm([6, 4, 4])
    block.register_forward_hook(lambda block, inputs, output: block.norm_of_maps(output))
    chain = odd_chain(block)
    names = set(chain.part("block1").state_dict())
    (one,) = fit([("block1",)], replace(RECIPE, adapter="ln_tuning"), chain)
    assert "second.parametrizations.weight.original0" in names and set(one.weights["block1"]) == names


def test_torchs_encoder_layer_is_scored_as_it_is_served():
    """Its fast path, in eval mode without gradients, reads the weights of the MLP's layers past their calls."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    parts = attending_chain()
    chain = Chain(parts.stem, [parts.part("block1"), layer], parts.tail, 64, input_size=(3, 8, 8)).double()
    (one,) = fit([("block2",)], replace(RECIPE, adapter="lora", rank=2, lora_targets="all"), chain, validation=TRAIN)
    served = copy.deepcopy(chain)
    served.part("block2").load_state_dict(one.weights["block2"])
    assert not torch.equal(served.part("block2").linear1.weight, layer.linear1.weight)
    with torch.no_grad():
        features = served(served.normalize(TRAIN.images))
        logits = nn.functional.linear(features, *one.weights["head"].values())
    assert one.validation_loss == pytest.approx(nn.functional.cross_entropy(logits, TRAIN.labels).item(), rel=1e-9)


def test_what_an_adapter_cannot_reach_is_refused():
    with pytest.raises(ValueError, match=r"adapter ia3 can't adapt self_attn.* without calling a layer"):
        fit([("block2",)], replace(RECIPE, adapter="ia3"), attending_chain())
    with pytest.raises(ValueError, match="block1 of tiny have nothing that adapter lora on attention could train"):
        fit([("block1",)], replace(RECIPE, adapter="lora", lora_targets="attention"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_an_adapter_without_gradients_is_an_error(engine, adapter):
    class Cut(Residual):
        def forward(self, x):
            return x + 0 * super().forward(x)

    plain = tiny_chain()
    chain = Chain(plain.stem, [Cut(6), *plain.blocks], plain.tail, 6)
    with pytest.raises(ValueError, match=f"adapter {adapter} gets no gradient in block1; it would train nothing"):
        fit([("block2",), ("block1",)], replace(RECIPE, adapter=adapter), chain, engine=engine)


def test_factors_of_ia3_do_not_decay():
    """Six steps of AdamW move a factor by at most 6 lr from 1; with decay it would lose 1 - 0.95^6 = 26 %."""
    chain, recipe = sourced_chain(), replace(RECIPE, adapter="ia3", lr=1e-3, weight_decay=50.0, warmup=0.0)
    (one,) = fit([("block2",)], recipe, chain)
    factors = one.weights["block2"]["conv.weight"] / chain.part("block2").conv.weight.detach()
    assert 0 < (factors - 1).abs().max() <= 6e-3 * 1.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bn", ["batch", "frozen"])
def test_frozen_statistics_are_those_of_instance_norm_too(bn, engine):
    plain = tiny_chain()
    block = nn.Sequential(nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True))
    chain = Chain(plain.stem, [block], plain.tail, 6)
    (one,) = fit([("block1",)], replace(RECIPE, bn=bn), chain, engine=engine)
    assert torch.equal(one.weights["block1"]["1.running_mean"], torch.zeros(6)) == (bn == "frozen")
    assert not torch.equal(one.weights["block1"]["1.weight"], torch.ones(6))


def test_an_adapter_starts_the_same_whatever_else_was_drawn():
    part, recipe = Residual(6), Recipe(adapter="lora")
    first = tune(part, recipe, seed=1)
    state = torch.get_rng_state()
    torch.rand(7)
    again, other = tune(part, recipe, seed=1), tune(part, recipe, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))
    torch.set_rng_state(state)
    tune(part, recipe)
    assert torch.equal(torch.get_rng_state(), state)


def test_re_initialized_parts_are_as_new_and_the_same_for_every_call():
    part = Residual(6)
    randomize_norms(part)
    first, again, other = (tune(part, Recipe(init="random"), seed=seed) for seed in (1, 1, 2))
    own = first.conv.weight.detach()
    assert torch.equal(own, again.conv.weight) and not torch.equal(own, other.conv.weight)
    assert not torch.equal(own, part.conv.weight) and own.abs().max() <= (6 * 9) ** -0.5  # torch's bound for a new one
    assert first.bn.running_mean.eq(0).all() and first.bn.running_var.eq(1).all() and first.bn.weight.eq(1).all()
    assert first.conv.weight.requires_grad


def test_parts_that_have_no_way_to_start_anew_are_refused():
    part = Residual(6)
    part.gamma = nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match=r'init is "random", but the part \(Residual\) has no way to start anew'):
        tune(part, Recipe(init="random"))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "subtuning-lab\[peft\]"'):
        fit([("block1",)], replace(RECIPE, adapter="lora"))


def test_nothing_to_train_is_an_error_that_names_the_blocks():
    with pytest.raises(ValueError, match="block1 of tiny have nothing that adapter ln_tuning could train"):
        fit([("block1",)], replace(RECIPE, adapter="ln_tuning"))


def test_only_what_is_trained_is_counted():
    chain = tiny_chain()
    everything = tune_parts(chain, "all", Recipe())
    assert count_trained(everything.values()) == count_parameters(chain, "all")
    norms = sum(
        p.numel() for m in chain.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm) for p in m.parameters()
    )
    assert count_trained(tune_parts(chain, "all", Recipe(params="norm")).values()) == norms
    lora = tune_parts(chain, ["block1"], Recipe(adapter="lora", rank=2)).values()
    assert count_trained(lora) == 2 * 6 * 9 + 2 * 6  # (rank, in * 3 * 3) and (out, rank)


def test_each_part_learns_so_many_times_as_fast_as_the_one_behind_it():
    chain = sourced_chain()
    own = one_step(chain, lr_decay=0.5, lr=1e-3)
    moved = [
        max(
            (own.weights[name][key] - tensor).abs().max().item()
            for key, tensor in part.state_dict().items()
            if "running" not in key and "num" not in key
        )
        for name, part in zip(chain.part_names, chain.parts, strict=True)
    ]
    assert moved == pytest.approx([1e-3 * 0.5 ** (4 - i) for i in range(5)], rel=1e-3)


def auto_rgn(chain, recipe, start):
    """Auto-RGN as published, plainly: all but BatchNorm and with the readout; 5 batches at the start of each epoch."""
    network, head = copy.deepcopy(chain), nn.Linear(6, 3).double()
    head.load_state_dict(start)
    network.source_head = None
    norms = {id(p) for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    tensors = [*head.parameters(), *(p for p in network.parameters() if id(p) not in norms)]
    for p in tensors:
        p.requires_grad_()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in tensors], weight_decay=recipe.weight_decay)
    training = Training(chain, TRAIN, None, recipe, 3, 0, lambda trained: None)
    shares, step = [], 0

    def run(x):
        for part in network.parts:
            x = part(x)
        return head(x)

    for epoch in range(recipe.epochs):
        ratios = torch.zeros(len(tensors))
        for x, y in list(training.batches(epoch))[:5]:
            for part in network.parts:
                part.eval()
            gradients = torch.autograd.grad(nn.functional.cross_entropy(run(x), y), tensors)
            ratios += torch.stack([g.norm() / p.detach().norm() for g, p in zip(gradients, tensors, strict=True)]) / 5
        shares.append(ratios / ratios.max())
        for x, y in training.batches(epoch):
            for part in network.parts:
                part.train()
            for group, share in zip(optimizer.param_groups, shares[-1], strict=True):
                group["lr"] = recipe.lr * lr_factor(step, 6 * recipe.epochs, recipe.warmup) * float(share)
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x), y).backward()
            optimizer.step()
            step += 1
    return network, head, shares


@pytest.mark.parametrize("engine", ENGINES)
def test_relative_gradients_scale_learning_rates_as_published(engine):
    recipe = replace(RECIPE, lr_scaling="rgn", batch_size=4, epochs=3, head_lr=None, weight_decay=0.1)
    chain = sourced_chain()
    (untouched,) = fit(["all"], recipe, chain, engine=engine)
    assert untouched.weights["tail"]["2.bias"].eq(0).all()  # of zeros there is no ratio
    nn.init.uniform_(chain.tail[2].bias, 0.1, 0.3)
    (start,) = fit([()], replace(RECIPE, epochs=1, batch_size=64, lr=1e-300, head_lr=None, weight_decay=0.0), chain)
    network, head, shares = auto_rgn(chain, recipe, start.weights["head"])
    assert torch.cat(shares).min() < 0.2 and not torch.allclose(shares[0], shares[2], rtol=0.05)
    fits = fit(["all", ("block1",)], [recipe, RECIPE_OF_FOUR], chain, engine=engine)
    for name, part in zip(network.part_names, network.parts, strict=True):
        for key, tensor in part.state_dict().items():
            torch.testing.assert_close(fits[0].weights[name][key], tensor, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fits[0].weights["head"]["weight"], head.weight.detach(), rtol=1e-6, atol=1e-8)
    bn = fits[0].weights["block1"]["bn.weight"]
    assert (
        torch.equal(bn, chain.part("block1").bn.weight)
        and count_trained(tune_parts(chain, ["block1"], recipe).values()) == 6 * 6 * 9
    )
    alone = fit([("block1",)], RECIPE_OF_FOUR, chain, engine=engine)[0]  # a neighbour keeps its rates
    torch.testing.assert_close(fits[1].losses, alone.losses, rtol=1e-10, atol=1e-12)


def test_a_probed_readout_is_what_linear_probing_learns():
    recipe = replace(RECIPE, lr=1e-12, head_start="probe", weight_decay=0.0)
    probed, probing = fit([("block2",), ()], recipe)
    alone = fit([()], replace(RECIPE, lr=3e-2, head_lr=None, weight_decay=0.0))[0]
    for key in ("weight", "bias"):
        torch.testing.assert_close(probed.weights["head"][key], alone.weights["head"][key], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(probing.weights["head"][key], alone.weights["head"][key])


@pytest.mark.parametrize("siamese", [False, True])
def test_a_source_readout_starts_as_the_pretrained_one(siamese):
    chain = sourced_chain()
    recipe = replace(RECIPE, lr=1e-12, head_lr=1e-12, head_start="source", siamese=siamese, bn="frozen")
    (own,) = fit([("block2",)], recipe, chain)
    weight = own.weights["head"]["weight"]
    assert weight.shape == (3, 12 if siamese else 6)
    halves = weight.chunk(2, dim=1) if siamese else [weight]
    torch.testing.assert_close(sum(halves), chain.source_head.weight.detach(), rtol=1e-9, atol=1e-9)


def test_a_source_readout_of_other_classes_is_refused():
    with pytest.raises(ValueError, match='"source".*has none for the task\'s 3 classes'):
        fit([()], replace(RECIPE, head_start="source"), tiny_chain())
    chain = sourced_chain(torch.float32)
    with pytest.raises(ValueError, match="one of 3 classes for the task's 5 classes"):
        fit([()], replace(RECIPE, head_start="source"), chain, num_classes=5)


def test_a_siamese_readout_sees_frozen_features_that_cannot_drift():
    """By hand: frozen features in front, tuned ones behind, and the first half sees the pretrained network exactly."""
    chain = sourced_chain(torch.float32)
    before = chain.fingerprint
    (own,) = fit([("block2",)], replace(RECIPE, siamese=True, bn="batch"), chain, validation=TRAIN)
    assert chain.fingerprint == before
    tuned = copy.deepcopy(chain)
    tuned.part("block2").load_state_dict(own.weights["block2"])
    assert not torch.equal(tuned.part("block2").bn.running_mean, chain.part("block2").bn.running_mean)
    with torch.no_grad():
        x = chain.normalize(TRAIN.images)
        features = torch.cat([chain.eval()(x), tuned.eval()(x)], dim=1)
    logits = features @ own.weights["head"]["weight"].T + own.weights["head"]["bias"]
    assert (logits.argmax(1) == TRAIN.labels).float().mean().item() == pytest.approx(own.accuracy)


def test_without_tuned_blocks_the_recipe_is_that_of_linear_probing():
    plain = {depth: fit([()], replace(RECIPE, head_depth=depth).for_probing())[0] for depth in (1, 2)}
    for changes in VARIANTS.values():
        if changes.get("head_start") != "source":
            (own,) = fit([()], replace(RECIPE, **changes).for_probing())
            assert torch.equal(own.losses, plain[changes.get("head_depth", 1)].losses)


def test_parts_are_put_in_place_by_name():
    chain: Chain = tiny_chain()
    stem, block, tail = nn.Identity(), nn.ReLU(), nn.Flatten()
    put_parts(chain, {"block2": block, "stem": stem, "tail": tail})
    assert chain.parts[0] is stem and chain.parts[2] is block and chain.parts[-1] is tail


def test_a_grid_holds_every_combination():
    grid = recipe_grid(RECIPE, lr=[1e-3, 1e-2], bn=["batch", "frozen"])
    assert [(own.lr, own.bn) for own in grid] == [(1e-3, "batch"), (1e-3, "frozen"), (1e-2, "batch"), (1e-2, "frozen")]
    assert all(own.head_lr == RECIPE.head_lr for own in grid) and recipe_grid(RECIPE) == [RECIPE]
    with pytest.raises(ValueError, match="no rate; it has epochs, lr"):
        recipe_grid(RECIPE, rate=[1])
    with pytest.raises(ValueError, match="lr is \\[\\]"):
        recipe_grid(RECIPE, lr=[])
    with pytest.raises(TypeError, match="bn is 'batch'"):
        recipe_grid(RECIPE, bn="batch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lora", "params": "bias"}, "params is 'bias' beside adapter 'lora'"),
        ({"adapter": "lora", "lr_scaling": "rgn"}, 'lr_scaling is "rgn" beside adapter "lora"'),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        replace(RECIPE, **changes)
