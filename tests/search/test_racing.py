"""Races and halving on scores that stand in a table: who goes on, what it costs, and what greedy search makes of it."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from scipy import stats

from subtuning_lab import Recipe, Study, agreement_table, best_window, exhaustive_search, greedy_subtuning
from subtuning_lab.search.candidates import chosen_rows
from subtuning_lab.search.racing import Halving, Race, not_behind
from subtuning_lab.search.significance import SignificantGain, corrected_p, fold_difference, holm
from tests.helpers import tiny_chain, tiny_task


@dataclass(frozen=True)
class Candidate:
    blocks: tuple[str, ...]
    recipe: str


class Field:
    """Arms whose scores follow from a quality per subset and recipe, with noise that depends on all that is trained.

    A training takes as many seconds as it has epochs. Short schedules have a third of the accuracy.
    """

    title = "field"

    def __init__(self, quality, n_blocks=4, recipes=("plain",), folds=5, seeds=(0,), epochs=10, noise=0.01, loss=True):
        self.block_names = tuple(f"b{i}" for i in range(1, n_blocks + 1))
        self.part_names = self.block_names
        self.quality, self.recipes, self.noise, self.with_loss = quality, recipes, noise, loss
        self.n_folds, self.seeds, self.epochs = folds, seeds, epochs
        self.trained = Counter()  # (candidate, fold, seed, epochs) -> how often it was asked for

    def candidates(self, subsets):
        return [Candidate(tuple(blocks), recipe) for blocks in subsets for recipe in self.recipes]

    def candidate_scores(self, candidates, folds=None, seeds=None, epochs=None):
        epochs, rows = epochs or self.epochs, []
        for place, one in enumerate(candidates):
            for seed in self.seeds if seeds is None else seeds:
                for fold in range(self.n_folds) if folds is None else folds:
                    self.trained[one, fold, seed, epochs] += 1
                    code = f"{one.blocks}{one.recipe}{fold}{seed}{epochs}"
                    noise = np.random.default_rng(list(code.encode())).normal() * self.noise
                    value = self.quality(one.blocks, one.recipe) + noise
                    accuracy = float(np.clip(value if epochs == self.epochs else value / 3, 0, 1))
                    row = (place, one.blocks, fold, seed, accuracy, 2 - value, len(one.blocks), epochs, 1.0 * epochs)
                    rows.append(row)
        columns = ["candidate", "blocks", "fold", "seed", "accuracy", "loss", "params", "epochs", "seconds"]
        table = pd.DataFrame(rows, columns=columns).assign(flops=100.0)
        return table if self.with_loss else table.drop(columns="loss")

    def all_scores(self, subsets):
        rows = self.candidate_scores(self.candidates(subsets))
        return rows.assign(recipe=rows.pop("candidate") % len(self.recipes))

    def scores(self, subsets):
        return chosen_rows(self.all_scores(subsets))

    def count_parameters(self, blocks):
        return len(blocks)


def by_block(*values):
    """A quality that grows with the best block of a subset."""
    return lambda blocks, recipe: max([0.3, *(values[int(name[1:]) - 1] for name in blocks)]) + 0.01 * len(blocks)


CLEAR = by_block(0.5, 0.8, 0.4, 0.45)
SINGLES = [("b1",), ("b2",), ("b3",), ("b4",)]


def stages_of(rows):
    """Subset -> stage after which it was given up."""
    return rows.groupby("blocks")["dropped"].max().to_dict()


def test_halving_lets_the_better_part_go_on():
    study = Field(CLEAR)
    rows = Halving(eta=2, ladder=((0.2, 1), (0.5, 1), (1, 1))).scores(study, SINGLES)
    assert stages_of(rows) == {("b1",): 2, ("b2",): 0, ("b3",): 1, ("b4",): 1}
    assert rows.groupby("stage")["epochs"].unique().map(list).tolist() == [[2], [5], [10]]
    assert rows["seconds"].sum() == 5 * (4 * 2 + 2 * 5 + 1 * 10)
    assert rows.loc[rows["counted"], "epochs"].groupby(rows["blocks"]).unique().map(list).to_dict() == {
        ("b1",): [5],
        ("b2",): [10],
        ("b3",): [2],
        ("b4",): [2],
    }


@pytest.mark.parametrize("count, eta, left", [(9, 3, 3), (8, 3, 2), (7, 4, 1), (2, 4, 1), (1, 4, 1), (9, 2.5, 3)])
def test_halving_divides_by_eta_and_leaves_at_least_one(count, eta, left):
    study = Field(lambda blocks, recipe: 0.5, n_blocks=count)
    rows = Halving(eta, ((0.1, 1), (1, 1))).scores(study, [(name,) for name in study.block_names])
    assert rows.loc[rows["dropped"] == 0, "blocks"].nunique() == left


def test_full_trainings_on_some_folds_count_for_the_rest():
    study = Field(CLEAR)
    rows = Halving(2, ((0.1, 1), (1, 0.4), (1, 1))).scores(study, SINGLES)
    assert max(study.trained.values()) == 1, "nothing is trained twice"
    assert len(rows) == sum(study.trained.values()) == 4 * 5 + 2 * 2 + 1 * 3
    best = rows[(rows["blocks"] == ("b2",)) & rows["counted"]]
    assert best["fold"].tolist() == [0, 1, 2, 3, 4] and best["stage"].tolist() == [2, 2, 3, 3, 3]


def test_short_schedules_are_compared_by_loss_where_it_is_told():
    class Misleading(Field):
        def candidate_scores(self, candidates, folds=None, seeds=None, epochs=None):
            rows = super().candidate_scores(candidates, folds, seeds, epochs)
            return rows if epochs is None else rows.assign(accuracy=1 - rows["accuracy"])

    halving = Halving(4, ((0.1, 1), (1, 1)))
    assert stages_of(halving.scores(Misleading(CLEAR), SINGLES))["b2",] == 0
    assert stages_of(halving.scores(Misleading(CLEAR, loss=False), SINGLES))["b2",] == 1
    assert stages_of(halving.scores(Field(CLEAR, loss=False), SINGLES))["b2",] == 0


def test_a_race_gives_up_what_is_clearly_behind_and_nothing_else():
    near = by_block(0.5, 0.8, 0.801, 0.4)
    rows = Race(alpha=0.01, most=None).scores(Field(near), SINGLES)
    assert stages_of(rows) == {("b1",): 1, ("b2",): 0, ("b3",): 0, ("b4",): 1}
    rows = Race(short=None, most=None, first=4).scores(Field(near), SINGLES)
    assert stages_of(rows) == {("b1",): 1, ("b2",): 0, ("b3",): 0, ("b4",): 1}
    assert Counter(rows["blocks"]) == {("b1",): 4, ("b2",): 5, ("b3",): 5, ("b4",): 4}
    assert set(rows["epochs"]) == {10}


def test_at_most_so_many_go_on_after_short_schedules():
    equal = Field(lambda blocks, recipe: 0.5, noise=0.1)
    for most, expected in ((1, 1), (3, 3), (None, 4)):
        rows = Race(alpha=1e-9, most=most).scores(equal, SINGLES)
        assert rows.loc[rows["dropped"] == 0, "blocks"].nunique() == expected


@pytest.mark.parametrize("race", [Race(), Race(most=None), Race(short=None, first=2), Halving(), Halving(2)])
@pytest.mark.parametrize("seeds", [(0,), (3, 5)])
def test_the_last_are_trained_in_full_on_every_fold_and_seed(race, seeds):
    study = Field(CLEAR, seeds=seeds, noise=0.05)
    rows = race.scores(study, SINGLES)
    assert max(study.trained.values()) == 1 and len(rows) == sum(study.trained.values())
    whole = {blocks for blocks, stage in stages_of(rows).items() if stage == 0}
    assert ("b2",) in whole
    reference = study.scores(sorted(whole))
    counted = rows[rows["counted"] & (rows["dropped"] == 0)]
    columns = ["blocks", "fold", "seed", "accuracy", "loss", "params", "flops", "epochs", "seconds"]
    sorted_rows = [
        t.sort_values(["blocks", "seed", "fold"])[columns].reset_index(drop=True) for t in (counted, reference)
    ]
    assert_frame_equal(*sorted_rows)


@pytest.mark.parametrize("race", [Race(), Race(most=None), Halving(2)])
def test_the_same_race_is_run_the_same_way(race):
    one, other = (race.scores(Field(CLEAR, noise=0.1), SINGLES) for _ in range(2))
    assert_frame_equal(one, other)


def test_a_subset_counts_with_the_best_recipe_that_came_furthest():
    quality = {"slow": 0.1, "good": 0.2, "wild": 0.0}
    study = Field(lambda blocks, recipe: CLEAR(blocks, recipe) + quality[recipe], recipes=tuple(quality))
    rows = Halving(3, ((0.1, 1), (1, 1))).scores(study, SINGLES)  # 12 candidates, 4 go on
    assert rows.loc[rows["blocks"] == ("b2",), "candidate"].nunique() == 3, "three recipes were tried"
    chosen = rows[rows["counted"]].groupby("blocks")["candidate"].unique().map(list).to_dict()
    candidates = study.candidates(SINGLES)
    assert [candidates[places[0]].recipe for places in chosen.values()] == ["good"] * 4
    assert all(len(places) == 1 for places in chosen.values())
    assert stages_of(rows) == {("b1",): 0, ("b2",): 0, ("b3",): 1, ("b4",): 1}


def test_greedy_never_keeps_what_was_given_up():
    study = Field(CLEAR, noise=0.02)
    result = greedy_subtuning(study, -math.inf, 3, race=Halving(4, ((0.1, 1), (1, 1))), keep=None)
    trace = result.trace
    assert (trace.loc[trace["kept"], "dropped"] == 0).all() and len(result.blocks) == 3
    given_up = trace[trace["dropped"] > 0]
    assert len(given_up) == 3 + 2 + 1 and given_up["gain"].isna().all() and (given_up["accuracy"] < 0.4).all()
    assert result.blocks[0] == "b1" or "b2" in result.blocks
    assert result.accuracy == pytest.approx(study.scores([result.blocks])["accuracy"].mean()) and result.n == 5
    assert trace["seconds"].sum() == result.cost.seconds
    assert result.cost.seconds == 50 + 5 * (4 + 3 + 2) * 1 + 3 * 50, "the start, short schedules, one full each round"


def test_a_partial_score_is_not_kept_though_it_is_the_highest():
    class Stops(Race):
        def scores(self, study, subsets, certain=()):
            rows = study.all_scores([*certain, *subsets]).assign(counted=True, dropped=0)
            rows.loc[rows["blocks"] == ("b3",), ["accuracy", "dropped"]] = [0.99, 1]
            return rows.astype({"dropped": int})

    result = greedy_subtuning(Field(CLEAR), 0.1, race=Stops())
    assert result.trace.loc[result.trace["blocks"] == ("b3",), "accuracy"].iloc[0] > 0.98
    assert result.blocks == ("b2",)


def test_what_goes_certain_is_trained_in_full_and_compared_with_nothing():
    best = by_block(0.5, 0.8, 0.4, 0.99)
    for race in (Halving(3), Race(), Race(short=None, most=None)):
        rows = race.scores(Field(best), SINGLES[:3], certain=[("b4",)])
        assert stages_of(rows)["b4",] == stages_of(rows)["b2",] == 0 and stages_of(rows)["b3",] > 0
        assert rows.loc[rows["blocks"] == ("b4",), "epochs"].tolist() == [10] * 5


@pytest.mark.parametrize("race", [Halving(ladder=((1, 1),)), Race(alpha=1e-12, short=None)])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_race_that_gives_nothing_up_is_the_full_search(race, direction):
    noisy = {"quality": CLEAR, "noise": 0.1, "recipes": ("one", "two"), "seeds": (0, 1)}
    full = greedy_subtuning(Field(**noisy), 0.01, direction=direction)
    raced = greedy_subtuning(Field(**noisy), 0.01, direction=direction, race=race)
    assert_frame_equal(full.trace, raced.trace)
    assert raced.blocks == full.blocks and raced.cost == full.cost


class GivesUp(Race):
    """A race in which all candidates but one are given up: by what is added, or by what is left."""

    def __init__(self, *survivors):
        object.__setattr__(self, "survivors", survivors)

    def scores(self, study, subsets, certain=()):
        rows = study.all_scores([*certain, *subsets]).assign(counted=True)
        left = [*certain, *self.survivors] if set(self.survivors) & set(subsets) else [*certain, *subsets]
        return rows.assign(dropped=[0 if blocks in left else 1 for blocks in rows["blocks"]])


def table_of(accuracies, noise=0):
    """A field whose subsets score as in a table, as "b1 b3" -> accuracy; others 0.3."""
    return Field(lambda blocks, recipe: accuracies.get(" ".join(blocks), 0.3), n_blocks=3, noise=noise)


@pytest.mark.parametrize(
    "pair, epsilon, blocks",
    [(0.6, 0.0, ("b1", "b2")), (0.6, 0.049, ("b1", "b2")), (0.6, 0.05, ()), (0.5, 0.0, ()), (0.49, 0.0, ())],
)
def test_after_a_failed_race_the_search_looks_one_round_further(pair, epsilon, blocks):
    field = {"": 0.5, "b1": 0.45, "b2": 0.52, "b1 b2": pair}
    race = GivesUp(("b1",))  # b2, which would have paid, is given up
    result = greedy_subtuning(table_of(field), epsilon, race=race)
    assert result.blocks == blocks
    trace = result.trace
    rounds = trace.loc[trace["kept"], "round"].tolist()
    assert rounds == ([0, 1, 2] if blocks else [0]), "kept is what the chosen subset consists of"
    gains = trace.set_index("blocks")["gain"].to_dict()
    assert gains["b1",] == pytest.approx(-0.05) and gains["b1", "b2"] == pytest.approx(pair - 0.5), "over what paid"
    assert trace["round"].max() == (3 if blocks else 2), "two failed rounds end it"
    seen = greedy_subtuning(table_of(field), -math.inf, race=race)
    assert_frame_equal(seen.replay(epsilon).trace, trace) and seen.replay(epsilon).blocks == blocks


def test_a_failed_round_in_which_nothing_was_given_up_is_the_end():
    result = greedy_subtuning(table_of({"": 0.5, "b1": 0.45, "b1 b2": 0.9}), race=GivesUp(("b9",)))
    assert result.blocks == () and result.trace["round"].max() == 1


def test_a_significance_rule_ends_a_failed_race():
    field = table_of({"": 0.5, "b1": 0.45, "b1 b2": 0.9}, noise=0.001)
    assert greedy_subtuning(field, race=GivesUp(("b1",)), keep=SignificantGain()).trace["round"].max() == 1
    assert greedy_subtuning(field, race=GivesUp(("b1",))).blocks == ("b1", "b2")


def test_backward_looks_one_round_further_too():
    field = {"b1 b2 b3": 0.8, "b1 b3": 0.7, "b3": 0.85, "b1": 0.4, "": 0.3}
    race = GivesUp(("b1", "b3"))
    result = greedy_subtuning(table_of(field), direction="backward", race=race)
    assert result.blocks == ("b3",) and result.trace.loc[result.trace["kept"], "round"].tolist() == [0, 1, 2]
    field["b3"] = 0.79
    kept = greedy_subtuning(table_of(field), direction="backward", race=race)
    assert kept.blocks == ("b1", "b2", "b3") and kept.trace["kept"].sum() == 1
    assert greedy_subtuning(table_of(field), 0.01, direction="backward", race=race).blocks == ("b3",)


@pytest.mark.parametrize("race", [Race(), Halving()])
@pytest.mark.parametrize("epsilon", [0.0, 0.005, 0.02, 0.1])
def test_a_raced_replay_is_what_another_race_would_have_given(race, epsilon):
    for seed in (0, 1, 2):
        field = {"quality": lambda blocks, recipe: 0.5, "seeds": (seed,), "noise": 0.03}
        replayed = greedy_subtuning(Field(**field), -math.inf, race=race).replay(epsilon)
        again = greedy_subtuning(Field(**field), epsilon, race=race)
        assert replayed.complete and replayed.blocks == again.blocks
        assert_frame_equal(replayed.trace, again.trace)


def test_a_raced_search_replays_and_takes_a_significance_rule():
    result = greedy_subtuning(Field(CLEAR), -math.inf, 2, race=Race(), keep=SignificantGain())
    assert result.blocks[:1] == ("b2",) or "b2" in result.blocks
    p = result.trace.loc[result.trace["round"] == 1]
    assert (p.loc[p["dropped"] > 0, "p"] == 1).all() and p.loc[p["kept"], "p"].iloc[0] < 0.01
    assert result.replay(0.9).blocks == ()


@given(st.lists(st.integers(20, 80), min_size=4, max_size=4), st.sampled_from([Race(), Race(most=None), Halving(2)]))
@settings(max_examples=8, deadline=None)
def test_without_noise_the_cheap_search_finds_what_the_full_one_finds(values, race):
    quality = by_block(*(value / 100 for value in values))
    full = greedy_subtuning(Field(quality, noise=0), max_blocks=2)
    raced = greedy_subtuning(Field(quality, noise=0), max_blocks=2, race=race)
    assert raced.blocks == full.blocks and raced.accuracy == full.accuracy


def test_the_best_goes_on_and_others_by_holm_against_it():
    generator = np.random.default_rng(0)
    values = pd.DataFrame(generator.normal([0.7, 0.65, 0.4, 0.69], 0.05, size=(6, 4)), columns=[3, 1, 0, 2])
    best = values.mean().idxmax()
    others = [column for column in values if column != best]
    p = holm([corrected_p((values[best] - values[column]).to_numpy(), 0.25) for column in others])
    assert stats.friedmanchisquare(*values.to_numpy().T).pvalue < 0.05
    left = not_behind(values, 0.05, 0.25)
    assert left == [column for column in values if column == best or p[others.index(column)] > 0.05]
    assert best in left and 0 not in left


def test_where_friedman_sees_no_difference_nothing_is_given_up():
    values = pd.DataFrame({0: [0.9, 0.1, 0.5], 1: [0.1, 0.5, 0.9], 2: [0.4, 0.8, 0.2]})
    assert not_behind(values, 0.05) == [0, 1, 2]
    assert not_behind(pd.DataFrame({0: [0.5] * 5, 1: [0.5] * 5, 2: [0.5] * 5}), 0.05) == [0, 1, 2]
    assert not_behind(pd.DataFrame({7: [0.1, 0.2]}), 0.05) == [7]
    assert not_behind(pd.DataFrame({0: [0.1, 0.2, 0.3], 1: [0.5, 0.62, 0.7]}), 0.05) == [1], "two need no Friedman"


@pytest.mark.parametrize("count, told", [(2, 0.11), (9, 0.13)])
def test_equal_candidates_are_given_up_as_often_as_the_docstring_says(count, told):
    """Of 5 folds whose errors are correlated by their overlap; the common part is nobody's merit."""
    generator, runs = np.random.default_rng(1), 300
    common, luck = (
        generator.normal(size=(runs, 1, count)) * 0.2**0.5,
        generator.normal(size=(runs, 5, count)) * 0.8**0.5,
    )
    wrong = sum(len(not_behind(pd.DataFrame(values), 0.05, 0.25)) < count for values in common + luck)
    assert stats.binomtest(wrong, runs, told).pvalue > 0.01


