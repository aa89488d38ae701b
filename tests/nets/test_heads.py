"""Readouts of one layer and of several, with plain and with Siamese features."""

import pytest
import torch
from torch import nn

from subtuning_lab.engine.fit import fit_together
from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.inference.merge import merge_tasks
from subtuning_lab.inference.tuned_task import load_tuned
from subtuning_lab.nets.heads import empty_readout, fill_readout
from subtuning_lab.study.study import Study
from tests.helpers import tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2, head_depth=3)


def filled(*widths_and_depth, siamese=False, seed=0, start=None):
    readout = empty_readout(*widths_and_depth, siamese=siamese)
    fill_readout(readout, torch.Generator().manual_seed(seed), start)
    return readout


def study(**changes):
    recipe = Recipe(**RECIPE.as_dict() | changes)
    return Study(tiny_chain(), tiny_task(), recipe, folds=2, progress=False, device="cpu")


def test_one_layer_is_a_linear_layer_and_several_have_relu_between_them():
    assert isinstance(filled(5, 3), nn.Linear)
    deep, x = filled(5, 3, 3), torch.randn(4, 5)
    first, second, last = (deep[i] for i in (0, 2, 4))
    assert torch.equal(deep(x), last(torch.relu(second(torch.relu(first(x))))))
    assert [tuple(p.shape) for p in deep.parameters()] == [(5, 5), (5,), (5, 5), (5,), (3, 5), (3,)]
    assert tuple(filled(5, 3, 2, siamese=True)[0].weight.shape) == (5, 10)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_weights_are_those_of_new_linear_layers(depth):
    readout = filled(400, 50, depth)
    for layer in (m for m in readout.modules() if isinstance(m, nn.Linear)):
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            assert parameter.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    again = filled(400, 50, depth)
    assert all(torch.equal(p, q) for p, q in zip(readout.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_siamese_readout_starts_as_the_function_of_its_start(depth):
    start, x = filled(5, 3, depth), torch.randn(4, 5)
    readout = filled(5, 3, depth, siamese=True, seed=1, start=start.state_dict())
    torch.testing.assert_close(readout(torch.cat([x, x], 1)), start(x))


def test_a_deep_readout_fits_what_a_linear_one_cannot():
    """Exclusive or of the two halves of an image's brightness, seen through features that are those brightnesses."""
    chain = tiny_chain()
    chain.stem, chain.tail = nn.AvgPool2d((8, 4)), nn.Flatten()
    chain.blocks = nn.ModuleList(nn.Identity() for _ in chain.blocks)
    bright = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(16, 1)  # of the left and the right half
    images = (60 + 120 * bright[:, None, None].repeat(1, 3, 8, 1)).repeat_interleave(4, 3).to(torch.uint8)
    train = type(tiny_split())(images, bright[:, 0] ^ bright[:, 1])
    recipes = [Recipe(epochs=150, batch_size=64, lr=0.05, head_depth=depth) for depth in (1, 3)]
    linear, deep = fit_together(chain, [[], []], train, recipes, num_classes=2, validation=train)
    assert linear.accuracy <= 0.75 and deep.accuracy == 1.0


def test_recipes_of_other_depths_share_a_pass():
    recipes = [Recipe(**RECIPE.as_dict() | {"head_depth": depth}) for depth in (1, 2)]
    together = fit_together(tiny_chain(), [["block2"]] * 2, tiny_split(), recipes, num_classes=3)
    for recipe, own in zip(recipes, together, strict=True):
        (alone,) = fit_together(tiny_chain(), [["block2"]], tiny_split(), recipe, num_classes=3, engine="sequential")
        torch.testing.assert_close(own.losses, alone.losses, rtol=1e-5, atol=1e-6)
        assert own.weights["head"].keys() == alone.weights["head"].keys()


@pytest.mark.parametrize("siamese", [False, True])
def test_a_deep_readout_comes_back_and_merges(tmp_path, siamese):
    own = study(siamese=siamese)
    tuned, other = own.fit(["block2"]), own.variant(head_depth=1).fit(["block3"])
    loaded = load_tuned(tuned.save(tmp_path / "t.safetensors"), tiny_chain())
    images = tiny_task().test.images
    assert loaded.head_depth == 3 and "3-layer readout" in str(loaded)
    assert torch.equal(loaded.predict(images), tuned.predict(images))
    with torch.no_grad():
        merged = merge_tasks(tiny_chain(), {"deep": loaded, "plain": other})(images)
        torch.testing.assert_close(merged["deep"], tuned.network()(images), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged["plain"], other.network()(images), rtol=1e-5, atol=1e-6)


def test_the_source_readout_is_one_layer():
    with pytest.raises(ValueError, match='head_depth is 2 beside head_start "source"'):
        Recipe(head_depth=2, head_start="source")
