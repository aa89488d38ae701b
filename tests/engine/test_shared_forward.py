"""One pass equals separate trainings: in float64, however candidates are packed, and whoever their neighbours are."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from subtuning_lab import Recipe, load_backbone
from subtuning_lab.engine import batches as trunks
from subtuning_lab.engine import shared_forward as one_pass
from subtuning_lab.engine.fit import ENGINES, fit_together
from subtuning_lab.engine.memory import Prepared, bytes_per_candidate, pack
from subtuning_lab.nets.chain import Chain, copy_weights, set_trainable
from subtuning_lab.nets.families import as_chain
from subtuning_lab.nets.fuse import fold_batchnorm
from tests.helpers import Residual, own_blocks, randomize_norms, tiny_chain, tiny_split

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, weight_decay=0.1, head_lr=3e-2)
TRAIN, VALIDATION = tiny_split(16), tiny_split(9, seed=7)


def vision_transformer() -> Chain:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=3)
    return as_chain(model, name="vit")


def residual_network() -> Chain:
    chain = load_backbone("cifar_resnet8", weights="random", stem_stride=2)
    randomize_norms(chain)
    return chain


BACKBONES = {"resnet": residual_network, "vit": vision_transformer, "own": tiny_chain}


@cache
def backbone(name: str) -> Chain:
    return BACKBONES[name]().double()


def subsets_of(chain: Chain) -> tuple[tuple[str, ...], ...]:
    a, b, c = chain.block_names
    found_by_greedy = (b,), (b, c), (b, c, a)
    return (), (a,), (c,), (a, b), (a, c), ("tail",), ("stem",), ("stem", b), chain.part_names, *found_by_greedy


def fit(chain: Chain, subsets, recipe=RECIPE, **options):
    options = {"num_classes": 3, "validation": VALIDATION, "seed": 3} | options
    return fit_together(chain, subsets, TRAIN, recipe, **options)


def largest_differences(fits, references) -> tuple[float, float]:
    """Of the losses, and of the weights and buffers; everything else must be equal."""
    losses, weights = [0.0], [0.0]
    for ours, reference in zip(fits, references, strict=True):
        assert (ours.blocks, ours.epochs) == (reference.blocks, reference.epochs)
        assert (ours.accuracy is None) == (reference.accuracy is None)
        assert ours.weights.keys() == reference.weights.keys() == ours.blocks | {"head"}
        losses.append(float((ours.losses - reference.losses).abs().max()))
        if ours.accuracy is not None:
            assert ours.accuracy == reference.accuracy
            losses.append(abs(ours.validation_loss - reference.validation_loss))
        for part, tensors in reference.weights.items():
            assert tensors.keys() == ours.weights[part].keys()
            weights += [float((ours.weights[part][key] - tensor).abs().max()) for key, tensor in tensors.items()]
    return max(losses), max(weights)


@cache
def references(name: str, bn: str):
    chain = backbone(name)
    return fit(chain, subsets_of(chain), Recipe(**RECIPE.as_dict() | {"bn": bn}), engine="sequential")


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("bn", ["batch", "frozen"])
@pytest.mark.parametrize("name", BACKBONES)
def test_one_pass_equals_separate_trainings(name, bn, fold, stored, monkeypatch):
    monkeypatch.setattr(trunks, "_SHARE", float(stored))  # of memory, for the trunk's activations
    chain = backbone(name)
    before = chain.fingerprint
    fits = fit(chain, subsets_of(chain), Recipe(**RECIPE.as_dict() | {"bn": bn}), fold=fold)
    losses, weights = largest_differences(fits, references(name, bn))
    assert losses < 1e-10
    assert weights < 1e-10  # rounding, which BatchNorm over few values enlarges step by step
    assert chain.fingerprint == before


@pytest.mark.parametrize("name", BACKBONES)
def test_one_pass_has_the_bits_of_separate_trainings_where_nothing_is_folded_or_stored(name):
    chain, recipe = backbone(name), replace(RECIPE, augment="flip")
    ours, reference = (fit(chain, subsets_of(chain), recipe, fold=False, engine=engine) for engine in ENGINES)
    assert largest_differences(ours, reference) == (0, 0)


def test_the_number_of_threads_shows_in_rounding_only():
    chain, threads, fits = backbone("resnet"), torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            fits.append(fit(chain, subsets_of(chain)))
    finally:
        torch.set_num_threads(threads)
    assert max(largest_differences(*fits)) < 1e-10


def test_batchnorm_modes_differ():
    """Else the equality above would say nothing about them."""
    ours, other = references("resnet", "batch"), references("resnet", "frozen")
    assert torch.equal(ours[0].losses, other[0].losses)  # linear probing tunes no BatchNorm
    assert all(not torch.equal(a.losses, b.losses) for a, b in zip(ours[1:5], other[1:5], strict=True))


def test_training_trains_and_does_not_touch_the_rest():
    chain = backbone("resnet")
    for fitted in references("resnet", "batch"):
        assert fitted.losses[-2:].mean() < fitted.losses[:2].mean()
        for name in fitted.blocks:
            start, end = chain.part(name).state_dict(), fitted.weights[name]
            assert all(not torch.equal(start[key], end[key]) for key in start)


def test_recipes_may_differ_between_subsets():
    chain = backbone("own")
    subsets = [(), ("block1",), ("block1",), ("block1", "block3"), "all"]
    changes = [
        {"lr": 0.1},
        {"bn": "frozen"},
        {"lr": 1e-4},
        {"weight_decay": 0.5, "label_smoothing": 0.2},
        {"head_lr": 1e-4},
    ]
    recipes = [Recipe(**RECIPE.as_dict() | change) for change in changes]
    fits = fit(chain, subsets, recipes)
    alone = [fit(chain, [blocks], own, engine="sequential")[0] for blocks, own in zip(subsets, recipes, strict=True)]
    assert max(largest_differences(fits, alone)) < 1e-10
    assert not torch.equal(fits[1].losses, fits[2].losses)


@pytest.mark.parametrize("augment", ["shift_flip", "crop_flip"])
def test_every_candidate_sees_the_same_views(augment):
    chain, recipe = backbone("own"), Recipe(**RECIPE.as_dict() | {"augment": augment, "image_size": 12})
    subsets = [(), ("block2",), "all"]
    reference = fit(chain, subsets, recipe, engine="sequential")
    assert max(largest_differences(fit(chain, subsets, recipe), reference)) < 1e-10
    assert max(largest_differences(fit(chain, subsets, recipe, memory_limit=1), reference)) < 1e-10
    plain = Recipe(**RECIPE.as_dict() | {"image_size": 12})
    assert not torch.equal(fit(chain, [()], plain)[0].losses, reference[0].losses)


@pytest.mark.parametrize("n_passes", [12, 2])
def test_packing_does_not_show(n_passes):
    chain, passes = backbone("resnet"), []
    subsets = subsets_of(chain)
    images = torch.zeros(4, 3, 8, 8, dtype=torch.float64)
    costs = bytes_per_candidate(chain, images, [frozenset(blocks) for blocks in subsets], 8)
    limit = 1 if n_passes == len(subsets) else sum(costs) * 2 // 3
    fits = fit(chain, subsets, memory_limit=limit, on_pass=passes.append)
    assert len(passes) in (n_passes, n_passes - (limit == 1))  # linear probing costs nothing, so it travels along
    assert sorted(place for done in passes for place in done) == list(range(len(subsets)))
    losses, weights = largest_differences(fits, references("resnet", "batch"))
    assert losses < 1e-10 and weights < 1e-10


def test_a_candidate_does_not_depend_on_its_neighbours():
    chain = backbone("own")
    wanted = ("block2",)
    (alone,) = fit(chain, [wanted])
    for neighbours in ([()], ["all", ("block3",)], [("block1",), ("block1", "block2"), ("tail",)]):
        together = fit(chain, [*neighbours, wanted])[-1]
        assert max(largest_differences([together], [alone])) < 1e-12


def test_a_candidate_that_diverges_does_not_harm_its_neighbours():
    chain = backbone("own")
    wild = Recipe(**RECIPE.as_dict() | {"lr": 1e250, "head_lr": 1e250})
    fits = fit(chain, [("block1",), ("block1",), ("block3",)], [wild, RECIPE, RECIPE])
    assert not fits[0].losses.isfinite().all()
    assert max(largest_differences(fits[1:], fit(chain, [("block1",), ("block3",)]))) < 1e-12


def test_early_stopping_is_equal_and_keeps_the_best_epoch():
    chain = backbone("own")
    recipe = Recipe(epochs=8, batch_size=8, lr=0.3, patience=1)
    subsets = [(), ("block1",), ("block3",), "all"]
    fits, reference = fit(chain, subsets, recipe), fit(chain, subsets, recipe, engine="sequential")
    assert max(largest_differences(fits, reference)) < 1e-8
    assert min(f.epochs for f in fits) < recipe.epochs
    assert len({f.epochs for f in fits}) > 1  # a pass goes on with those that haven't stopped
    for stopped in fits:
        assert len(stopped.losses) == 2 * stopped.epochs
        patient = fit(chain, [stopped.blocks], Recipe(**recipe.as_dict() | {"patience": 8}))[0]
        assert patient.validation_loss <= stopped.validation_loss  # never stopping can only find a better epoch


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prepared_backbone_serves_many_calls_with_the_same_numbers(engine, monkeypatch):
    chain = backbone("resnet")
    ready, weights, folds = Prepared(chain), copy_weights({"": chain})[""], []
    monkeypatch.setattr(one_pass, "fold_batchnorm", lambda *given: folds.append(given) or fold_batchnorm(*given))
    for recipe in (RECIPE, replace(RECIPE, lr=0.01, bn="frozen"), RECIPE):
        alone, prepared = (fit(own, subsets_of(chain)[:4], recipe, engine=engine) for own in (chain, ready))
        for one, other in zip(alone, prepared, strict=True):
            assert torch.equal(one.losses, other.losses) and one.accuracy == other.accuracy
    made = len(chain.parts) if engine == "one_pass" else 0
    assert len(folds) == (3 + 1) * made, "once for all calls, or once each"
    assert all(torch.equal(now, weights[name]) for name, now in copy_weights({"": chain})[""].items())


def test_the_order_of_subsets_and_duplicates_do_not_matter():
    chain, subsets = backbone("own"), [("block3",), (), ("block1",), ("block3",)]
    fits, reversed_fits = fit(chain, subsets), fit(chain, subsets[::-1])
    assert [f.blocks for f in fits] == [frozenset(blocks) for blocks in subsets]
    assert max(largest_differences(fits, reversed_fits[::-1])) < 1e-12
    assert max(largest_differences(fits[:1], fits[3:])) < 1e-12


def test_training_mode_and_trainable_state_of_the_given_backbone_do_not_matter():
    chain = tiny_chain(dtype=torch.float64)
    expected = fit(chain, [("block2",)])
    set_trainable(chain, "all").train()
    before = chain.fingerprint
    assert max(largest_differences(fit(chain, [("block2",)]), expected)) < 1e-12
    assert max(largest_differences(fit(chain, [("block2",)], engine="sequential"), expected)) < 1e-12
    assert chain.fingerprint == before and all(p.grad is None for p in chain.parameters())


# ---------------------------------------------------------------- work that is shared


class Counting(nn.Module):
    """Passes its input on and counts images, while gradients are on and off."""

    def __init__(self, inner: nn.Module, counts: dict[str, int], name: str) -> None:
        super().__init__()
        self.inner, self.counts, self.name = inner, counts, name

    def __deepcopy__(self, memo):
        return Counting(deepcopy(self.inner, memo), self.counts, self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts[self.name] = self.counts.get(self.name, 0) + len(x)
        return self.inner(x)


@pytest.mark.parametrize(("augment", "trunk"), [("flip", 1), ("none", 0)])
def test_the_trunk_runs_once_an_epoch_or_once_for_all(augment, trunk):
    """Each part sees its images once frozen for all who are still in the trunk, and once for each who left it.

    Without augmentation the trunk is done with after the first epoch.
    """
    plain, counts = tiny_chain(), {}
    parts = [Counting(part, counts, name) for name, part in zip(plain.part_names, plain.parts, strict=True)]
    chain = Chain(parts[0], parts[1:-1], parts[-1], plain.num_features)
    subsets = [("block2",), ("block2", "block3"), ("block3",), ()]

    def rows(epochs: int) -> dict[str, int]:
        counts.clear()
        fit(chain, subsets, Recipe(epochs=epochs, batch_size=8, augment=augment), validation=None)
        return dict(counts)

    two, four = rows(2), rows(4)  # what a call needs once, for memory and folding, falls out of the difference
    seen = {name: (four[name] - two[name]) / (2 * len(TRAIN)) for name in two}
    own = {"stem": 0, "block1": 0, "block2": 2, "block3": 3, "tail": 3}
    assert seen == {name: trunk + number for name, number in own.items()}


def test_linear_probing_runs_the_network_once_however_many_there_are():
    plain, counts = tiny_chain(), {}
    chain = Chain(Counting(plain.stem, counts, "stem"), list(plain.blocks), plain.tail, plain.num_features)
    fit(chain, [()] * 5, validation=None)
    assert counts["stem"] < 3 * len(TRAIN) * RECIPE.epochs


class Limited(Residual):
    """Has memory for so many images only."""

    def __init__(self, most: int) -> None:
        super().__init__(6)
        self.most, self.seen = most, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        self.seen.append(len(x))
        return super().forward(x)


def limited_chain(most: int) -> Chain:
    plain = tiny_chain()
    torch.manual_seed(0)
    limited = Limited(most)
    return Chain(plain.stem, [*plain.blocks, limited], plain.tail, plain.num_features).double()


def test_out_of_memory_halves_the_pass_and_goes_on_with_the_same_numbers():
    subsets, passes = [("block1",), ("block2",), ("block3",), ("block1", "block3"), ()], []
    fits = fit(limited_chain(16), subsets, on_pass=passes.append, validation=None)  # two candidates of 8 images
    assert 1 < len(passes) <= len(subsets)
    assert max(largest_differences(fits, fit(limited_chain(10**6), subsets, validation=None))) < 1e-12


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(Residual):
        def forward(self, x):
            if torch.is_grad_enabled() and len(x) > 4:
                raise RuntimeError("broken block")
            return super().forward(x)

    plain = tiny_chain()
    chain = Chain(plain.stem, [*plain.blocks, Broken(6)], plain.tail, plain.num_features)
    with pytest.raises(RuntimeError, match="broken block"):
        fit(chain, [("block1",), ("block2",)])


# ---------------------------------------------------------------- blocks that are awkward to share


def test_blocks_that_write_into_their_input():
    chain = own_blocks(*(nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)) for _ in range(3)))
    subsets = [(), ("block1",), ("block2",), ("block2",), ("block1", "block3"), ("block2", "block3")]
    reference = fit(chain, subsets, engine="sequential")
    assert max(largest_differences(fit(chain, subsets), reference)) < 1e-10


def test_dropout_and_stochastic_depth_do_not_make_numbers_depend_on_the_packing():
    chain = own_blocks(*(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Dropout(0.5)) for _ in range(2)))
    subsets = [("block1",), ("block2",), "all"]
    fits = fit(chain, subsets)
    assert max(largest_differences(fits, fit(chain, subsets))) == 0
    assert max(largest_differences(fits, fit(chain, subsets, memory_limit=1))) < 1e-10
    assert max(largest_differences(fits, fit(chain, subsets, engine="sequential"))) < 1e-10
    assert chain.blocks[0][1].p == 0.5  # the caller's network stays as it is


def test_a_frozen_block_that_mixes_images_is_refused():
    chain = own_blocks(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False))
    with pytest.raises(ValueError, match=r"block2 mixes the images .* engine=\"sequential\""):
        fit(chain, [("block1",)])
    assert len(fit(chain, [("block1",)], engine="sequential")) == 1


# ---------------------------------------------------------------- folding and packing


@pytest.mark.parametrize("name", ["resnet", "own"])
def test_folding_keeps_the_function_and_removes_batchnorm(name):
    chain = backbone(name)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for part in chain.parts:
        before = {key: value.clone() for key, value in part.state_dict().items()}
        folded = fold_batchnorm(part, x)
        with torch.no_grad():
            assert torch.allclose(folded(x), part(x), rtol=0, atol=1e-12)
            x = part(x)
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
        had_norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
        left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
        # a CIFAR ResNet's stem calls bn1 itself, but there too it stands behind its convolution
        assert not left or len(left) < len(had_norms) or folded is part


def test_a_fold_that_would_change_the_output_is_not_made():
    class Backwards(nn.Module):
        """BatchNorm stands behind the convolution, but comes first."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.conv(self.bn(x))

    part = Backwards().eval()
    randomize_norms(part)
    assert fold_batchnorm(part, torch.randn(2, 6, 5, 5)) is part


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=12), st.integers(0, 120))
def test_passes_hold_every_candidate_once_and_keep_to_the_limit(candidates, limit):
    costs, forks = [cost for cost, _ in candidates], [fork for _, fork in candidates]
    passes = pack(costs, forks, limit)
    assert sorted(i for members in passes for i in members) == list(range(len(costs)))
    for members in passes:
        assert sum(costs[i] for i in members) <= limit or len([i for i in members if costs[i] > 0]) == 1
        assert [forks[i] for i in members] == sorted(forks[i] for i in members)


def test_memory_grows_with_the_subset_and_the_batch():
    chain = tiny_chain()
    images = torch.zeros(2, 3, 8, 8)
    subsets = [frozenset(names) for names in ((), ("block3",), ("block1",), ("block1", "block3"), chain.part_names)]
    small, large = (bytes_per_candidate(chain, images, subsets, batch) for batch in (2, 8))
    assert small == sorted(small) and len(set(small)) == len(small) and small[0] == 0
    assert all(a < b for a, b in zip(small[1:], large[1:], strict=True))
    # block3's input and BatchNorm's input alone are kept: 2 images of 6 x 4 x 4 floats each
    assert small[1] >= 2 * (2 * 6 * 4 * 4 * 4)
