"""Baselines: the same folds, seeds, recipes and test door as subsets, and honest costs."""

from dataclasses import replace

import pytest

from subtuning_lab import Halving, Head2Toe, Race, Records, SignificantGain, Study, Task, fit_together, pair_profile
from subtuning_lab.baselines.compare import (
    BASELINES,
    BEST_STAGE,
    HEAD2TOE,
    RANDOM_PARAMETERS,
    RANDOM_SIZE,
    compare_methods,
    grid_caption,
    method_names,
    random_subsets,
    stages,
)
from subtuning_lab.engine.recipe import Recipe, recipe_grid
from subtuning_lab.search.exhaustive import best_window, exhaustive_search
from subtuning_lab.search.greedy import greedy_subtuning
from subtuning_lab.study import runner
from tests.helpers import Forbidden, tiny_chain, tiny_split, tiny_task

RECIPES = recipe_grid(Recipe(epochs=2, batch_size=8, head_lr=1e-2), lr=[1e-3, 1e-1], bn=["batch", "frozen"])
SMALL = [Head2Toe(pool=6, share=share) for share in (0.5, 1.0)]


@pytest.fixture(scope="module")
def study():
    return Study(tiny_chain(), tiny_task(), RECIPES, folds=2, seeds=(0, 1), device="cpu", progress=False)


def test_every_method_gives_a_row_with_its_cost(study):
    table = compare_methods(study, method_names(), chosen=["block1", "tail"], draws=2, head2toe=SMALL, test=True)
    table = table.set_index("method")
    assert tuple(table.index) == method_names()
    assert table[["accuracy", "std", "seconds", "flops", "test_accuracy", "test_std"]].notna().all(axis=None)
    assert table["accuracy"].between(0, 1).all() and table["test_accuracy"].between(0, 1).all()
    expected = {
        "linear probing": 1,
        "full finetuning": 4,
        "LP-FT": 4,
        "layer-wise decay": 8,
        BEST_STAGE: 3 * 4,
        HEAD2TOE: 2,
    }
    assert {name: table.at[name, "trainings"] / 4 for name in expected} == expected  # 2 folds x 2 seeds
    assert (table["n"] == [2 if "random" in name else 4 for name in table.index]).all()
    assert table.at["BitFit", "params"] < table.at["norm tuning", "params"] < table.at["full finetuning", "params"]
    assert table.at["LoRA in the chosen blocks", "params"] < table.at["LoRA", "params"]


def test_a_method_is_its_subset_with_its_recipe(study):
    """By hand: LP-FT's row is the best of its recipes on the folds, and its test is that recipe's."""
    table = compare_methods(study, ["LP-FT", "full finetuning"], test=True).set_index("method")
    alone = [
        Study(
            tiny_chain(),
            tiny_task(),
            replace(own, head_start="probe"),
            folds=2,
            seeds=(0, 1),
            device="cpu",
            progress=False,
        )
        for own in RECIPES
    ]
    means = [own.scores(["all"])["accuracy"].mean() for own in alone]
    assert table.at["LP-FT", "accuracy"] == pytest.approx(max(means))
    best = alone[means.index(max(means))]
    assert table.at["LP-FT", "test_accuracy"] == pytest.approx(best.test("all").mean)
    plain = study.scores(["all"])["accuracy"]
    assert table.at["full finetuning", "accuracy"] == pytest.approx(plain.mean())
    assert table.at["full finetuning", "std"] == pytest.approx(plain.std())
    assert table.at["full finetuning", "blocks"] == study.part_names  # the stem included


def test_searches_stand_beside_methods_with_all_they_cost(study):
    greedy, window = greedy_subtuning(study, max_blocks=2), best_window(study, 2)
    table = compare_methods(study, [], {"greedy": greedy, "best window": window}, test=True).set_index("method")
    for name, found in (("greedy", greedy), ("best window", window)):
        assert table.at[name, "blocks"] == found.blocks
        assert table.at[name, "trainings"] == found.cost.trainings
        assert table.at[name, "test_accuracy"] == pytest.approx(study.test(found.blocks).mean)
    assert table.at["best window", "subsets"] == 5
    assert table.at["best window", "trainings"] == 5 * 4 * 4  # subsets x recipes x (folds x seeds)


