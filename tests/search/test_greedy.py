"""Greedy SubTuning on scores that stand in a table: traces by hand, brute force, and other epsilons replayed."""

import math
from itertools import combinations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from subtuning_lab import Recipe, Study, best_window, exhaustive_search
from subtuning_lab.search.greedy import COLUMNS, greedy_subtuning
from subtuning_lab.search.significance import SignificantGain, fold_difference, holm
from tests.helpers import tiny_chain, tiny_task


class Lookup:
    """A study whose scores stand in a table: subset, as "b1 b3" -> accuracy or fold accuracies; others give `other`."""

    title = "lookup"

    def __init__(self, n_blocks, table=None, other=0.5, params=None):
        self.block_names = tuple(f"b{i}" for i in range(1, n_blocks + 1))
        self.part_names = ("stem", *self.block_names, "tail")
        self.table, self.other, self.params, self.calls = table or {}, other, params or {}, []

    def folds_of(self, blocks):
        value = self.other(blocks) if callable(self.other) else self.table.get(" ".join(blocks), self.other)
        return value if isinstance(value, list) else [value - 0.01, value + 0.01]

    def scores(self, subsets):
        self.calls.append(list(map(tuple, subsets)))
        rows = []
        for blocks in self.calls[-1]:
            assert blocks == tuple(name for name in self.block_names if name in blocks), "not in the network's order"
            for fold, value in enumerate(self.folds_of(blocks)):
                params = self.count_parameters(blocks)
                rows.append((blocks, fold, 0, value, params, 100.0 + len(blocks), 3, 2.0))
        return pd.DataFrame(
            rows, columns=["blocks", "fold", "seed", "accuracy", "params", "flops", "epochs", "seconds"]
        )

    def all_scores(self, subsets):
        return self.scores(subsets)

    def count_parameters(self, blocks):
        return sum(self.params.get(name, 10) for name in blocks)


PAIRS = {"": 0.5, "b1": 0.6, "b2": 0.7, "b3": 0.65, "b1 b2": 0.75, "b2 b3": 0.72, "b1 b3": 0.9, "b1 b2 b3": 0.74}


def kept(result):
    rows = result.trace[result.trace["kept"]]
    return list(zip(rows["round"], rows["candidate"], rows["blocks"], strict=True))


def test_the_trace_is_the_one_by_hand():
    study = Lookup(3, PAIRS)
    result = greedy_subtuning(study)
    assert result.blocks == ("b1", "b2") and result.complete
    trace = result.trace
    assert trace.columns.tolist() == list(COLUMNS)
    assert trace["candidate"].tolist() == ["", "b1", "b2", "b3", "b1", "b3", "b3"]
    assert trace["round"].tolist() == [0, 1, 1, 1, 2, 2, 3]
    b = ("b1", "b2", "b3")
    assert trace["blocks"].tolist() == [(), b[:1], b[1:2], b[2:], b[:2], b[1:], b]
    assert trace["accuracy"].tolist() == pytest.approx([0.5, 0.6, 0.7, 0.65, 0.75, 0.72, 0.74])
    assert math.isnan(trace["gain"][0])
    assert trace["gain"].tolist()[1:] == pytest.approx([0.1, 0.2, 0.15, 0.05, 0.02, -0.01])
    assert kept(result) == [(0, "", ()), (1, "b2", ("b2",)), (2, "b1", ("b1", "b2"))]
    assert trace["std"].tolist() == pytest.approx([0.01 * math.sqrt(2)] * 7) and set(trace["n"]) == {2}
    assert trace["params"].tolist() == [0, 10, 10, 10, 20, 20, 30]
    assert not trace["forced"].any() and not trace["dropped"].any() and trace["p"].isna().all()
    assert (result.accuracy, result.std, result.n) == pytest.approx((0.75, 0.01 * math.sqrt(2), 2))
    assert (result.title, result.epsilon, result.direction) == ("lookup", 0.0, "forward")


