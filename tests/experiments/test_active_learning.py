"""Active learning: shared first images, queries by the network as it is, nothing asked or trained twice."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus

import subtuning_lab.study.runner as trainer
from subtuning_lab import Recipe, Records, Study, TunedTask, recipe_grid
from subtuning_lab.experiments.active_learning import (
    _outputs,
    active_learning,
    query_images,
    spread_out,
    strategy_differences,
    strategy_names,
    summarize_queries,
)
from tests.helpers import tiny_chain, tiny_task

TASK = tiny_task(30)
RECIPES = recipe_grid(Recipe(epochs=2, batch_size=8, augment="shift_flip"), lr=[1e-3, 1e-1])
METHODS = {"SubTuning": ["block2"], "greedy": "greedy"}
ADDED = [9, 4, 6]
OPTIONS = {"repeats": 2, "max_blocks": 1, "progress": False}


@pytest.fixture(scope="module")
def run():
    store = Records(":memory:")
    return store, active_learning(
        tiny_chain(), tiny_task(36), ADDED, RECIPES, METHODS, strategy_names(), records=store, **OPTIONS
    )


def curves(table):
    return table.groupby(["repeat", "method", "strategy"], sort=False)


def test_there_is_a_row_for_each_repetition_method_strategy_and_round(run):
    _, table = run
    assert len(table) == 2 * len(METHODS) * len(strategy_names()) * len(ADDED)
    for _, own in curves(table):
        assert own["round"].tolist() == [0, 1, 2] and own["train_size"].tolist() == [9, 13, 19]
        assert own["queried"].map(len).tolist() == ADDED
    assert table["test_accuracy"].between(0, 1).all() and table["balance"].between(0, 1).all()


def test_no_image_is_asked_for_twice(run):
    _, table = run
    for _, own in curves(table):
        asked = [image for queried in own["queried"] for image in queried]
        assert len(set(asked)) == len(asked) == sum(ADDED) and set(asked) <= set(range(36))


def test_first_images_are_shared_and_stratified(run):
    _, table = run
    labels = tiny_task(36).train.labels
    for _, own in table[table["round"] == 0].groupby("repeat"):
        (first,) = set(own["queried"])
        assert labels[list(first)].bincount().tolist() == [3, 3, 3]
        assert own.groupby("method")["test_accuracy"].nunique().max() == 1
    assert table[table["round"] == 0]["queried"].nunique() == 2  # another one in each repetition


def test_random_is_a_control_that_all_methods_share(run):
    _, table = run
    asked = table[(table["strategy"] == "random") & (table["round"] > 0)]
    assert (asked.groupby(["repeat", "round"])["queried"].nunique() == 1).all()
    assert asked["queried"].nunique() == 4


def test_a_round_is_a_study_of_the_labelled_images(run):
    """By hand: the second round of margin in the second repetition, from the pool's images."""
    _, table = run
    task = tiny_task(36)
    own = table[(table["repeat"] == 1) & (table["method"] == "SubTuning") & (table["strategy"] == "margin")]
    first, second = own["queried"].iloc[:2]

    def study(images):
        known = task.train.take(torch.tensor(sorted(images)))
        part = type(task)("part", task.classes, known, task.test)
        return Study(tiny_chain(), part, RECIPES, folds=2, seeds=(1,), progress=False)

    tuned = study(first).fit(["block2"])
    largest = tuned.predict(task.train.images).topk(2).values
    gaps = (largest[:, 0] - largest[:, 1]).numpy()
    gaps[list(first)] = np.inf
    assert set(second) == set(np.argsort(gaps)[:4])
    assert own["test_accuracy"].iloc[1] == study(first + second).test(["block2"]).mean


def test_greedy_chooses_once_on_the_first_images(run):
    _, table = run
    greedy = table[table["method"] == "greedy"]
    assert (greedy.groupby("repeat")["blocks"].nunique() == 1).all()
    assert (greedy[greedy["round"] == 0]["seconds"] > table[(table["method"] != "greedy")]["seconds"].min()).all()


def test_every_result_is_one_counted_use_of_the_test_split(run):
    store, _ = run
    assert store.test_uses() == 2 * len(METHODS) * (1 + 2 * len(strategy_names()))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [3, 5, 9])
