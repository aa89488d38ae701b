"""Distribution shifts: own images in every repetition, honest doors to test and clean images."""

import pandas as pd
import pytest
import torch

import subtuning_lab.study.runner
from subtuning_lab import Recipe, Records, Study, Task, greedy_subtuning, load_task, recipe_grid
from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.experiments.shift import (
    average_shifts,
    chosen_steps,
    corrupted,
    shift_differences,
    shift_profiles,
    shift_studies,
    shift_study,
    stage_subsets,
    summarize_shifts,
)
from tests.baselines.test_bn_adapt import source_chain
from tests.helpers import tiny_split, tiny_task

RECIPES = recipe_grid(Recipe(epochs=1, batch_size=12, head_start="source"), lr=[1e-3, 1e-1])
METHODS = ["no adaptation", "BatchNorm statistics", "linear probing", "full finetuning", "stages", "greedy"]
ROWS = [*METHODS[:4], "stage 1", "stage 2", "stage 3", "greedy"]
SHIFTS = ["contrast@5", "gaussian_noise@3"]


def new_classes() -> Task:
    return Task("other", ("d", "e"), tiny_split(24, 2, seed=3), tiny_split(12, 2, seed=4))


@pytest.fixture(scope="module")
def options():
    return {
        "folds": 2,
        "repeats": 2,
        "max_blocks": 2,
        "progress": False,
        "train_size": 24,
        "new_tasks": [new_classes()],
    }


@pytest.fixture(scope="module")
def run(options):
    store, task = Records(":memory:"), tiny_task(48)
    return task, store, shift_study(source_chain(), task, SHIFTS, RECIPES, METHODS, records=store, **options)


def test_there_is_a_row_for_each_shift_repetition_and_method(run):
    _, _, table = run
    for (kind, _, _), rows in table.groupby(["kind", "shift", "repeat"]):
        assert rows["method"].tolist() == (ROWS if kind == "input" else ROWS[2:])
    assert table["shift"].unique().tolist() == [*SHIFTS, "other"] and set(table["train_size"]) == {24}
    assert table["test_accuracy"].between(0, 1).all()
    assert table["clean_accuracy"].isna().equals(table["kind"] == "label")


def test_a_row_is_a_study_on_those_corrupted_images_with_that_seed(run):
    """By hand: greedy under noise in the second repetition."""
    task, _, table = run
    small = task.subset(24, seed=1)
    own = Task(
        "by hand",
        task.classes,
        type(task.train)(corrupt(small.train.images, "gaussian_noise", 3, seed=0), small.train.labels),
        type(task.train)(corrupt(task.test.images, "gaussian_noise", 3, seed=1), task.test.labels),
    )
    study = Study(source_chain(), own, RECIPES, folds=2, seeds=(1,), progress=False)
    found = greedy_subtuning(study, max_blocks=2)
    chosen = (table["shift"] == "gaussian_noise@3") & (table["repeat"] == 1) & (table["method"] == "greedy")
    row = table[chosen].iloc[0]
    assert row["blocks"] == found.blocks and sorted(row["steps"]) == sorted(found.blocks)
    assert row["accuracy"] == pytest.approx(found.accuracy)
    assert row["test_accuracy"] == pytest.approx(study.test(found.blocks).mean)
    tuned = study.fit(found.blocks, seed=1)
    assert row["clean_accuracy"] == pytest.approx(tuned.accuracy(task.test))


