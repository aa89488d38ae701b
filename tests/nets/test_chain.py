"""The chain and its trainable state: frozen is frozen, whatever the caller does."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subtuning_lab.engine.fit import fit_together
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.nets.chain import (
    Chain,
    check_still,
    check_tensors,
    count_parameters,
    in_order,
    set_trainable,
    without_dropout,
)
from subtuning_lab.nets.families import as_chain
from subtuning_lab.search.profiles import finetuning_profile
from subtuning_lab.study.study import Study
from tests.helpers import Residual, tiny_chain, tiny_task


def vision_transformer() -> Chain:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return as_chain(VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2), name="vit")


def residual_network() -> Chain:
    from subtuning_lab.nets.registry import load_backbone

    return load_backbone("cifar_resnet8", weights="random", stem_stride=2)


NETWORKS = {"own": tiny_chain(), "vit": vision_transformer(), "resnet": residual_network()}


def state(chain: Chain) -> dict[str, dict[str, torch.Tensor]]:
    return {name: copy.deepcopy(chain.part(name).state_dict()) for name in chain.part_names}


def changed(before, after) -> set[str]:
    """Names of the parts in which any parameter or buffer has another bit."""
    return {
        name for name in before if any(not torch.equal(before[name][key], after[name][key]) for key in before[name])
    }


def has_parameters(chain: Chain, name: str) -> bool:
    return any(True for _ in chain.part(name).parameters())


def train_by_hand(chain: Chain, train_mode: str, steps: int = 2) -> None:
    """What a caller might write who knows nothing of freezing."""
    model = nn.Sequential(chain, nn.Linear(chain.num_features, 3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        if train_mode == "every submodule":
            for module in chain.modules():
                module.training = True
        else:
            (chain if train_mode == "backbone" else model).train()
        optimizer.zero_grad()
        images = torch.randn(6, 3, 8, 8, generator=generator)
        nn.functional.cross_entropy(model(images), torch.arange(6) % 3).backward()
        optimizer.step()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_everything_outside_the_subset_is_bit_identical(data):
    name = data.draw(st.sampled_from(sorted(NETWORKS)))
    chain = copy.deepcopy(NETWORKS[name])
    subset = data.draw(st.sets(st.sampled_from(chain.part_names)))
    bn = data.draw(st.sampled_from(["batch", "frozen"]))
    mode = data.draw(st.sampled_from(["backbone", "wrapping module", "every submodule"]))
    set_trainable(chain, subset, bn)
    before = state(chain)
    train_by_hand(chain, mode)
    assert changed(before, state(chain)) == {part for part in subset if has_parameters(chain, part)}
    assert chain.trainable == subset


@pytest.mark.parametrize("name", NETWORKS)
def test_linear_probing_changes_nothing_and_all_changes_everything(name):
    chain = copy.deepcopy(NETWORKS[name])
    before, fingerprint = state(chain), chain.fingerprint
    train_by_hand(set_trainable(chain, []), "every submodule")
    assert changed(before, state(chain)) == set() and chain.fingerprint == fingerprint
    assert not any(p.requires_grad for p in chain.parameters())
    train_by_hand(set_trainable(chain, "all"), "backbone")
    assert changed(before, state(chain)) == {part for part in chain.part_names if has_parameters(chain, part)}
    assert {"stem", *chain.block_names} <= changed(before, state(chain))
    assert all(p.requires_grad for part in chain.parts for p in part.parameters())


def test_blocks_without_the_stem_are_another_subset_than_all(chain):
    set_trainable(chain, chain.block_names)
    assert not any(p.requires_grad for part in ("stem", "tail") for p in chain.part(part).parameters())
    assert chain.trainable == {"block1", "block2", "block3"} < set(chain.part_names)


@pytest.mark.parametrize(("bn", "moves"), [("batch", True), ("frozen", False)])
def test_batchnorm_statistics_follow_the_mode(bn, moves):
    chain = set_trainable(tiny_chain(), ["block2"], bn)
    before = state(chain)
    train_by_hand(chain, "every submodule")
    after = state(chain)
    for key in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.equal(before["block2"][key], after["block2"][key]) != moves
        assert torch.equal(before["block1"][key], after["block1"][key])
    assert not torch.equal(before["block2"]["bn.weight"], after["block2"]["bn.weight"])


class Average(nn.Module):
    """Subtracts a moving average of its channels (batch, 6, height, width), kept under a name."""

    def __init__(self, name: str, always: bool = False):
        super().__init__()
        self.conv, self.name, self.always = nn.Conv2d(6, 6, 1), name, always
        self.register_buffer(name, torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, average = self.conv(x), getattr(self, self.name)
        if self.training or self.always:
            average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return x - average.view(6, 1, 1)


@pytest.mark.parametrize("name", ["average", "running_mean"])
def test_averages_of_ones_own_modules_are_frozen_as_norms_are(name):
    x = torch.rand(2, 6, 4, 4)
    for bn in ("frozen", "batch"):
        chain = set_trainable(with_block(Average(name)), ["block2"], bn).train()
        chain.part("block2")(x)
        moved = 0.1 * chain.part("block2").conv(x).mean((0, 2, 3)) * (bn == "batch")
        torch.testing.assert_close(getattr(chain.part("block2"), name), moved)
    vectors = with_block(nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)))
    before = state(set_trainable(vectors, ["block2"], "frozen").train())
    vectors.part("block2")(x)
    assert not changed(before, state(vectors))


def test_buffers_that_move_in_eval_mode_are_refused():
    chain = without_dropout(with_block(Average("average", always=True)))
    with pytest.raises(ValueError, match="block2 of custom changes its buffers in eval mode.*only where self.training"):
        check_still(chain, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("kind", ["scripted", "traced", "inside"])
def test_torchscript_is_refused_since_it_cannot_be_frozen(kind):
    relu = torch.jit.trace(nn.ReLU(), torch.ones(1)) if kind == "traced" else torch.jit.script(nn.ReLU())
    with pytest.raises(TypeError, match="block2 is .*must be a torch.nn.Module in Python; .*TorchScript"):
        with_block(nn.Sequential(relu) if kind == "inside" else relu)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_cannot_be_copied_are_refused():
    with pytest.raises(ValueError, match="weight of block2 is computed from other weights.*parametrizations"):
        with_block(nn.utils.weight_norm(nn.Conv2d(6, 6, 1)))


def test_frozen_parts_stay_in_eval_mode_and_tuned_ones_obey(chain):
    set_trainable(chain, ["block2"]).train()
    assert [part.training for part in chain.parts] == [False, False, True, False, False]
    assert not chain.blocks[0].bn.training and chain.blocks[1].bn.training
    chain.eval()
    assert not any(module.training for part in chain.parts for module in part.modules())
    set_trainable(chain.train(), ["block2"], "frozen")
    assert chain.blocks[1].training and not chain.blocks[1].bn.training


def test_set_trainable_declares_the_whole_state(chain):
    """What was declared before leaves no trace."""
    first = set_trainable(chain, ["stem", "block3"], "frozen").train()
    assert first is chain
    set_trainable(chain, ["block1"])
    fresh = set_trainable(tiny_chain(), ["block1"]).train()
    assert [p.requires_grad for p in chain.parameters()] == [p.requires_grad for p in fresh.parameters()]
    assert [m.training for m in chain.modules()] == [m.training for m in fresh.modules()]


def test_a_part_that_gets_frozen_is_safe_from_an_optimizer_that_still_holds_it(chain):
    set_trainable(chain, ["block1"])
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.1, weight_decay=0.5)
    chain(torch.randn(4, 3, 8, 8)).sum().backward()
    set_trainable(chain, ["block2"])
    before = state(chain)
    chain(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert changed(before, state(chain)) == {"block2"}


def test_subsets_are_unordered_and_read_in_the_networks_order(chain):
    assert in_order(chain, ["tail", "block2", "stem", "block2"]) == ("stem", "block2", "tail")
    assert in_order(chain, "all") == chain.part_names
    assert set_trainable(chain, (name for name in ["block3", "block1"])).trainable == {"block1", "block3"}


def test_parameters_are_counted_by_hand(chain):
    block = 6 * 6 * 9 + 6 + 6
    assert count_parameters(chain, []) == 0
    assert count_parameters(chain, ["block1"]) == block
    assert count_parameters(chain, ["stem", "block1", "block1"]) == 3 * 6 * 9 + 12 + block
    assert count_parameters(chain, "all") == 3 * 6 * 9 + 12 + 3 * block + 12
    assert count_parameters(chain, "all") == sum(p.numel() for p in chain.parameters())


def test_normalization_of_bytes_and_of_floats_is_the_same(chain):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images.double() / 255 - torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)) / torch.tensor(
        (0.229, 0.224, 0.225)
    ).view(3, 1, 1)
    assert torch.allclose(chain.normalize(images).double(), expected, atol=1e-5)
    assert torch.equal(chain.normalize(images), chain.normalize(images.float() / 255))


# ---------------------------------------------------------------- the fingerprint


def with_block(block: nn.Module) -> Chain:
    plain = tiny_chain()
    return Chain(plain.stem, [plain.blocks[0], block], plain.tail, 6)


def test_equal_networks_have_equal_fingerprints():
    assert tiny_chain().fingerprint == tiny_chain().fingerprint == copy.deepcopy(tiny_chain()).fingerprint
    chain = tiny_chain()
    before = chain.fingerprint
    set_trainable(chain, "all", "frozen").train()
    chain.blocks.to(memory_format=torch.channels_last)
    assert chain.fingerprint == before


def test_one_bit_changes_the_fingerprint():
    for edit in (
        lambda chain: chain.blocks[1].conv.weight.data[0, 0, 0].add_(1e-6),
        lambda chain: chain.blocks[1].bn.running_mean.add_(1),
        lambda chain: chain.stem[0].weight.data.mul_(-1),
        lambda chain: chain.mean.add_(0.1),
    ):
        chain = tiny_chain()
        edit(chain)
        assert chain.fingerprint != tiny_chain().fingerprint


def test_a_network_that_computes_something_else_has_another_fingerprint():
    """Strides and activations have no weights, but scores depend on them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    strided = nn.Conv2d(6, 6, 3, padding=1, stride=2)
    strided.load_state_dict(conv.state_dict())
    blocks = [nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.GELU()), nn.Sequential(strided, nn.ReLU())]
    assert len({with_block(block).fingerprint for block in blocks}) == 3