def test_no_selection_path_reaches_the_test_split():
    task, store = tiny_task(), Records(":memory:")
    study = Study(tiny_chain(), task, RECIPES[:2], folds=2, records=store, device="cpu", progress=False)
    object.__setattr__(task, "test", Forbidden())
    compare_methods(study, method_names(), chosen=["block1", "tail"], draws=1, head2toe=SMALL)
    for race in (None, Race(), Halving()):
        greedy_subtuning(study, max_blocks=2, direction="both", keep=SignificantGain(0.5), race=race)
    best_window(study)
    exhaustive_search(study, 2)
    pair_profile(study)
    assert store.test_uses() == 0 and (store.table()["split"] == "fold").all()
    for name in ("LP-FT", HEAD2TOE):
        with pytest.raises(AssertionError, match="selection read test"):
            compare_methods(study, [name], head2toe=SMALL, test=True)


def test_each_test_is_counted_and_recorded():
    store = Records(":memory:")
    study = Study(
        tiny_chain(), tiny_task(), RECIPES[:1], folds=2, seeds=(0, 1, 2), records=store, device="cpu", progress=False
    )
    names = ["linear probing", "LP-FT", HEAD2TOE]
    first = compare_methods(study, names, head2toe=SMALL, test=True)
    assert store.test_uses() == 3 and (store.table()["split"] == "test").sum() == 9
    again = compare_methods(study, names, head2toe=SMALL, test=True)
    assert again.drop(columns="seconds").equals(first.drop(columns="seconds"))
    assert store.test_uses() == 6 and (store.table()["split"] == "test").sum() == 9


def test_random_subsets_are_controls_of_the_chosen_one(study):
    by_size = random_subsets(study, ["block1", "block3"], 10, "size")
    assert sorted(by_size) == [("block1", "block2"), ("block2", "block3")]
    by_parameters = random_subsets(study, ["block2"], 10, "parameters")
    assert sorted(by_parameters) == [("block1",), ("block3",)]
    assert random_subsets(study, ["block2"], 1, "size", seed=3) == random_subsets(study, ["block2"], 1, "size", seed=3)
    with pytest.raises(ValueError, match="no other subset has the size of block1, block2, block3"):
        random_subsets(study, study.block_names, 5, "size")
    with pytest.raises(ValueError, match="by is 'depth'; it must be one of size, parameters"):
        random_subsets(study, ["block1"], 1, "depth")


def test_random_rows_are_means_over_draws(study):
    row = compare_methods(study, [RANDOM_SIZE], chosen=["block1"], draws=5, test=True).iloc[0]
    means = study.scores([["block2"], ["block3"]]).groupby("blocks")["accuracy"].mean()
    assert row["accuracy"] == pytest.approx(means.mean()) and row["std"] == pytest.approx(means.std())
    assert row["test_n"] == row["n"] == 2 and row["blocks"] is None


def test_stages_follow_names_or_thirds():
    assert stages(("layer1.0", "layer1.1", "layer2.0")) == [("layer1.0", "layer1.1"), ("layer2.0",)]
    blocks = tuple(f"blocks.{i}" for i in range(6))
    assert stages(blocks, 3) == [blocks[:2], blocks[2:4], blocks[4:]]
    assert stages(("block1", "block2")) == [("block1",), ("block2",)]


def test_a_method_can_be_changed_and_the_study_stays(study):
    variant = study.variant(params="bias", weight_decay=[0.0, 0.1])
    assert len(variant.recipes) == 8 and {own.params for own in variant.recipes} == {"bias"}
    assert variant.records is study.records and len(study.recipes) == 4
    assert study.variant(image_size=16).parts["flops"].iloc[0] == 4 * study.parts["flops"].iloc[0]
    with pytest.raises(ValueError, match="a recipe has no learning_rate"):
        study.variant(learning_rate=1)