def test_a_pilot_chooses_each_methods_recipe_for_the_other_repetitions(run, options):
    task, store, full = run
    own = options | {"new_tasks": [], "repeats": 2, "records": store}
    table = shift_study(source_chain(), task, SHIFTS[:1], RECIPES, METHODS, pilot=True, **own)
    first, second = (table[table["repeat"] == repeat].set_index("method") for repeat in (0, 1))
    known = full[(full["shift"] == SHIFTS[0]) & (full["repeat"] == 0)].set_index("method")
    assert first["test_accuracy"].to_dict() == known["test_accuracy"].to_dict()
    assert sorted(second.index) == sorted(first.index) == sorted(ROWS)
    for name in ("full finetuning", "stage 1", "stage 3"):
        assert (first.at[name, "trainings"], second.at[name, "trainings"]) == (4, 2)  # on 2 folds
    _, studies = zip(*shift_studies(source_chain(), task, SHIFTS[:1], RECIPES, train_size=24, folds=2), strict=True)
    chosen = studies[0].recipe_of("all")
    assert second.at["full finetuning", "test_accuracy"] == studies[1].with_(recipe=chosen).test("all").mean


def test_what_is_not_adapted_forgets_nothing_and_needs_the_source_readout(run):
    task, _, table = run
    rows = table[table["method"] == "no adaptation"]
    with torch.no_grad():
        chain = source_chain().eval()
        hits = chain.source_head(chain(chain.normalize(task.test.images))).argmax(1) == task.test.labels
    assert rows["clean_accuracy"].tolist() == pytest.approx([float(hits.double().mean())] * 4)
    assert (rows["params"] == 0).all()


def test_a_second_call_trains_nothing(run, options, monkeypatch):
    task, store, table = run
    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", None)  # would fail
    again = shift_study(source_chain(), task, SHIFTS, RECIPES, METHODS, records=store, **options)
    pd.testing.assert_frame_equal(again, table)