def test_the_fingerprint_does_not_depend_on_where_objects_lie():
    class Applied(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def extra_repr(self):
            return repr(self.function)

        def forward(self, x):
            return self.function(x)

    def double(x):
        return 2 * x

    first, kept = Applied(double), []
    kept.append(lambda x: x)

    def double(x):
        return 2 * x

    assert repr(first) != repr(Applied(double))
    assert with_block(first).fingerprint == with_block(Applied(double)).fingerprint


LIKE_EACH_OTHER = {
    "activations": [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(), nn.LeakyReLU(0.2), nn.SiLU()],
    "pooling": [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, ceil_mode=True)],
    "eps": [nn.BatchNorm2d(6), nn.BatchNorm2d(6, eps=1e-3), nn.BatchNorm2d(6, momentum=0.2)],
    "groups": [nn.GroupNorm(groups, 6) for groups in (1, 2, 3)],
    "convolutions": [
        nn.Conv2d(6, 6, 3, **options)
        for options in ({}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"})
    ],
    "dropout": [nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.0)],
    "heads": [nn.MultiheadAttention(6, heads) for heads in (1, 2)],
    "order": [nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), nn.Sequential(nn.AvgPool2d(2), nn.ReLU())],
}


@pytest.mark.parametrize("blocks", LIKE_EACH_OTHER.values(), ids=LIKE_EACH_OTHER)
def test_settings_without_weights_are_told_apart(blocks):
    for block in blocks:
        for tensor in block.state_dict().values():
            tensor.fill_(1)
    assert len({with_block(block).fingerprint for block in blocks}) == len(blocks)