def test_seeds_of_a_fold_are_no_further_evidence():
    """One fold is easy for b2, in every seed alike; the other folds say that it is as good as b1."""

    class OneFold(Field):
        def candidate_scores(self, candidates, folds=None, seeds=None, epochs=None):
            rows = super().candidate_scores(candidates, folds, seeds, epochs)
            lucky = (rows["blocks"] == ("b2",)) & (rows["fold"] == 0)
            return rows.assign(accuracy=rows["accuracy"] + 0.2 * lucky)

    field = OneFold(lambda blocks, recipe: 0.5, n_blocks=2, folds=2, seeds=tuple(range(8)), noise=0.001)
    rows = Race(short=None, first=16).scores(field, SINGLES[:2])
    assert set(rows["dropped"]) == {0}


def test_one_fold_and_seed_allow_no_test():
    rows = Race(most=3).scores(Field(CLEAR, folds=1), SINGLES)
    assert rows.loc[rows["dropped"] == 0, "blocks"].nunique() == 3
    assert greedy_subtuning(Field(CLEAR, folds=1), 0.1, race=Race()).blocks == ("b2",)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_schedule_that_can_be_no_shorter_is_left_out(epochs):
    rows = Race(short=0.9, most=None).scores(Field(CLEAR, epochs=epochs), SINGLES)
    assert set(rows["epochs"]) == {epochs} and stages_of(rows)["b2",] == 0
    rows = Halving(2, ((0.9, 1), (1, 1))).scores(Field(CLEAR, epochs=epochs), SINGLES)
    assert set(rows["epochs"]) == {epochs} and len(rows) == 4 * 5