def test_a_killed_run_repeats_no_finished_training(run, tmp_path, monkeypatch, after):
    """Whatever it dies of, only the training that was under way is made again."""
    finished, started, strategies = [], [], ["margin", "BADGE"]
    fit_together = trainer.fit_together

    def counted(*arguments, **options):
        started.append(1)
        if len(started) == after:
            raise KilledError
        fits = fit_together(*arguments, **options)
        finished.append(1)
        return fits

    monkeypatch.setattr(trainer, "fit_together", counted)
    plan = (tiny_chain(), tiny_task(36), ADDED, RECIPES, {"SubTuning": ["block2"]}, strategies)
    options = {"repeats": 1, "progress": False}
    with pytest.raises(KilledError):
        active_learning(*plan, records=tmp_path / "r.sqlite", **options)
    table = active_learning(*plan, records=tmp_path / "r.sqlite", **options)
    assert len(started) == len(finished) + 1
    # Folds and a test for the first images; then for both strategies two queries, and two more rounds.
    assert len(finished) == (2 + 1) + len(strategies) * 2 * (1 + 2 + 1)
    again = active_learning(*plan, records=tmp_path / "r.sqlite", **options)
    assert again.equals(table) and len(started) == len(finished) + 1
    whole = run[1].query("repeat == 0 and method == 'SubTuning' and strategy in @strategies")
    assert table.drop(columns="seconds").equals(whole[list(table)].drop(columns="seconds").reset_index(drop=True))


def test_folds_follow_the_rarest_class():
    task = tiny_task(36)
    plan = {"methods": {"linear probing": ()}, "strategies": ["random"], "folds": 5, "repeats": 1, "progress": False}
    table = active_learning(tiny_chain(), task, [6, 12], RECIPES, **plan)
    counts = task.train.labels[[image for queried in table["queried"] for image in queried]].bincount()
    assert table["folds"].tolist() == [2, min(5, int(counts.min()))] and table["folds"].iloc[1] > 2
    with pytest.raises(ValueError, match=r"4 first images have 1 of class '[abc]'; folds need 2 of every class: raise"):
        active_learning(tiny_chain(), task, [4, 12], RECIPES, **plan)


def test_one_recipe_needs_no_folds():
    store = Records(":memory:")
    plan = {"methods": {"SubTuning": ["block1"]}, "repeats": 1, "records": store, "progress": False}
    active_learning(tiny_chain(), tiny_task(36), [9, 4], RECIPES[0], **plan)
    assert (store.table()["split"] == "test").all()


def test_summary_and_paired_differences():
    rows = [
        ("SubTuning", strategy, 20 * (number + 1), number, repeat, accuracy)
        for strategy, accuracies in {"margin": (0.5, 0.7, 0.4, 0.9), "random": (0.5, 0.6, 0.4, 0.6)}.items()
        for (repeat, number), accuracy in zip([(0, 0), (0, 1), (1, 0), (1, 1)], accuracies, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["method", "strategy", "train_size", "round", "repeat", "test_accuracy"])
    table = table.assign(balance=1.0, seconds=2.0)
    summary = summarize_queries(table).set_index(["strategy", "train_size"])
    assert summary.loc[("margin", 40), ["accuracy", "std", "n"]].tolist() == pytest.approx([0.8, 0.02**0.5, 2])
    (row,) = strategy_differences(table).to_dict("records")
    assert (row["method"], row["train_size"], row["n"]) == ("SubTuning", 40, 2)
    assert row["difference"] == pytest.approx(0.2) and row["error"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no strategy 'BADGE'"):
        strategy_differences(table, "BADGE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_labels": [9, 40]}, "must add up to 1 to 36"),
        ({"methods": {"mine": ["block9"]}}, "no block block9"),
    ],
)
def test_wrong_plans_are_told_before_training(change, message, monkeypatch):
    monkeypatch.setattr(trainer, "fit_together", None)
    plan = {"added_labels": ADDED, "recipes": RECIPES, "methods": METHODS, "progress": False} | change
    with pytest.raises(ValueError) as error:
        active_learning(tiny_chain(), tiny_task(36), **plan)
    assert message in str(error.value)


# ---------------------------------------------------------------- what each strategy asks for


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
        ({"labelled": [30]}, "labelled is [30]; it must hold places in 0..29"),
    ],
)
def test_wrong_queries_are_told(tuned, change, message):
    with pytest.raises(ValueError) as error:
        query_images(tuned, TASK.train.images, **{"size": 2} | change)
    assert message in str(error.value)


def test_a_network_without_numbers_asks_for_nothing(tuned):
    head = {key: torch.full_like(tensor, 3e38) for key, tensor in tuned.weights["head"].items()}
    weights = tuned.weights | {"head": head}
    broken = TunedTask(tuned.backbone, tuned.blocks, weights, tuned.classes)
    with pytest.raises(ValueError, match="logits that are not finite"):
        query_images(broken, TASK.train.images, 2)