def test_numpys_numbers_count_as_numbers():
    strides = [nn.Conv2d(6, 6, 1, stride=stride, bias=False) for stride in (1, np.int64(1), 2, np.int64(2))]
    for conv in strides:
        nn.init.ones_(conv.weight)
    first, same, other, same_other = (with_block(conv).fingerprint for conv in strides)
    assert first == same != other == same_other


def test_normalization_may_be_whole_numbers_or_an_array():
    parts = nn.Identity(), [nn.Identity()], nn.Identity(), 3
    plain, other = Chain(*parts, mean=(0, 0, 0), std=(1, 1, 1)), Chain(*parts, mean=np.zeros(3), std=np.ones(3))
    images = torch.rand(1, 3, 2, 2)
    assert plain.fingerprint == other.fingerprint and torch.equal(plain.normalize(images), images)


def test_normalization_and_names_are_part_of_the_fingerprint():
    plain = tiny_chain()
    own = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    chains = [
        Chain(plain.stem, plain.blocks, plain.tail, 6),
        Chain(plain.stem, plain.blocks, plain.tail, 6, mean=own["mean"]),
        Chain(plain.stem, plain.blocks, plain.tail, 6, std=own["std"]),
        Chain(plain.stem, dict(zip("abc", plain.blocks, strict=True)), plain.tail, 6),
    ]
    assert len({chain.fingerprint for chain in chains}) == 4
    assert Chain(plain.stem, plain.blocks, plain.tail, 6, name="x").fingerprint == chains[0].fingerprint


