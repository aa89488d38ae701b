"""Active learning: shared first images, queries by the network as it is, nothing asked or trained twice."""

import numpy as np
import pandas as pd
import pytest
import torch

import subtuning_lab.study.runner as trainer
from subtuning_lab.engine.recipe import Recipe, recipe_grid
from subtuning_lab.experiments.active_learning import active_learning, strategy_differences, summarize_queries
from subtuning_lab.experiments.queries import strategy_names
from subtuning_lab.study.records import Records
from subtuning_lab.study.study import Study
from tests.helpers import tiny_chain, tiny_task

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
    with pytest.raises(ValueError, match="no method 'BADGE'"):
        strategy_differences(table, "BADGE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": ["luck"]}, "unknown strategy 'luck'; there are random, margin, entropy, BADGE"),
        ({"added_labels": []}, "added_labels is []"),
        ({"added_labels": [9, 40]}, "must add up to 1 to 36"),
        ({"added_labels": [9, 0]}, "added_labels must be at least 1"),
        ({"methods": {"mine": ["block9"]}}, "no block block9"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_wrong_plans_are_told_before_training(change, message, monkeypatch):
    monkeypatch.setattr(trainer, "fit_together", None)
    plan = {"added_labels": ADDED, "recipes": RECIPES, "methods": METHODS, "progress": False} | change
    with pytest.raises(ValueError) as error:
        active_learning(tiny_chain(), tiny_task(36), **plan)
    assert message in str(error.value)