def test_a_study_is_raced_and_records_what_it_trains():
    def study():
        recipes = [Recipe(epochs=3, lr=lr, batch_size=8) for lr in (1e-3, 1e-2)]
        return Study(tiny_chain(), tiny_task(), recipes, folds=2, device="cpu", progress=False)

    full = greedy_subtuning(study(), -math.inf, 2)
    for race in (Halving(2, ((0.3, 1), (1, 1))), Race(short=0.3, most=2)):
        own = study()
        result = greedy_subtuning(own, -math.inf, 2, race=race)
        assert len(own.records.table()) == result.cost.trainings
        assert 0 < result.cost.flops < full.cost.flops and len(result.blocks) == 2
        row = own.scores([result.blocks])["accuracy"]
        whole = result.trace[result.trace["dropped"] == 0]
        assert result.n == 2 and result.accuracy <= row.mean() + 1e-12
        assert (whole["n"] == 2).all() and set(result.trace["round"]) == {0, 1, 2}


def test_the_agreement_table_compares_with_the_full_search():
    fields = {f"noise {noise}": {"quality": CLEAR, "noise": noise} for noise in (0.0, 0.2)}
    full, cheap = (
        {label: greedy_subtuning(Field(**field), -math.inf, 2, race=race) for label, field in fields.items()}
        for race in (None, Halving(4, ((0.1, 1), (1, 1))))
    )
    table = agreement_table(full, halving=cheap)
    assert table["search"].tolist() == ["full"] * 2 + ["halving"] * 2 and table["label"].tolist() == [*fields] * 2
    assert table["same"].tolist()[:3] == [True] * 3 and (table["difference"].tolist()[:3] == np.zeros(3)).all()
    last, whole = cheap["noise 0.2"], full["noise 0.2"]
    row = table.iloc[-1]
    assert row["difference"] == pytest.approx(last.accuracy - whole.accuracy) and row["blocks"] == last.blocks
    ahead = fold_difference(*(one.scores[one.scores["blocks"] == one.blocks] for one in (last, whole)))
    assert row["error"] == pytest.approx(ahead.error) and row["within"] == (ahead.mean >= -ahead.error)
    assert row["saved"] == pytest.approx((1 + 4 + 3) * 50 / (50 + 7 * 5 + 2 * 50))
    assert row["flops"] == 100 * row["trainings"] and row["saved_flops"] == pytest.approx((1 + 4 + 3) / (1 + 7 + 2))
    with pytest.raises(ValueError, match="halving has results of"):
        agreement_table(full, halving={"noise 0.0": last})


