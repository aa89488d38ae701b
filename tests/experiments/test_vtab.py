"""VTAB-1k's protocol: choices made without the test images, one test per method, numbers that can be recomputed."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from subtuning_lab import Head2Toe, Recipe, Records, Study, Task, reported
from subtuning_lab.experiments.vtab import CHOICES, best_head2toe, vtab_protocol, vtab_table
from tests.helpers import tiny_chain, tiny_task

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2)
SUBSETS = {"LP": lambda study: [], "FT": lambda study: "all", "block2": lambda study: ["block2"]}


def official(n: int = 30) -> Task:
    """A tiny task whose last six training images are the validation part."""
    return replace(tiny_task(n), validation=torch.arange(n - 6, n))


def protocol(choose=None, task=None, recipes=RECIPE, **options) -> pd.DataFrame:
    options = {"seeds": (0, 1), "device": "cpu", "progress": False} | options
    return vtab_protocol(tiny_chain(), task or official(), recipes, choose or SUBSETS, **options)


def study_of(task=None, recipes=RECIPE, folds=1, seeds=(0, 1), **options) -> Study:
    options |= {"folds": folds, "seeds": seeds, "device": "cpu", "progress": False}
    return Study(tiny_chain(), task or official(), recipes, **options)


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("folds", [1, 5])
def test_numbers_are_those_of_a_study(folds):
    table, study = protocol(folds=folds), study_of(folds=folds)
    assert table["method"].tolist() == list(SUBSETS)
    assert table["blocks"].tolist() == [(), study.part_names, ("block2",)]
    for row, blocks in zip(table.itertuples(), [[], "all", ["block2"]], strict=True):
        scores, test = study.scores([blocks]), study.test(blocks)
        assert row.n_scores == len(scores) == 2 * folds and row.n == 2
        assert row.fold_accuracy == pytest.approx(scores["accuracy"].mean())
        assert row.fold_std == pytest.approx(scores["accuracy"].std())
        assert (row.accuracy, row.std) == pytest.approx((test.mean, test.std))
        assert (row.n_train, row.n_held_out, row.n_test) == (30, 0, 12)
        assert row.params == study.count_parameters(blocks) + 3 * (6 + 1)


def test_one_fold_is_the_official_validation_part():
    records = Records(":memory:")
    protocol({"LP": SUBSETS["LP"]}, records=records)
    rows = records.table()
    assert rows["n_train"].tolist() == [24, 24, 30, 30] and rows["n_scored"].tolist() == [6, 6, 12, 12]
    assert rows["split"].tolist() == ["fold", "fold", "test", "test"]


def test_patience_holds_images_out_and_says_so():
    task = official()
    table = protocol(
        SUBSETS | {"Head2Toe": lambda study: Head2Toe()}, task, replace(RECIPE, epochs=3, patience=1), seeds=(0,)
    )
    assert table["n_held_out"].tolist() == [6, 6, 6, 0]
    assert table["n_train"].tolist() == [24, 24, 24, 30]


def test_the_best_recipe_is_chosen_and_named():
    recipes = [replace(RECIPE, lr=lr) for lr in (1e-6, 1e-1)]
    row = protocol({"block2": SUBSETS["block2"]}, recipes=recipes).iloc[0]
    study = study_of(recipes=recipes)
    assert row["settings"] == study.recipe_of(["block2"]).as_dict() and row["settings"]["lr"] == 1e-1
    assert row["accuracy"] == pytest.approx(study.test(["block2"]).mean)


def test_a_method_and_a_variant_stand_beside_subsets():
    method = Head2Toe(pool=6, share=0.5)
    choose = {
        "Head2Toe": lambda study: method,
        "biases": lambda study: (study.variant(params="bias"), ["block2"]),
        "siamese": lambda study: (study.variant(siamese=True), ["block2"]),
    }
    table, study = protocol(choose).set_index("method"), study_of()
    assert table.loc["Head2Toe", "settings"] == method.settings() and table.loc["Head2Toe", "blocks"] == ()
    assert table.loc["Head2Toe", "params"] == 3 * (15 + 1)  # half of 5 parts' 6 features
    assert table.loc["Head2Toe", "accuracy"] == pytest.approx(study.test(method).mean)
    assert table.loc["biases", "params"] == 6 + 3 * (6 + 1) and table.loc["biases", "settings"]["params"] == "bias"
    assert table.loc["biases", "accuracy"] == pytest.approx(study.variant(params="bias").test(["block2"]).mean)
    assert table.loc["siamese", "params"] == study.count_parameters(["block2"]) + 3 * (2 * 6 + 1)


def test_the_usual_choices_choose_by_the_folds():
    table, study = protocol(CHOICES, seeds=(0,)).set_index("method"), study_of(seeds=(0,))
    assert list(table.index) == ["linear probing", "full finetuning", "Head2Toe", "best block", "greedy SubTuning"]
    singles = study.scores([[name] for name in study.block_names])
    assert table.loc["best block", "fold_accuracy"] == pytest.approx(singles.groupby("blocks")["accuracy"].mean().max())
    assert table.loc["greedy SubTuning", "fold_accuracy"] >= table.loc["linear probing", "fold_accuracy"]
    scores = study.method_scores(Head2Toe.grid()).groupby("method")["accuracy"].mean()
    assert table.loc["Head2Toe", "fold_accuracy"] == pytest.approx(scores.max())
    assert best_head2toe(study).settings() == table.loc["Head2Toe", "settings"]


def test_head2toe_is_chosen_by_the_studys_score(monkeypatch):
    study, grid = study_of(score="loss"), Head2Toe.grid()
    rows = pd.DataFrame({"method": range(len(grid)), "accuracy": 0.5, "score": -1.0})
    rows.loc[0, "accuracy"], rows.loc[3, "score"], rows.loc[4, "score"] = 1.0, -0.1, None  # the last one diverged
    monkeypatch.setattr(type(study), "method_scores", lambda study, methods: rows)
    assert best_head2toe(study) == grid[3]


# ---------------------------------------------------------------- the test images


class Guarded:
    """A test split that fails whoever reads it while it is closed."""

    def __init__(self, split):
        self.split, self.open = split, False

    def __getattr__(self, name):
        assert self.open, f"selection read test.{name}"
        return getattr(self.split, name)

    def __len__(self):
        assert self.open, "selection counted the test images"
        return len(self.split)


@pytest.fixture
def guarded(monkeypatch):
    """A task whose test images can be read within `Study.test` only; the order of events."""
    task, events = official(), []
    task.fingerprint  # noqa: B018 - reads the test images to name the task, before they are closed
    guard, real = Guarded(task.test), Study.test
    object.__setattr__(task, "test", guard)

    def test(study, what):
        guard.open = True
        events.append("test")
        try:
            return real(study, what)
        finally:
            guard.open = False

    monkeypatch.setattr(Study, "test", test)
    return task, events


@pytest.mark.parametrize("folds", [1, 5])
def test_choices_never_see_the_test_images(guarded, folds):
    task, events = guarded
    choose = {name: lambda study, own=own: (events.append("choice"), own(study))[1] for name, own in CHOICES.items()}
    protocol(choose, task, folds=folds, seeds=(0,))
    assert events == ["choice"] * len(CHOICES) + ["test"] * len(CHOICES)
    with pytest.raises(AssertionError, match="selection read test"):
        task.test.images  # noqa: B018 - the guard itself works


def test_a_choice_has_no_test_images_to_look_at():
    def peeking(study):
        assert study.task.test is None
        return [max(study.block_names, key=lambda name: study.test([name]).mean)]

    records = Records(":memory:")
    with pytest.raises(ValueError, match="no test split"):
        protocol({"LP": SUBSETS["LP"], "peeking": peeking}, records=records)
    assert records.test_uses() == 0
    with pytest.raises(ValueError, match="no test split"):
        protocol({"variant": lambda study: (study.variant(lr=0.1), study.variant(lr=0.1).test([]).blocks)})


def test_every_method_is_tested_once_for_all_its_seeds():
    records = Records(":memory:")
    table = protocol(records=records, seeds=(0, 1, 2))
    assert records.test_uses() == 3 and table["test_uses"].tolist() == [1, 2, 3]
    rows = records.table()
    assert len(rows[rows["split"] == "test"]) == 3 * 3
    again = protocol(records=records, seeds=(0, 1, 2))  # nothing is trained again, and yet it is a look
    assert again["test_uses"].tolist() == [4, 5, 6] and len(records.table()) == len(rows)
    assert again.drop(columns="test_uses").equals(table.drop(columns="test_uses"))


def test_the_task_and_the_backbone_stay_as_they_were():
    task, chain = official(), tiny_chain()
    before = chain.fingerprint
    vtab_protocol(chain, task, RECIPE, SUBSETS, seeds=(0,), device="cpu", progress=False)
    assert task.test is not None and chain.fingerprint == before


def test_what_has_no_sense_is_refused():
    with pytest.raises(ValueError, match="tiny has no test split"):
        protocol(task=replace(official(), test=None))
    with pytest.raises(ValueError, match="no block block9"):
        protocol({"typo": lambda study: ["block9"]})


# ---------------------------------------------------------------- beside what others report


def results(*names: str) -> pd.DataFrame:
    """Two methods on each of the named tasks."""
    rows = [
        {"method": method, "backbone": "own", "task": name, "n_train": 1000, "params": 7}
        | {"accuracy": 0.5, "std": 0.01, "n": 3, "n_test": 10}
        for name in names
        for method in ("LP", "FT")
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("vtab-cifar100", "CIFAR-100"),
        ("vtab:/data/vtab-1k/cifar", "CIFAR-100"),
        ("vtab:/data/cifar-100/", "CIFAR-100"),
        ("vtab:oxford_flowers102", "Flowers102"),
        ("vtab-flowers102", "Flowers102"),
        ("vtab:x/Caltech101", "Caltech101"),
        ("vtab:x/dmlab", "DMLab"),
    ],
)
def test_ours_and_theirs_stand_together(name, title):
    table, theirs = vtab_table(results(name)), reported("low_data").query("task == @title")
    assert set(table["task"]) == {title} and len(theirs) > 3
    assert table["method"].tolist() == ["LP", "FT", *theirs["method"]]
    assert table["accuracy"].tolist()[2:] == pytest.approx(theirs["accuracy"].tolist(), nan_ok=True)
    assert table.loc[:1, "n"].tolist() == [3, 3] and table.loc[2:, ["std", "n", "params"]].isna().all(axis=None)
    assert table.loc[2:, "source"].tolist() == theirs["source"].tolist()
    assert set(table.loc[:1, "source"]) == {
        "this run, on other images than VTAB-1k's" if name.startswith("vtab-") else "this run"
    }


@pytest.mark.parametrize(
    "name", ["digits", "cifar100", "folder:cifar100", "vtab:cifar10", "vtab-cifar100+contrast@3", "vtab:x/dmlab+fog@1"]
)
def test_another_task_has_no_reports_beside_it(name):
    table = vtab_table(results(name))
    assert table["task"].tolist() == [name, name] and table["method"].tolist() == ["LP", "FT"]


def test_tasks_stay_in_their_order():
    table = vtab_table(results("vtab:dmlab", "digits", "vtab:caltech101"))
    assert table["task"].drop_duplicates().tolist() == ["DMLab", "digits", "Caltech101"]
    assert (table.groupby("task", sort=False).head(2)["backbone"] == "own").all()


def test_the_table_takes_what_the_protocol_gives():
    task = replace(official(), name="vtab:dmlab")
    table = vtab_table(protocol(task=task))
    assert table["method"].tolist()[:3] == list(SUBSETS) and table["n_train"].tolist()[:3] == [30] * 3
    assert len(table) == 3 + len(reported("low_data").query("task == 'DMLab'"))