class Scaled(nn.Module):
    """A module of one's own, whose settings no library knows."""

    def __init__(self, factor: object, table: list[float] | None = None) -> None:
        super().__init__()
        self.factor, self._calls = factor, 0
        self.register_buffer("table", torch.tensor(table or [1.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        return x * self.factor * self.table


def test_modules_of_ones_own_are_told_apart_by_their_public_values():
    blocks = [Scaled(1), Scaled(2), Scaled((1, 2)), Scaled("1"), Scaled({"a": 1}), Scaled(1, [2.0])]
    blocks += [Scaled(torch.relu), Scaled(torch.sigmoid), Scaled(functools.partial(torch.clamp, min=1))]
    blocks += [Scaled(functools.partial(torch.clamp, min=2)), Scaled(torch.ones(2)), Scaled(torch.zeros(2))]
    assert len({with_block(block).fingerprint for block in blocks}) == len(blocks)
    chain = with_block(Scaled(1))
    before = chain.fingerprint
    chain(torch.zeros(1, 3, 8, 8))
    assert chain.fingerprint == before


def vit_of_a_release(monkeypatch, release) -> str:
    """Fingerprint of a vision transformer after a change that a release of torch or timm could bring."""
    with monkeypatch.context() as patch:
        release(patch)
        return vision_transformer().fingerprint


def other_print(patch):
    for kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout):
        patch.setattr(kind, "extra_repr", lambda self: "printed another way")
    patch.setattr(nn.Module, "__repr__", lambda self: "all modules look alike now")


def new_attributes(patch):
    original = nn.Module.__init__

    def with_more(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.compiled_hint, self.new_option, self.keepdim = "auto", 3, False

    patch.setattr(nn.Module, "__init__", with_more)


def other_order(patch):
    original = nn.Module.state_dict

    def backwards(self, *args, **kwargs):
        return (
            dict(reversed(original(self, *args, **kwargs).items()))
            if not args and not kwargs
            else original(self, *args, **kwargs)
        )

    patch.setattr(nn.Module, "state_dict", backwards)


def moved_classes(patch):
    patch.setattr(nn.GELU, "__module__", "torch.nn.somewhere_else")


@pytest.mark.parametrize("release", [other_print, new_attributes, other_order, moved_classes])
def test_a_release_of_a_library_leaves_the_fingerprint(monkeypatch, release):
    assert vit_of_a_release(monkeypatch, release) == vision_transformer().fingerprint


def test_a_release_that_adds_modules_which_do_nothing_leaves_the_fingerprint():
    chain = tiny_chain()
    for block in chain.blocks:
        block.new_norm, block.new_drop = nn.Identity(), nn.Dropout(0.0)
    assert chain.fingerprint == tiny_chain().fingerprint
    chain.blocks[0].new_drop.p = 0.5
    assert chain.fingerprint != tiny_chain().fingerprint


def test_files_that_are_out_there_stay_loadable():
    """The bundled backbones' fingerprints; whoever changes them makes every shared file of a tuned task useless."""
    from subtuning_lab.nets.registry import load_backbone

    known = {"lab-resnet": "ca0971baadd0195a", "lab-vit": "ae7cb72d7d5d7f77"}
    assert {name: load_backbone(name).fingerprint[:16] for name in known} == known


# ---------------------------------------------------------------- a chain of one's own


class Plain(nn.Module):
    """What a newcomer has: a network that knows nothing of chains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(torch.relu(self.embed(x))))).relu().mean((2, 3))


def own_chain() -> tuple[Plain, Chain]:
    torch.manual_seed(0)
    net = Plain()
    blocks = {"first": nn.Sequential(net.first, nn.ReLU()), "second": nn.Sequential(net.second, nn.ReLU())}
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stem = nn.Sequential(net.embed, nn.ReLU())
    return net, Chain(stem, blocks, pool, 8, input_size=(3, 8, 8), name="plain", source_head=net.out)


def test_a_chain_of_ones_own_computes_the_network():
    net, chain = own_chain()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(chain(images), net.features(images), atol=1e-6)
    assert chain.part_names == ("stem", "first", "second", "tail")
    assert not any(p.requires_grad for p in net.parameters())  # source_head is frozen too


def test_a_chain_of_ones_own_works_everywhere():
    _, chain = own_chain()
    task = tiny_task()
    fits = fit_together(chain, [[], ["first"], "all"], task.train, Recipe(epochs=2), num_classes=3)
    assert [fit.blocks for fit in fits] == [frozenset(), {"first"}, set(chain.part_names)]
    study = Study(chain, task, Recipe(epochs=1), folds=2, device="cpu", progress=False)
    assert finetuning_profile(study).table["label"].tolist()[:2] == ["first", "second"]
    tuned = study.fit(["second"])
    assert set(tuned.weights) == {"second", "head"} and 0 <= study.test(["second"]).mean <= 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"blocks": []}, ValueError, "blocks is empty"),
        ({"blocks": {"stem": Residual(6)}}, ValueError, "stem is reserved"),
        ({"blocks": {"all": Residual(6)}}, ValueError, "all is reserved"),
        ({"blocks": {"head": Residual(6)}}, ValueError, "head is reserved"),
        ({"blocks": {"a|b": Residual(6)}}, ValueError, r"'a\|b'"),
        ({"blocks": {"": Residual(6)}}, ValueError, "''"),
        ({"blocks": {3: Residual(6)}}, ValueError, "3"),
        ({"blocks": [Residual(6)] * 2}, ValueError, "block1 and block2 share parameters"),
        ({"blocks": Residual(6)}, TypeError, "blocks is a Residual; .*list of modules, or modules by name"),
        ({"blocks": "layer1"}, TypeError, "blocks is 'layer1'; it must be a list of modules"),
        ({"blocks": [torch.relu]}, TypeError, "block1 is <.*relu.*; it must be a torch.nn.Module"),
        ({"stem": lambda x: x}, TypeError, "stem is <function .*; it must be a torch.nn.Module"),
        ({"tail": None}, TypeError, "tail is None; it must be a torch.nn.Module"),
        ({"num_features": 0}, ValueError, "num_features is 0"),
        ({"num_features": 6.0}, TypeError, "num_features is 6.0"),
        ({"mean": (0.5,)}, ValueError, r"mean is \(0.5,\); it must be a list of 3 values"),
        ({"std": (0.5, 0, 0.5)}, ValueError, r"std\[1\] is 0; it must be a finite number above 0"),
        ({"input_size": (1, 28, 28)}, ValueError, r"input_size is \(1, 28, 28\); .*RGB"),
        ({"input_size": 28}, TypeError, "input_size is 28"),
        ({"name": ""}, ValueError, "name is ''"),
        ({"source_head": nn.Conv2d(6, 3, 1)}, TypeError, "source_head is .*Conv2d.*Linear"),
    ],
)
def test_what_makes_no_chain_is_refused(changes, error, message):
    parts = {"stem": nn.Conv2d(3, 6, 3), "blocks": [Residual(6)], "tail": nn.Flatten(), "num_features": 6}
    with pytest.raises(error, match=message):
        Chain(**parts | changes)


def test_blocks_come_in_any_container():
    blocks = {"a": Residual(6), "b": Residual(6)}
    ends = (nn.Conv2d(3, 6, 3), nn.Flatten(), np.int64(6))
    for container in (blocks, nn.ModuleDict(blocks)):
        assert Chain(ends[0], container, *ends[1:]).block_names == ("a", "b")
    for container in ([*blocks.values()], nn.ModuleList(blocks.values()), nn.Sequential(*blocks.values())):
        chain = Chain(ends[0], container, *ends[1:], input_size=np.array([3, 8, 8]))
        assert chain.block_names == ("block1", "block2")
    assert type(chain.num_features) is int and chain.input_size == (3, 8, 8)


def test_moving_a_chain_moves_its_normalization(chain):
    assert chain.double().mean.dtype == chain(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------- chance, statistics, precision


class Noisy(nn.Module):
    """A kind of dropout that nobody knows."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if self.source == "torch, rarely":
            return x * (torch.rand(()) < 0.999)
        return x * {"python": random.random, "numpy": np.random.rand}[self.source]()


def with_chance() -> dict[str, nn.Module]:
    from timm.layers import DropBlock2d, DropPath, PatchDropout
    from torchvision.models.swin_transformer import SwinTransformerBlock
    from torchvision.ops import StochasticDepth

    as_map = nn.Unflatten(2, (4, 4))
    swin = SwinTransformerBlock(6, 2, [2, 2], [1, 1], dropout=0.5, attention_dropout=0.5, stochastic_depth_prob=0.5)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True)
    return {
        "Dropout": nn.Dropout(0.5),
        "AlphaDropout": nn.AlphaDropout(0.5),
        "Dropout2d": nn.Dropout2d(0.5),
        "RReLU": nn.Sequential(nn.RReLU(), nn.Conv2d(6, 6, 1)),
        "StochasticDepth": StochasticDepth(0.5, "row"),
        "StochasticDepth, batch": StochasticDepth(0.01, "batch"),
        "DropPath": DropPath(0.5),
        "DropBlock": DropBlock2d(0.5),
        "PatchDropout": nn.Sequential(
            nn.Flatten(2), Transposed(), PatchDropout(0.5, 0), Transposed(), nn.AdaptiveAvgPool1d(16), as_map
        ),
        "attention": nn.Sequential(nn.Flatten(2), Transposed(), SelfAttention(), Transposed(), as_map),
        "encoder layer": nn.Sequential(nn.Flatten(2), Transposed(), layer, Transposed(), as_map),
        "swin of torchvision": nn.Sequential(Channels(), swin, Channels()),
    }


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class Channels(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(1, 3) if x.shape[1] == 6 else x.movedim(3, 1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", with_chance())
def test_known_kinds_of_chance_are_off_in_trainings(kind):
    """In train mode the copy computes what the network computes in eval mode."""
    chain = with_block(with_chance()[kind])
    images = torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match="block2 of custom draws random numbers in train mode"):
        check_still(chain, images)
    still = without_dropout(chain)
    check_still(still, images)
    x = torch.randn(4, 6, 4, 4)
    torch.testing.assert_close(still.blocks[1].train()(x), chain.blocks[1].eval()(x))
    assert chain.fingerprint == with_block(chain.blocks[1]).fingerprint


@pytest.mark.parametrize("source", ["torch, rarely", "python", "numpy"])
def test_chance_that_nobody_knows_is_refused_and_left_as_it_stood(source):
    still, images = without_dropout(with_block(Noisy(source))), torch.randn(4, 3, 8, 8)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="block2 of custom draws random numbers"):
        check_still(still, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rate_that_acts_in_eval_mode_is_refused():
    class Scaled(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.dropout

    scaled = Scaled()
    scaled.dropout = 0.5
    still = without_dropout(with_block(nn.Sequential(scaled, nn.Dropout(0.5))))
    with pytest.raises(ValueError, match=r"block2 of custom computes .* in eval mode .*give dropout, p another name"):
        check_still(still, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("name", [*NETWORKS, "spectral norm"])
def test_a_part_that_changes_as_it_runs_draws_nothing(name):
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1))
    chain = NETWORKS[name] if name in NETWORKS else with_block(conv)
    before = chain.fingerprint
    check_still(without_dropout(chain), torch.randn(4, 3, 8, 8))
    assert chain.fingerprint == before


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_scale.lerp_(x.detach().std(), 0.1)
        return x / self.running_scale


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(6), nn.InstanceNorm2d(6, track_running_stats=True), nn.SyncBatchNorm(6), OwnNorm()]
)
def test_frozen_statistics_stand_still_whatever_the_norm(norm):
    chain = with_block(nn.Sequential(nn.Conv2d(6, 6, 1), norm))
    if not isinstance(norm, nn.SyncBatchNorm):  # whose train mode is for GPUs
        before = state(set_trainable(chain, ["block2"], "batch"))
        chain.train()(torch.randn(4, 3, 8, 8))
        assert changed(before, state(chain)) == {"block2"}
    before = state(set_trainable(chain, ["block2"], "frozen"))
    chain.train()(torch.randn(4, 3, 8, 8))
    assert changed(before, state(chain)) == set()


def test_tensors_that_spoil_a_training_are_named(chain):
    check_tensors(chain)
    for part in chain.parts:
        part.half()
    with pytest.raises(ValueError, match=r"0.weight of stem is torch.float16, the normalization of tiny is .*float32"):
        check_tensors(chain)
    check_tensors(chain.half())
    chain.blocks[1].bn.running_var[2] = torch.nan
    with pytest.raises(ValueError, match="bn.running_var of block2 of tiny holds numbers that are not finite"):
        check_tensors(chain)
