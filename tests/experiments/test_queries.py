"""Queries: each strategy against its definition written another way; never an image that has a label."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.experiments.queries import _outputs, query_images, spread_out, strategy_names
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.study.study import Study
from tests.helpers import tiny_chain, tiny_task

TASK = tiny_task(30)


@pytest.fixture(scope="module")
def tuned():
    recipe = Recipe(epochs=3, batch_size=8, lr=1e-2, augment="shift_flip")
    return Study(tiny_chain(), TASK, recipe, folds=2, progress=False).fit(["block1", "block3"])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_image_is_chosen_twice_or_has_a_label(tuned, data):
    strategy, seed = data.draw(st.sampled_from(strategy_names())), data.draw(st.integers(0, 5))
    labelled = data.draw(st.lists(st.integers(0, 29), unique=True, max_size=29))
    size = data.draw(st.integers(1, 30 - len(labelled)))
    found = query_images(tuned, TASK.train.images, size, strategy, labelled=labelled, seed=seed)
    assert len(found) == len(set(found)) == size and not set(found) & set(labelled)
    assert set(found) <= set(range(30)) and all(type(place) is int for place in found)
    assert found == query_images(tuned, TASK.train.images, size, strategy, labelled=labelled, seed=seed)


def test_margin_and_entropy_follow_their_definitions(tuned):
    """Image by image, without augmentation; in eval mode an image's score doesn't depend on its neighbours."""
    alone = [tuned.predict(TASK.train.images[i : i + 1])[0].double() for i in range(30)]
    margins = [float(p.max() - p[p.argsort()[-2]]) for p in alone]
    entropies = [float(-(p * p.log()).sum()) for p in alone]
    images = TASK.train.images
    chosen = query_images(tuned, images, 7, "margin", labelled=[3, 4])
    assert chosen == tuple([i for i in np.argsort(margins) if i not in (3, 4)][:7])
    chosen = query_images(tuned, images, 7, "entropy", labelled=[3, 4])
    assert chosen == tuple([i for i in np.argsort(entropies)[::-1] if i not in (3, 4)][:7])


@pytest.mark.parametrize("head_depth", [1, 2])
def test_badge_spreads_out_the_last_layers_gradients(head_depth):
    """The gradients by autograd, and scikit-learn's seeding of k-means on them with the same chance."""
    recipe = Recipe(epochs=2, batch_size=8, lr=1e-2, head_depth=head_depth)
    tuned = Study(tiny_chain(), TASK, recipe, folds=2, progress=False).fit(["block2"])
    network, rows = tuned.network(), []
    weight = list(network.head.parameters())[-2].requires_grad_(True)
    for image in TASK.train.images:
        logits = network(image[None])
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        rows.append(torch.autograd.grad(loss, weight)[0].flatten().double())
    gradients = torch.stack(rows).numpy()
    probabilities, features = _outputs(tuned, TASK.train.images, np.arange(30))
    errors = probabilities - np.eye(3)[probabilities.argmax(1)]
    assert np.einsum("ij,ik->ijk", errors, features).reshape(30, -1) == pytest.approx(gradients, rel=1e-4, abs=1e-6)
    for seed in range(5):
        expected = kmeans_plusplus(gradients, 6, random_state=seed, n_local_trials=1)[1]
        assert spread_out(errors, features, 6, np.random.RandomState(seed)).tolist() == expected.tolist()
    badge = query_images(tuned, TASK.train.images, 6, "BADGE", seed=4)
    assert badge == tuple(spread_out(errors, features, 6, np.random.default_rng((4, 0))).tolist())


def test_points_that_are_all_the_same_are_still_taken_once():
    errors, features = np.zeros((5, 3)), np.ones((5, 4))
    assert sorted(spread_out(errors, features, 5, np.random.default_rng(0))) == [0, 1, 2, 3, 4]


def test_random_needs_no_network_and_follows_its_seed():
    images = TASK.train.images
    found = {query_images(None, images, 4, "random", seed=seed) for seed in range(20)}
    assert len(found) > 15
    counts = np.bincount([i for seed in range(600) for i in query_images(None, images, 5, "random", seed=seed)])
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, with a standard deviation of 9
    with pytest.raises(TypeError, match="margin needs a TunedTask"):
        query_images(None, images, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 31}, "size is 31; 30 of 30 images have no label yet"),
        ({"size": 28, "labelled": [0, 1, 2]}, "size is 28; 27 of 30"),
        ({"size": 0}, "size must be at least 1"),
        ({"strategy": "luck"}, "unknown strategy 'luck'; there are random, margin, entropy, BADGE"),
        ({"labelled": [1, 1]}, "labelled must hold different places in 0..29"),
        ({"labelled": [30]}, "labelled must hold different places in 0..29"),
        ({"labelled": [-1]}, "labelled must hold different places in 0..29"),
    ],
)
def test_wrong_queries_are_told(tuned, change, message):
    with pytest.raises(ValueError) as error:
        query_images(tuned, TASK.train.images, **{"size": 2} | change)
    assert message in str(error.value)


def test_a_network_without_numbers_asks_for_nothing(tuned):
    weights = tuned.weights | {"head": {key: tensor * torch.nan for key, tensor in tuned.weights["head"].items()}}
    broken = TunedTask(tuned.backbone, tuned.blocks, weights, tuned.classes)
    with pytest.raises(ValueError, match="logits that are not finite"):
        query_images(broken, TASK.train.images, 2)
