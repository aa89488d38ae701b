"""Profiles: which subsets are scored, and means, spreads and ties that agree with a sum by hand."""

import statistics

import pandas as pd
import pytest

from subtuning_lab import Recipe, Study, summarize
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, finetuning_profile, pair_profile
from tests.helpers import tiny_chain, tiny_task


class Lookup:
    """A study whose scores stand in a table: subset -> fold accuracies; others score 0.5."""

    title = "lookup"

    def __init__(self, n_blocks: int = 4, params: dict[str, int] | None = None, **accuracies) -> None:
        self.block_names = tuple(f"b{i}" for i in range(1, n_blocks + 1))
        self.part_names = ("stem", *self.block_names, "tail")
        self.params, self.accuracies, self.asked = params or {}, accuracies, []

    def scores(self, subsets):
        self.asked += [tuple(blocks) for blocks in subsets]
        rows = []
        for blocks in map(tuple, subsets):
            values = self.accuracies.get("_".join(blocks), [0.5, 0.5])
            rows += [(blocks, fold, 0, value, self.count_parameters(blocks)) for fold, value in enumerate(values)]
        return pd.DataFrame(rows, columns=["blocks", "fold", "seed", "accuracy", "params"])

    def count_parameters(self, blocks):
        return sum(self.params.get(name, 10) for name in blocks)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_windows_are_all_runs_of_consecutive_blocks(window):
    study = Lookup()
    profile = finetuning_profile(study, window)
    names = study.block_names
    expected = [names[i : i + window] for i in range(5 - window)]
    assert study.asked == [*expected, (), study.part_names]
    table = profile.table
    assert table["kind"].tolist() == ["blocks"] * len(expected) + [LINEAR_PROBING, FULL_FINETUNING]
    assert (
        table["position"].tolist()[:-2] == list(range(1, 6 - window))
        and table["position"].isna().tolist()[-2:] == [True] * 2
    )
    assert table["blocks"].tolist() == study.asked
    assert table["params"].tolist() == [10 * len(blocks) for blocks in study.asked]
    assert table["label"].is_unique and (profile.window, profile.title) == (window, "lookup")


def test_pairs_are_all_pairs_beside_the_single_blocks():
    study = Lookup()
    table = pair_profile(study).table
    subsets = table.loc[table["kind"] == "blocks", "blocks"].tolist()
    assert len(subsets) == len(set(subsets)) == 4 + 6
    assert {frozenset(blocks) for blocks in subsets if len(blocks) == 2} == {
        frozenset({f"b{i}", f"b{j}"}) for i in range(1, 5) for j in range(i + 1, 5)
    }
    assert table["kind"].tolist()[-2:] == [LINEAR_PROBING, FULL_FINETUNING]


def test_mean_and_spread_are_those_of_the_fold_scores():
    values = [0.1, 0.4, 0.35, 0.9]
    profile = finetuning_profile(Lookup(b2=values, b3=[0.25]))
    row, single = profile.table.iloc[1], profile.table.iloc[2]
    assert row["accuracy"] == pytest.approx(statistics.mean(values))
    assert row["std"] == pytest.approx(statistics.stdev(values))
    assert row["n"] == 4 and single["n"] == 1 and pd.isna(single["std"])


def test_a_real_profile_agrees_with_a_sum_by_hand():
    study = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), folds=3, seeds=(0, 1), device="cpu", progress=False)
    profile = finetuning_profile(study, window=2)
    for row in profile.table.itertuples():
        values = [s.accuracy for s in profile.scores.itertuples() if s.blocks == row.blocks]
        assert len(values) == row.n == 6
        assert row.accuracy == pytest.approx(statistics.mean(values)) and row.std == pytest.approx(
            statistics.stdev(values)
        )
    assert profile.table["blocks"].tolist()[-2:] == [(), study.part_names]
    assert "tiny" in profile.title and "24" in profile.title


def test_the_best_row_is_one_of_the_blocks_not_a_reference():
    study = Lookup(b3=[0.7, 0.6], **{"": [0.9, 0.9], "stem_b1_b2_b3_b4_tail": [1.0, 1.0]})
    assert finetuning_profile(study).best() == ("b3",)


def test_ties_go_to_fewer_parameters_then_to_the_earlier_block():
    assert finetuning_profile(Lookup()).best() == ("b1",)
    assert finetuning_profile(Lookup(params={"b1": 20, "b2": 11})).best() == ("b3",)
    assert finetuning_profile(Lookup(params={"b4": 5}, b1=[0.4, 0.6])).best() == ("b4",)


def test_the_order_of_folds_does_not_break_a_tie():
    """Sums of the same numbers in another order differ in their last bit."""
    values = [0.1, 0.2, 0.3, 0.7, 0.6, 0.15]
    orders = [values, values[::-1], sorted(values), [0.7, 0.1, 0.6, 0.2, 0.15, 0.3]]
    study = Lookup(params={"b3": 1}, **{f"b{i}": order for i, order in enumerate(orders, start=1)})
    assert finetuning_profile(study).best() == ("b3",)


def test_wider_windows_than_there_are_blocks_are_refused_before_anything_is_scored():
    study = Lookup()
    with pytest.raises(ValueError, match=r"window is 5; it must be .* at most 4"):
        finetuning_profile(study, 5)
    assert study.asked == []


def test_a_network_of_one_block_has_a_profile_and_no_pairs():
    assert len(finetuning_profile(Lookup(n_blocks=1)).table) == len(pair_profile(Lookup(n_blocks=1)).table) == 3


def test_summaries_keep_linear_probing():
    scores = Lookup().scores([(), ("b1",)])
    assert summarize(scores)["n"].tolist() == [2, 2] and summarize(scores).index.tolist() == [(), ("b1",)]
