"""Stability of profiles: rank correlations by hand, and halves that do not share their luck."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from subtuning_lab import Recipe, Study, finetuning_profile, profile_agreement, profile_stability
from tests.helpers import tiny_chain, tiny_task

NAMES = tuple("abcdefghi")
QUICK = {"resamples": 200}


class Known(Study):
    """A study whose scores are a table: true accuracy of a setting, luck of a fold, and noise of its own."""

    block_names, n_folds, epochs, seeds = NAMES, 4, 8, (0,)
    backbone = SimpleNamespace(name="known")
    recipes = (SimpleNamespace(lr=1e-3),)

    def __init__(self, truth, luck=0.0, noise=0.0, setting=(8, 1e-3)):
        self.truth, self.luck, self.noise, self.setting = truth, luck, noise, setting

    def variant(self, epochs, lr):
        return Known(self.truth, self.luck, self.noise, (epochs, lr))

    def scores(self, subsets):
        accuracy = np.array(self.truth[self.setting])[:, None] + np.zeros((1, 4))
        accuracy += self.luck * np.random.default_rng(7).normal(size=accuracy.shape)  # the same for every setting
        own = np.random.default_rng([self.setting[0], round(1e6 * self.setting[1])])
        accuracy += self.noise * own.normal(size=accuracy.shape)
        places = [NAMES.index(name) for (name,) in subsets]
        rows = [(blocks, k, 0, accuracy[i, k]) for blocks, i in zip(subsets, places, strict=True) for k in range(4)]
        return pd.DataFrame(rows, columns=["blocks", "fold", "seed", "accuracy"])


def rising(scale=0.02):
    return [0.5 + scale * i for i in range(9)]


def test_correlations_are_scipys():
    """Spearman and Kendall of the means over all folds; the reference has the longest trainings' best block."""
    truth = {(2, 1e-3): rising(), (2, 1e-2): rising(), (8, 1e-3): rising(0.03), (8, 1e-2): rising()}
    study = Known(truth, noise=0.05)
    table = profile_stability(study, [2, 8], [1e-3, 1e-2], **QUICK)
    means = {
        setting: study.variant(*setting).scores([(name,) for name in NAMES]).groupby("blocks")["accuracy"].mean()
        for setting in truth
    }
    best = max([(8, 1e-3), (8, 1e-2)], key=lambda setting: means[setting].max())
    assert (table.loc[0, "epochs"], table.loc[0, "lr"]) == best and table["reference"].tolist() == [True] + 3 * [False]
    for row in table.itertuples():
        own = means[row.epochs, row.lr]
        assert row.spearman == pytest.approx(stats.spearmanr(own, means[best]).statistic)
        assert row.kendall == pytest.approx(stats.kendalltau(own, means[best]).statistic)
        assert row.best == own.idxmax()[0] and row.accuracy == pytest.approx(own.max())
        assert row.low <= row.spearman <= row.high and row.n == 9 and row.scores == 4


def test_halves_are_every_way_to_halve_the_folds():
    truth = {(2, 1e-3): rising(), (8, 1e-3): rising()}
    study = Known(truth, noise=0.1)
    row = profile_stability(study, [2, 8], **QUICK).set_index("epochs").loc[2]
    blocks = [(name,) for name in NAMES]
    own, other = (study.variant(n, 1e-3).scores(blocks)["accuracy"].to_numpy().reshape(9, 4) for n in (2, 8))
    found = []
    for left in ([0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]):
        right = [k for k in range(4) if k not in left]
        found.append(stats.spearmanr(own[:, left].mean(1), other[:, right].mean(1)).statistic)
    assert row["halves"] == pytest.approx(np.mean(found)) and row["halves_low"] <= row["halves"] <= row["halves_high"]


def test_shared_luck_looks_like_agreement_on_the_same_folds_only():
    """No block is better than another: what two settings have in common is their validation images."""
    level = [0.5] * 9
    table = profile_stability(Known({(2, 1e-3): level, (8, 1e-3): level}, luck=0.1, noise=0.01), [2, 8], **QUICK)
    other = table.set_index("epochs").loc[2]
    assert other["spearman"] > 0.9 and other["halves"] < 0.5 and table.loc[0, "halves"] < 0.5


def test_a_true_order_shows_in_the_halves_and_another_one_does_not():
    truth = {(2, 1e-3): rising()[::-1], (4, 1e-3): rising(), (8, 1e-3): rising()}
    table = profile_stability(Known(truth, luck=0.005, noise=0.005), [2, 4, 8], **QUICK).set_index("epochs")
    assert table.loc[8, "halves"] > 0.9 and table.loc[4, "halves"] > 0.9 and table.loc[2, "halves"] < -0.9


def test_equal_blocks_have_no_ranking():
    row = profile_stability(Known({(8, 1e-3): [0.5] * 9}), **QUICK).iloc[0]
    assert row[["spearman", "low", "halves", "halves_high"]].isna().all()


def test_a_study_is_asked_for_each_setting():
    study = Study(tiny_chain(), tiny_task(), Recipe(epochs=2, batch_size=8), folds=2, seeds=(0, 1), progress=False)
    table = profile_stability(study, [1, 2], [1e-3, 1e-1], **QUICK)
    assert len(table) == 4 and table["scores"].eq(4).all() and table["n"].eq(3).all()
    for row in table.itertuples():
        own = finetuning_profile(study.variant(epochs=row.epochs, lr=row.lr)).table
        assert row.accuracy == pytest.approx(own[own["kind"] == "blocks"]["accuracy"].max())


def test_profiles_agree_by_their_ranks():
    studies = [
        Study(tiny_chain(seed=i), tiny_task(48), Recipe(epochs=2, lr=1e-1), folds=2, progress=False) for i in (0, 1)
    ]
    one, two = map(finetuning_profile, studies)
    row = profile_agreement({"one": one, "two": two}).iloc[0]
    ranks = [own.table[own.table["kind"] == "blocks"]["accuracy"] for own in (one, two)]
    assert row["spearman"] == pytest.approx(stats.spearmanr(*ranks).statistic, nan_ok=True)
    assert (row["first"], row["second"], row["n"]) == ("one", "two", 3)
    with pytest.raises(ValueError, match="at least 2"):
        profile_agreement({"one": one})
    longer = Study(tiny_chain(4), tiny_task(), Recipe(epochs=1), folds=2, progress=False)
    with pytest.raises(ValueError, match="different subsets"):
        profile_agreement({"one": one, "longer": finetuning_profile(longer)})


def test_bad_calls_are_named():
    single = Study(tiny_chain(), tiny_task(), Recipe(epochs=1), folds=1, progress=False)
    with pytest.raises(ValueError, match="folds is 1"):
        profile_stability(single)
    short = Study(tiny_chain(2), tiny_task(), Recipe(epochs=1), folds=2, progress=False)
    with pytest.raises(ValueError, match="tiny has 2 blocks"):
        profile_stability(short)
