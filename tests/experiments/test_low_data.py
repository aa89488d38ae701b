"""Low data: own images in every repetition, the same grid for every method, one test each."""

import pandas as pd
import pytest

from subtuning_lab import Recipe, Records, SearchResult, Study, greedy_subtuning, method_differences, recipe_grid
from subtuning_lab.experiments.low_data import _best_blocks, low_data_curves, summarize_repeats
from tests.helpers import tiny_chain, tiny_task

RECIPES = recipe_grid(Recipe(epochs=2, batch_size=8), lr=[1e-3, 1e-1])
METHODS = ["linear probing", "full finetuning", "random subset of the same size", "greedy", "best window"]


@pytest.fixture(scope="module")
def run():
    store, task = Records(":memory:"), tiny_task(48)
    options = {"folds": 2, "repeats": 2, "max_blocks": 2, "max_window": 2, "draws": 2, "progress": False}
    return task, store, low_data_curves(tiny_chain(), task, [12, 24], RECIPES, METHODS, records=store, **options)


def test_there_is_a_row_for_each_size_repetition_and_method(run):
    _, _, table = run
    assert table.groupby(["train_size", "repeat"])["method"].apply(sorted).tolist() == [sorted(METHODS)] * 4
    assert table["test_accuracy"].between(0, 1).all()


def test_each_repetition_has_its_own_images_and_seed(run):
    """By hand: the row of greedy is a study on that subset of the training images with that seed."""
    task, _, table = run
    study = Study(tiny_chain(), task.subset(24, seed=1), RECIPES, folds=2, seeds=(1,), progress=False)
    found = greedy_subtuning(study, max_blocks=2)
    row = table[(table["train_size"] == 24) & (table["repeat"] == 1) & (table["method"] == "greedy")].iloc[0]
    assert row["blocks"] == found.blocks and row["trainings"] == found.cost.trainings
    assert row["test_accuracy"] == pytest.approx(study.test(found.blocks).mean)


def test_a_pilot_chooses_recipes_for_the_other_repetitions(run):
    """By hand: the second repetition knows only what the first one chose."""
    task, _, full = run
    options = {"folds": 2, "repeats": 2, "max_blocks": 2, "max_window": 2, "draws": 2, "progress": False}
    methods = ["LP-FT", "best stage", *METHODS]
    table = low_data_curves(
        tiny_chain(), task, [24], RECIPES, methods, pilot=True, records=Records(":memory:"), **options
    )
    first, second = (rows.set_index("method") for _, rows in table.groupby("repeat"))
    before = full[(full["train_size"] == 24) & (full["repeat"] == 0)].set_index("method")
    assert first.loc[METHODS, "test_accuracy"].tolist() == before.loc[METHODS, "test_accuracy"].tolist()
    studies = [
        Study(tiny_chain(), task.subset(24, seed=i), RECIPES, folds=2, seeds=(i,), progress=False) for i in (0, 1)
    ]
    everything = studies[0].part_names
    for name, choices in {"full finetuning": {}, "LP-FT": {"head_start": "probe"}}.items():
        chosen = studies[0].variant(**choices).recipe_of(everything)
        by_hand = studies[1].variant(lr=chosen.lr, **choices)
        assert (first["trainings"][name], second["trainings"][name]) == (4, 2)
        assert second["test_accuracy"][name] == by_hand.test(everything).mean
    one_lr = studies[1].variant(lr=studies[0].recipe_of(first["blocks"]["greedy"] or everything).lr)
    found = greedy_subtuning(one_lr, max_blocks=2)
    assert (second["blocks"]["greedy"], second["trainings"]["greedy"]) == (found.blocks, found.cost.trainings)
    assert second["trainings"]["random subset of the same size"] == 2 * 2


def test_a_search_that_chose_nothing_still_has_a_recipe_for_blocks():
    trace = pd.DataFrame({"blocks": [(), ("a",), ("b",), ("c",)], "accuracy": [0.9, 0.5, 0.7, 0.8]})
    trace = trace.assign(dropped=[0, 0, 0, 1], params=1)
    assert _best_blocks(SearchResult((), trace, trace, ""), "abcd") == ("b",)
    assert _best_blocks(SearchResult(("c", "d"), trace, trace, ""), "abcd") == ("c", "d")
    by_score = trace.assign(score=[0.9, 0.6, 0.5, 0.8])  # what the study chooses by, e.g. balanced accuracy
    assert _best_blocks(SearchResult((), by_score, by_score, ""), "abcd") == ("a",)


def test_the_test_split_is_used_once_per_result(run):
    _, store, _ = run
    per_study = 4 + 2  # four methods and searches, and two draws of random subsets
    assert store.test_uses() == 4 * per_study


def test_summaries_are_over_repetitions(run):
    _, _, table = run
    summary = summarize_repeats(table).set_index(["train_size", "method"])
    own = table[(table["train_size"] == 12) & (table["method"] == "greedy")]["test_accuracy"]
    assert summary.loc[(12, "greedy"), ["accuracy", "std", "n"]].tolist() == pytest.approx([own.mean(), own.std(), 2])
    assert isinstance(summary, pd.DataFrame) and len(summary) == 2 * len(METHODS)


def test_differences_are_paired_by_repetition():
    """By hand: the methods vary a lot together, their difference little."""
    own = {
        ("a", 20): (0.9, 0.3, 0.6),
        ("b", 20): (0.8, 0.2, 0.4),
        ("a", 50): (0.7, 0.7, 0.7),
        ("b", 50): (0.8, 0.8, 0.8),
    }
    rows = [(size, i, name, value) for (name, size), values in own.items() for i, value in enumerate(values)]
    table = pd.DataFrame(rows, columns=["train_size", "repeat", "method", "test_accuracy"])
    small, large = method_differences(table.sample(frac=1, random_state=0), "a", "b").to_dict("records")
    assert small["train_size"] == 20 and small["n"] == 3
    assert small["difference"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert small["std"] == pytest.approx(0.1 / 3**0.5) and small["error"] == pytest.approx(0.1 / 3)
    assert large["difference"] == pytest.approx(-0.1) and large["error"] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="no method 'c'.*a, b"):
        method_differences(table, "a", "c")
    with pytest.raises(ValueError, match="same sizes and repetitions"):
        method_differences(table.iloc[1:], "a", "b")


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="train_size"):
        low_data_curves(tiny_chain(), tiny_task(), [2], RECIPES, METHODS, progress=False)