def test_the_cost_is_that_of_all_trainings():
    result = greedy_subtuning(Lookup(3, PAIRS))
    assert result.trace["trainings"].tolist() == [2] * 7 and result.trace["seconds"].tolist() == [4.0] * 7
    assert result.trace["flops"].tolist() == [2 * (100 + n) for n in (0, 1, 1, 1, 2, 2, 3)]
    cost = result.cost
    assert (cost.trainings, cost.seconds, cost.flops) == (14, 28.0, 2 * (700 + 10))
    both = greedy_subtuning(Lookup(3, PAIRS), direction="both")
    assert both.cost.trainings == 2 * len(set(both.trace["blocks"])) < both.trace["trainings"].sum()


def test_recipes_that_lost_are_paid_for_too():
    class Twice(Lookup):
        def all_scores(self, subsets):
            rows = super().scores(subsets)
            return pd.concat([rows.assign(recipe=0), rows.assign(recipe=1, accuracy=0.0)])

    once, twice = greedy_subtuning(Lookup(3, PAIRS)), greedy_subtuning(Twice(3, PAIRS))
    assert twice.trace["accuracy"].tolist() == once.trace["accuracy"].tolist()
    assert (twice.cost.trainings, twice.cost.seconds) == (2 * once.cost.trainings, 2 * once.cost.seconds)


def test_a_scorer_may_leave_costs_untold():
    class Toy(Lookup):
        def scores(self, subsets):
            return super().scores(subsets).drop(columns=["seconds", "flops"])

    cost = greedy_subtuning(Toy(3, PAIRS)).cost
    assert cost.trainings == 14 and math.isnan(cost.seconds) and math.isnan(cost.flops)


def test_each_round_is_one_call_and_asks_for_nothing_twice():
    study = Lookup(5, other=lambda blocks: 0.5 + 0.05 * len(blocks))
    result = greedy_subtuning(study)
    assert [len(call) for call in study.calls] == [1 + 5, 4, 3, 2, 1]
    asked = sum(study.calls, [])
    assert len(asked) == len(set(asked)) == len(result.trace) and result.blocks == study.block_names


def test_backward_removes_what_costs_nothing():
    result = greedy_subtuning(Lookup(3, {**PAIRS, "b1 b3": 0.74, "b1 b2": 0.7}), direction="backward")
    # 0.74 without b2 as well as with it; then b3 alone 0.65
    assert result.blocks == ("b1", "b3")
    assert kept(result) == [(0, "", ("b1", "b2", "b3")), (1, "b2", ("b1", "b3"))]
    assert result.trace["candidate"].tolist() == ["", "b1", "b2", "b3", "b1", "b3"]
    assert result.trace["gain"].tolist()[1:] == pytest.approx([-0.02, 0, -0.04, -0.09, -0.14])


def test_backward_goes_on_to_max_blocks_whatever_it_costs():
    result = greedy_subtuning(Lookup(3, PAIRS), direction="backward", max_blocks=1)
    assert kept(result) == [(0, "", ("b1", "b2", "b3")), (1, "b2", ("b1", "b3")), (2, "b1", ("b3",))]
    assert result.trace.loc[result.trace["forced"], "blocks"].tolist() == [("b3",)]
    assert result.trace["round"].max() == 3, "a further removal may still pay"


def test_both_gives_the_better_direction_and_both_traces():
    both = greedy_subtuning(Lookup(3, PAIRS), direction="both")
    assert both.blocks == ("b1", "b3") and both.direction == "both"
    forward, backward = (greedy_subtuning(Lookup(3, PAIRS), direction=way) for way in ("forward", "backward"))
    assert_frame_equal(both.trace, pd.concat([forward.trace, backward.trace], ignore_index=True))
    worse = {"": 0.5, "b1": 0.8, "b1 b2": 0.6, "b2": 0.55}
    assert greedy_subtuning(Lookup(2, worse), direction="both").blocks == ("b1",)