def test_a_killed_run_goes_on_where_it_stopped(options, monkeypatch):
    task, trained = tiny_task(48), []

    def spy(backbone, subsets, *rest, **how):
        if len(trained) == 7:
            raise KeyboardInterrupt
        trained.append(len(subsets))
        return subtuning_lab.engine.fit.fit_together(backbone, subsets, *rest, **how)

    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", spy)
    store, own = Records(":memory:"), options | {"new_tasks": [], "repeats": 1}
    call = (source_chain(), task, SHIFTS, RECIPES, ["linear probing", "stage 1"])
    with pytest.raises(KeyboardInterrupt):
        shift_study(*call, records=store, **own)
    before, kept = sum(trained), len(store.table())
    trained.extend([0] * 8)  # no longer seven
    resumed = shift_study(*call, records=store, **own)
    after = sum(trained) - before
    trained.extend([0])
    whole = shift_study(*call, **own)
    assert kept and before + after == sum(trained) - before - after
    costs = ["seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=costs), whole.drop(columns=costs))


def test_test_and_clean_images_are_scored_by_one_training(run, options, monkeypatch):
    fits = []

    def spy(backbone, subsets, *rest, **how):
        fits.extend([] if how["validation"] is not None else subsets)
        return subtuning_lab.engine.fit.fit_together(backbone, subsets, *rest, **how)

    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", spy)
    own = options | {"new_tasks": [], "repeats": 1}
    shift_study(source_chain(), run[0], SHIFTS[:1], RECIPES, ["linear probing", "stage 1"], **own)
    assert len(fits) == 2


def test_profiles_are_over_all_repetitions_and_read_what_greedy_trained(run, options, monkeypatch):
    task, store, table = run
    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", None)
    how = {"folds": 2, "records": store, "progress": False}
    studies = list(shift_studies(source_chain(), task, SHIFTS, RECIPES, options["new_tasks"], 24, 2, **how))
    profiles = shift_profiles(studies)
    assert list(profiles) == [*SHIFTS, "other"]
    own = [study.scores([["block2"]])["accuracy"] for place, study in studies if place["shift"] == "contrast@5"]
    row = profiles["contrast@5"].table.set_index("label").loc["block2"]
    assert row["n"] == 4 and row["accuracy"] == pytest.approx(pd.concat(own).mean())
    assert row["std"] == pytest.approx(pd.concat(own).std())


def test_summaries_are_over_repetitions(run):
    _, _, table = run
    summary = summarize_shifts(table).set_index(["shift", "method"])
    own = table[(table["shift"] == "contrast@5") & (table["method"] == "stage 1")]
    row = summary.loc[("contrast@5", "stage 1")]
    assert row[["accuracy", "std", "n"]].tolist() == pytest.approx(
        [own["test_accuracy"].mean(), own["test_accuracy"].std(), 2]
    )
    assert row["clean_accuracy"] == pytest.approx(own["clean_accuracy"].mean())
    average = average_shifts(table).set_index("method").loc["stage 1"]
    rows = table[(table["kind"] == "input") & (table["method"] == "stage 1")]
    means = rows.groupby("repeat")["test_accuracy"].mean()
    assert average[["accuracy", "std", "n"]].tolist() == pytest.approx([means.mean(), means.std(), 2])
    with pytest.raises(ValueError, match="greedy is there for 1 of 2"):
        average_shifts(table[(table["shift"] != "contrast@5") | (table["method"] != "greedy")])


def test_steps_count_from_one_over_the_repetitions_that_chose_a_block():
    orders = [("b", "a"), ("b",), ("a", "c"), ()]
    table = pd.DataFrame({"train_size": 9, "shift": "x@1", "method": "greedy", "steps": orders})
    steps = chosen_steps(table, ["a", "b", "c", "d"]).set_index("block")
    assert steps["step"].tolist()[:3] == [1.5, 1.0, 2.0] and pd.isna(steps.at["d", "step"])
    assert steps["chosen"].tolist() == [2, 2, 1, 0] and set(steps["n"]) == {4}
    with pytest.raises(ValueError, match="no method 'greedy'"):
        chosen_steps(table.assign(method="LP"), ["a"])


def test_differences_are_paired_under_each_shift(run):
    _, _, table = run
    found = shift_differences(table, "stage 1", "linear probing").set_index("shift")
    rows = table[table["shift"] == "other"].pivot(index="repeat", columns="method", values="test_accuracy")
    assert found.at["other", "difference"] == pytest.approx((rows["stage 1"] - rows["linear probing"]).mean())
    assert found.index.tolist() == [*SHIFTS, "other"]


def test_stages_cover_every_part_with_parameters_once():
    chain = source_chain()
    found = stage_subsets(chain)
    parts = [name for blocks in found.values() for name in blocks]
    assert parts == list(chain.part_names) and found["stage 1"][0] == "stem"


def test_corrupted_images_are_those_of_load_task():
    clean = load_task("digits", train_size=20, test_size=10, progress=False)
    wanted = load_task("digits+contrast@3+gaussian_noise@2", train_size=20, test_size=10, progress=False)
    for part, (own, other) in enumerate(((clean.train, wanted.train), (clean.test, wanted.test))):
        assert torch.equal(corrupted(own, "contrast@3+gaussian_noise@2", part).images, other.images)


def test_bad_input_is_named_before_the_first_training(options, monkeypatch):
    monkeypatch.setattr(subtuning_lab.study.runner, "fit_together", None)
    task = tiny_task(48)
    with pytest.raises(ValueError, match="blur"):
        shift_study(source_chain(), task, ["contrast@5", "blur@3"], RECIPES, **options)
    with pytest.raises(ValueError, match="pretrained readout"):
        shift_study(source_chain(2), task, SHIFTS, RECIPES, **options)
    with pytest.raises(ValueError, match="unknown method 'prompts'; there are .*stage 1"):
        shift_study(source_chain(), task, SHIFTS, RECIPES, ["prompts"], **options)
    with pytest.raises(ValueError, match="give at least one shift"):
        shift_study(source_chain(), task, [], RECIPES, **options | {"new_tasks": []})
    with pytest.raises(ValueError, match="no test split"):
        shift_study(source_chain(), Task("t", task.classes, task.train, None), SHIFTS, RECIPES, **options)
