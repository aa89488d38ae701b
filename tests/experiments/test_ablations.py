"""Ablations: the same images for all variants of a repetition, each with its best recipe, differences paired."""

import pytest

from subtuning_lab import Recipe, Records, Study, recipe_grid, summarize_repeats
from subtuning_lab.experiments.ablations import ABLATIONS, SUBTUNING, ablate, summarize_variants, variant_differences
from tests.helpers import tiny_chain, tiny_task

RECIPES = recipe_grid(Recipe(epochs=2, batch_size=8), lr=[1e-3, 1e-1])
VARIANTS = {
    name: ABLATIONS[name] for name in (SUBTUNING, "re-initialized blocks", "Siamese readout", "two-layer readout")
}
SUBSETS = {"first": ["block1"], "last two": ["block3", "block2"], "linear probing": []}
HOW = {"folds": 2, "repeats": 2, "progress": False}


@pytest.fixture(scope="module")
def run():
    store, task = Records(":memory:"), tiny_task(48)
    return task, store, ablate(tiny_chain(), task, SUBSETS, VARIANTS, 24, RECIPES, records=store, **HOW)


def test_there_is_a_row_for_each_subset_variant_and_repetition(run):
    _, store, table = run
    assert len(table) == 3 * 4 * 2 and not table.duplicated(["subset", "method", "repeat"]).any()
    assert set(table["blocks"]) == {("block1",), ("block2", "block3"), ()}
    assert store.test_uses() == len(table)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_a_study_of_its_own(run, variant):
    """By hand: the variant's study on that repetition's images and seed."""
    task, _, table = run
    study = Study(tiny_chain(), task.subset(24, seed=1), RECIPES, folds=2, seeds=(1,), progress=False)
    study = study.variant(**VARIANTS[variant])
    row = table.query("method == @variant and repeat == 1 and subset == 'first'").iloc[0]
    assert row["accuracy"] == pytest.approx(study.scores([["block1"]])["accuracy"].mean())
    assert row["test_accuracy"] == pytest.approx(study.test(["block1"]).mean)


def test_linear_probing_has_no_blocks_to_change(run):
    _, _, table = run
    wide = table[table["subset"] == "linear probing"].pivot(index="repeat", columns="method", values="test_accuracy")
    for variant in ("re-initialized blocks", "Siamese readout"):
        assert (wide[variant] == wide[SUBTUNING]).all()


def test_a_second_call_reads_and_leaves_the_test_images_alone_unless_asked(run):
    task, store, table = run
    uses, rows = store.test_uses(), len(store.table())
    again = ablate(tiny_chain(), task, SUBSETS, VARIANTS, 24, RECIPES, test=False, records=store, **HOW)
    assert again["accuracy"].tolist() == table["accuracy"].tolist() and "test_accuracy" not in again
    assert store.test_uses() == uses and len(store.table()) == rows


def test_differences_are_paired(run):
    _, _, table = run
    for by in ("test_accuracy", "accuracy"):
        found = variant_differences(table, "two-layer readout", by=by).set_index("subset")
        wide = table[table["subset"] == "last two"].pivot(index="repeat", columns="method", values=by)
        gains = wide["two-layer readout"] - wide[SUBTUNING]
        row = found.loc["last two"]
        assert row["difference"] == pytest.approx(gains.mean()) and row["error"] == pytest.approx(gains.sem())
        assert row["n"] == 2 and list(found.index) == list(SUBSETS) and row["variant"] == "two-layer readout"


def test_summaries_are_over_repetitions(run):
    _, _, table = run
    own = table.query("subset == 'first' and method == @SUBTUNING")["test_accuracy"]
    row = summarize_variants(table).query("subset == 'first' and method == @SUBTUNING").iloc[0]
    assert row[["accuracy", "std", "n"]].tolist() == pytest.approx([own.mean(), own.std(), 2])
    repeats = summarize_repeats(table[table["subset"] == "first"])
    assert len(repeats) == len(VARIANTS) and repeats["n"].eq(2).all()


def test_bad_calls_are_named():
    call = (tiny_chain(), tiny_task())
    with pytest.raises(ValueError, match="no colour"):
        ablate(*call, SUBSETS, {"painted": {"colour": "red"}}, 12, RECIPES, **HOW)
    with pytest.raises(ValueError, match="block9"):
        ablate(*call, {"none": ["block9"]}, VARIANTS, 12, RECIPES, **HOW)


def test_differences_name_what_is_missing(run):
    _, _, table = run
    with pytest.raises(ValueError, match="by is 'loss'"):
        variant_differences(table, "two-layer readout", by="loss")
    with pytest.raises(ValueError, match="test images were not used"):
        variant_differences(table.drop(columns="test_accuracy"), "two-layer readout")
    with pytest.raises(ValueError, match="no method 'LoRA'"):
        variant_differences(table, "LoRA")