def test_both_breaks_ties_by_parameters_then_by_depth():
    # forward stops at b1; backward stops at b2 b3, which is as good
    table = {"": 0.5, "b1": 0.8, "b2 b3": 0.8, "b1 b2 b3": 0.7}
    for sizes, chosen in [({}, ("b1",)), ({"b1": 30}, ("b2", "b3")), ({"b1": 20}, ("b1",))]:
        assert greedy_subtuning(Lookup(3, table, params=sizes), direction="both").blocks == chosen


def test_ties_go_to_fewer_parameters_then_to_the_earlier_block():
    table = {"": 0.5, "b2": 0.7, "b3": [0.1 + 0.6, 0.7], "b4": [0.7, 0.1 + 0.6]}
    for sizes, first in [({}, "b2"), ({"b3": 9}, "b3"), ({"b2": 11}, "b3"), ({"b4": 8, "b3": 9}, "b4")]:
        study = Lookup(4, table, other=0.4, params=sizes)
        assert greedy_subtuning(study, max_blocks=1).blocks == (first,), sizes


def test_rounding_breaks_no_tie():
    one, other = [0.93, 0.41, 0.9, 0.08, 0.24], [0.08, 0.9, 0.93, 0.41, 0.24]  # the same, in another order
    for first, second in ((one, other), (other, one)):
        result = greedy_subtuning(Lookup(2, {"": 0.05, "b1": first, "b2": second}), max_blocks=1)
        assert result.trace["accuracy"][1] != result.trace["accuracy"][2], "the order matters to the last bit"
        assert result.blocks == ("b1",)


@pytest.mark.parametrize(
    "epsilon, blocks",
    [(0, 2), (0.0499, 2), (0.05, 1), (0.1999, 1), (0.2, 0), (math.inf, 0), (-math.inf, 3)],
)
def test_a_block_must_bring_more_than_epsilon(epsilon, blocks):
    assert len(greedy_subtuning(Lookup(3, PAIRS), epsilon).blocks) == blocks


@pytest.mark.parametrize("direction, best", [("forward", 0), ("backward", 0), ("both", 0)])
def test_where_all_scores_are_equal_no_block_is_tuned(direction, best):
    study = Lookup(4)
    result = greedy_subtuning(study, direction=direction)
    assert result.blocks == () and (result.trace["gain"].dropna() == 0).all()


def test_a_plateau_ends_forward_search_though_better_lies_behind():
    table = {"b1 b2": 0.9}
    assert greedy_subtuning(Lookup(3, table)).blocks == ()
    assert greedy_subtuning(Lookup(3, table), -math.inf, max_blocks=2).blocks == ("b1", "b2")


def test_a_network_of_one_block():
    assert greedy_subtuning(Lookup(1, {"": 0.5, "b1": 0.6})).blocks == ("b1",)
    assert greedy_subtuning(Lookup(1, {"": 0.6, "b1": 0.5})).blocks == ()
    assert greedy_subtuning(Lookup(1, {"": 0.5, "b1": 0.6}), direction="both").blocks == ("b1",)
    assert greedy_subtuning(Lookup(1), direction="backward", max_blocks=1).blocks == ()
    assert exhaustive_search(Lookup(1, {"b1": 0.6}), 1).blocks == best_window(Lookup(1)).blocks == ("b1",)


grids = st.integers(0, 40).map(lambda percent: percent / 100)