def test_a_folds_score_is_of_what_is_best_on_the_other_one(study):
    """By hand: with two folds each one's setting is chosen on the other, so that it never counts what chose it."""
    grid = [Head2Toe(pool=6, share=share, C=C) for share in (0.1, 1.0) for C in (1e-3, 1.0)]
    row = compare_methods(study, [HEAD2TOE], head2toe=grid).iloc[0]
    means = study.method_scores(grid).groupby(["method", "fold"])["accuracy"].mean().unstack("fold").round(12)
    assert row["accuracy"] == pytest.approx((means.loc[means[1].idxmax(), 0] + means.loc[means[0].idxmax(), 1]) / 2)
    assert row["accuracy"] <= means.mean(axis=1).max() and row["n"] == 4


def test_the_caption_names_the_grid(study):
    assert grid_caption(study) == (
        "every method is trained with each of lr 0.001, 0.1; head_lr 0.01; weight_decay 0.01; bn batch, frozen, and "
        "counts with its best on the other ones of 2 folds x 2 seeds"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["prompt tuning"]}, "unknown method 'prompt tuning'; there are linear probing, full"),
        ({"methods": [RANDOM_PARAMETERS]}, "goes by a chosen subset of at least one block"),
        ({"methods": ["Siamese readout"], "chosen": []}, "goes by a chosen subset of at least one block"),
    ],
)
def test_bad_requests_are_named(study, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_methods(study, **arguments)


def test_a_task_without_test_images_is_an_error(study):
    task = tiny_task()
    study = Study(tiny_chain(), Task("tiny", task.classes, task.train, None), RECIPES[:1], folds=2, progress=False)
    with pytest.raises(ValueError, match="has no test split"):
        compare_methods(study, test=True)


def test_every_baseline_names_its_source():
    assert all(own.source for name, own in BASELINES.items() if name not in ("linear probing", "full finetuning"))


def test_own_subsets_and_methods_stand_beside_the_others():
    task = tiny_task()
    study = Study(tiny_chain(), task, RECIPES, folds=2, progress=False)
    other, grid = tiny_split(18, seed=8), Head2Toe.grid(shares=(1.0,), Cs=(0.1, 1.0))
    how = {"subsets": {"first two": ["block2", "block1"]}, "others": {"features": grid}, "also_on": other}
    table = compare_methods(study, ["linear probing"], test=True, **how).set_index("method")
    assert table.index.tolist() == ["linear probing", "features", "first two"]
    assert table.loc["first two", "blocks"] == ("block1", "block2") and table.loc["features", "subsets"] == 2
    row = table.loc["first two"]
    assert row["accuracy"] == pytest.approx(study.scores([["block1", "block2"]])["accuracy"].mean())
    assert row["also_accuracy"] == study.accuracy_on(["block1", "block2"], other).mean
    best = grid[int(study.method_scores(grid).groupby("method")["accuracy"].mean().idxmax())]
    fitted = best.fit(tiny_chain(), task.train, 3)
    hits = (fitted.logits(other).argmax(1) == other.labels).double().mean()
    assert table.loc["features", "also_accuracy"] == pytest.approx(float(hits))
    assert "also_accuracy" not in compare_methods(study, ["linear probing"], test=True)


def test_subsets_of_the_studys_own_recipes_share_one_pass_a_fold(monkeypatch):
    passes = []

    def counted(backbone, blocks, *args, **options):
        passes.append(len(set(blocks)))
        return fit_together(backbone, blocks, *args, **options)

    monkeypatch.setattr(runner, "fit_together", counted)
    study = Study(tiny_chain(), tiny_task(), RECIPES[:1], folds=2, device="cpu", progress=False)
    compare_methods(study, ["linear probing", "full finetuning", "BitFit"], subsets={"first": ["block1"]})
    assert passes == [3, 3, 1, 1]  # BitFit's recipe is another one