@pytest.mark.parametrize("ladder", [((0.5, 1),), ((1, 1, 1), (1, 1))])
def test_a_ladder_that_leads_to_no_full_training_is_refused(ladder):
    with pytest.raises(ValueError, match=r"the last of them \(1, 1\)"):
        Halving(ladder=ladder)


@pytest.mark.parametrize("race", [Race(), Race(short=None), Halving()])
def test_scores_that_are_no_accuracies_are_told(race):
    study = Field(lambda blocks, recipe: math.nan if blocks == ("b2",) else 0.5)
    with pytest.raises(ValueError, match=r"accuracy of \('b2',\) in fold 0, seed 0 is nan"):
        greedy_subtuning(study, race=race)


def test_a_training_that_diverged_is_behind():
    values = pd.DataFrame({0: [-0.5, -0.4, -0.6], 1: [-0.4, -math.inf, -0.3], 2: [math.nan] * 3})
    assert not_behind(values, 0.05) == [0] and not_behind(values[[1, 2]], 0.05) == [1, 2]


def test_windows_and_exhaustive_searches_race_too():
    def quality(blocks, recipe):
        return 0.9 if blocks == ("b2", "b3") else 0.3 + 0.02 * len(blocks)

    for search, count in ((lambda *given: best_window(*given, race=Race()), 10), (every_pair, 11)):
        field = Field(quality)
        found = search(field)
        assert found.blocks == ("b2", "b3") and found.accuracy > 0.85 and found.n == 5
        assert len(found.table) == count and (found.table["dropped"] > 0).sum() >= count - 2
        short = [key for key in field.trained if key[3] < field.epochs]
        assert len(short) == 5 * count and len(field.trained) - len(short) <= 2 * 5


def every_pair(field):
    return exhaustive_search(field, 2, race=Race())