@given(st.lists(grids, min_size=1, max_size=5), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_greedy_is_exact_where_blocks_just_add_up(gains, most, data):
    """Modular scores: the best subset of at most k blocks has the k greatest positive gains."""
    gains = [gain - 0.2 for gain in gains]
    most = min(most, len(gains))
    worth = dict(zip((f"b{i + 1}" for i in range(len(gains))), gains, strict=True))
    study = Lookup(len(gains), other=lambda blocks: 0.5 + 0.1 * sum(worth[name] for name in blocks))
    subsets = [s for n in range(most + 1) for s in combinations(study.block_names, n)]
    best = max(round(study.other(blocks), 12) for blocks in subsets)
    smallest = min(len(blocks) for blocks in subsets if round(study.other(blocks), 12) == best)
    for direction in ("forward", "both"):
        result = greedy_subtuning(study, max_blocks=most, direction=direction)
        assert result.accuracy == pytest.approx(best, abs=1e-12) and len(result.blocks) == smallest
    assert exhaustive_search(study, most).accuracy == pytest.approx(best, abs=1e-12)


tables = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(grids, min_size=2, max_size=2), min_size=2**n, max_size=2**n).map(
        lambda values: {
            " ".join(f"b{i + 1}" for i in range(n) if code >> i & 1): pair for code, pair in enumerate(values)
        }
    )
)


@given(tables, st.one_of(grids, st.sampled_from([math.inf, -math.inf])), st.sampled_from([None, 1, 2]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_replay_is_what_another_search_would_have_given(table, epsilon, most, tested):
    n = len(table).bit_length() - 1
    most = most and min(most, n)
    keep = SignificantGain(0.4) if tested else None
    for direction, whole in (("forward", -math.inf), ("backward", math.inf), ("both", 0.1)):
        study = Lookup(n, table)
        seen = greedy_subtuning(study, whole, most, direction, keep=keep)
        calls = len(study.calls)
        replayed = seen.replay(epsilon)
        assert len(study.calls) == calls, "a replay scores nothing"
        again = greedy_subtuning(Lookup(n, table), epsilon, most, direction, keep=keep)
        if replayed.complete:
            assert replayed.blocks == again.blocks and replayed.cost == again.cost
            assert_frame_equal(replayed.trace, again.trace)
        assert replayed.complete or whole == 0.1


def test_a_replay_says_when_rounds_are_missing():
    seen = greedy_subtuning(Lookup(3, PAIRS), epsilon=0.1)
    assert seen.blocks == ("b2",)
    assert seen.replay(0.15).complete and seen.replay(0.2).blocks == ()
    short = seen.replay(0.01)  # b1 would have been added too, and what comes next was never scored
    assert not short.complete and short.blocks == ("b1", "b2")
    assert greedy_subtuning(Lookup(3, PAIRS), 0.1, max_blocks=2).replay(0.01).complete
    back = greedy_subtuning(Lookup(3, PAIRS), direction="backward")
    assert not back.replay(0.5).complete and greedy_subtuning(Lookup(3, PAIRS), direction="both").replay(0).complete


def test_a_rule_keeps_only_what_is_significantly_better():
    clear = {"": [0.5, 0.52, 0.48, 0.5, 0.5], "b1": [0.7, 0.75, 0.69, 0.72, 0.7], "b2": [0.5, 1.0, 0.5, 1.0, 0.7]}
    study = Lookup(2, clear | {"b1 b2": [0.71, 0.75, 0.7, 0.7, 0.72]}, other=[0.5] * 5)
    plain, tested = greedy_subtuning(study), greedy_subtuning(study, keep=SignificantGain())
    assert plain.blocks == ("b2",) and tested.blocks == (), "b2 is best on average, and no candidate else is tried"
    study = Lookup(2, clear | {"b2": [0.6] * 5, "b1 b2": [0.71, 0.75, 0.7, 0.7, 0.72]})
    tested = greedy_subtuning(study, keep=SignificantGain())
    assert tested.blocks == ("b1",) and greedy_subtuning(study).blocks == ("b1", "b2")
    rows = dict(iter(study.scores([(), ("b1",), ("b2",)]).groupby("blocks")))
    expected = holm([fold_difference(rows[name,], rows[()]).p for name in ("b1", "b2")])
    assert tested.trace["p"].tolist()[1:3] == expected


def test_backward_with_a_rule_removes_what_is_not_significantly_missed():
    noisy = {"b1 b2": [0.7, 0.8, 0.7, 0.8, 0.7], "b1": [0.69, 0.8, 0.72, 0.76, 0.7], "b2": [0.2] * 5}
    study = Lookup(2, noisy | {"": [0.31, 0.3, 0.29, 0.3, 0.3]})
    assert greedy_subtuning(study, direction="backward").blocks == ("b1", "b2")
    assert greedy_subtuning(study, direction="backward", keep=SignificantGain()).blocks == ("b1",)


def test_exhaustive_search_scores_every_subset_once():
    study = Lookup(3, PAIRS)
    found = exhaustive_search(study, 2)
    assert len(study.calls) == 1
    assert set(study.calls[0]) == {s for n in range(3) for s in combinations(study.block_names, n)}
    assert found.blocks == ("b1", "b3") and found.accuracy == pytest.approx(0.9) and found.n == 2
    assert found.std == pytest.approx(0.01 * math.sqrt(2))
    assert (found.cost.trainings, found.cost.seconds, found.title) == (14, 28.0, "lookup")
    assert exhaustive_search(Lookup(3), 3).blocks == (), "ties go to fewer parameters"


def test_exhaustive_search_refuses_more_than_the_limit():
    study = Lookup(16)
    with pytest.raises(ValueError, match="697 subsets of up to 3 of 16 blocks are more than limit=500.*limit=697"):
        exhaustive_search(study, 3)
    assert not study.calls and len(exhaustive_search(study, 3, limit=697).table) == 697


def test_the_best_window_is_among_all_runs_of_blocks():
    study = Lookup(4, {"b1 b3": 0.9, "b2 b3": 0.8, "b1 b2 b3": 0.8, "b4": 0.7})
    found = best_window(study)
    assert found.blocks == ("b2", "b3") and len(found.table) == 4 + 3 + 2 + 1
    assert best_window(study, 1).blocks == ("b4",) and len(best_window(study, 2).table) == 7


def test_a_study_is_searched_like_a_table():
    study = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), folds=2, device="cpu", progress=False)
    result = greedy_subtuning(study, -math.inf, max_blocks=2)
    rows = study.scores(list(result.trace["blocks"]))
    for row in result.trace.itertuples():
        own = [s for s in rows.itertuples() if s.blocks == row.blocks]
        assert row.accuracy == pytest.approx(sum(s.accuracy for s in own) / 2) and row.trainings == 2
        assert row.flops == pytest.approx(sum(s.flops for s in own)) and row.params == own[0].params
    assert len(result.blocks) == 2 and len(study.records.table()) == result.cost.trainings == 2 * (1 + 3 + 2)


def test_a_stopped_search_leaves_what_is_scored_and_hides_nothing():
    class Stops(Lookup):
        def scores(self, subsets):
            if self.calls:
                raise KeyboardInterrupt
            return super().scores(subsets)

    with pytest.raises(KeyboardInterrupt):
        greedy_subtuning(Stops(3, PAIRS))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.5])
@pytest.mark.parametrize("place", ["", "b2", "b1 b2"])
def test_scores_that_are_no_accuracies_are_told(place, value):
    study = Lookup(3, {**PAIRS, place: [0.9, value]})
    with pytest.raises(ValueError, match=r"accuracy of \(.*\) in fold 1, seed 0 is .*\[0, 1\]"):
        greedy_subtuning(study)


def test_a_scorer_that_leaves_a_subset_out_is_told():
    class Forgets(Lookup):
        def scores(self, subsets):
            return super().scores([s for s in subsets if s != ("b2",)])

    with pytest.raises(ValueError, match=r"no score of \[\('b2',\)\]"):
        greedy_subtuning(Forgets(3))


@pytest.mark.parametrize(
    ("search", "parameter"),
    [(greedy_subtuning, "max_blocks"), (exhaustive_search, "size"), (best_window, "max_window")],
)
def test_more_blocks_than_there_are_are_refused_before_anything_is_scored(search, parameter):
    study = Lookup(3)
    with pytest.raises(ValueError, match=f"{parameter} is 4; it must be .* at least 1 and at most 3"):
        search(study, **{parameter: 4})
    assert not study.calls
