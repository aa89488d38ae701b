"""Small studies and tables for the tests of panels."""

import numpy as np
import pandas as pd

import subtuning_lab as lab
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from tests.helpers import tiny_chain, tiny_task

CURVES = {"linear probing": (0.5, 0.6, 0.7), "full finetuning": (0.4, 0.65, 0.9), "greedy": (0.55, 0.7, 0.8)}
SIZES = (20, 50, 100)
ALPHAS = {"target": {0.0: 0.5, 0.5: 0.9, 1.0: 0.8}, "clean": {0.0: 1.0, 0.5: 0.95, 1.0: 0.7}}
RATES = {"n": 1000, "tuned_params": 20_000, "params": 278_000, "delta": 2.5, "n_blocks": 9, "max_blocks": 3}
MERGED = {"a": ["block2"], "b": ["block1", "block3"]}
ACCURACY = {"": 0.5, "a": 0.6, "b": 0.7, "c": 0.62, "ab": 0.74, "ac": 0.8, "bc": 0.71, "abc": 0.75}


def tiny_study(records=None) -> lab.Study:
    recipe = lab.Recipe(epochs=1, batch_size=8)
    return lab.Study(tiny_chain(), tiny_task(), recipe, folds=3, records=records, device="cpu", progress=False)


def size_table() -> pd.DataFrame:
    rows = [(size, name, curve[i], 0.02, 3) for name, curve in CURVES.items() for i, size in enumerate(SIZES)]
    return pd.DataFrame(rows, columns=["train_size", "method", "accuracy", "std", "n"])


def alpha_table() -> pd.DataFrame:
    rows = [(alpha, images, mean, 0.02, 3) for images, values in ALPHAS.items() for alpha, mean in values.items()]
    return pd.DataFrame(rows, columns=["alpha", "images", "accuracy", "std", "n"])


def made_profile(accuracies) -> Profile:
    """Of two blocks, linear probing and full finetuning."""
    labels = ["b1", "b2", LINEAR_PROBING, FULL_FINETUNING]
    table = pd.DataFrame({"label": labels, "kind": ["blocks", "blocks", *labels[2:]], "position": [1, 2, None, None]})
    blocks = [("b1",), ("b2",), (), ("stem", "b1", "b2", "tail")]
    return Profile(table.assign(blocks=blocks, params=10, accuracy=accuracies, std=0.02, n=4), table[:0], 1, "tiny")


def shift_profiles() -> dict[str, Profile]:
    return {
        "contrast@5": made_profile([0.9, 0.5, 0.3, 0.8]),
        "gaussian_noise@2": made_profile([0.4, 0.6, 0.2, 0.7]),
        "digits": made_profile([0.1, 0.2, 0.3, 0.4]),
    }


class Lookup:
    """Scores subsets of three blocks by a table, on two folds."""

    title = "a table"
    block_names = part_names = ("a", "b", "c")

    def scores(self, subsets):
        rows = [
            (tuple(blocks), fold, 0, ACCURACY["".join(blocks)] + sign * 0.02, len(blocks))
            for blocks in subsets
            for fold, sign in enumerate((-1, 1))
        ]
        return pd.DataFrame(rows, columns=["blocks", "fold", "seed", "accuracy", "params"])

    all_scores = scores  # there is one recipe

    def count_parameters(self, blocks):
        return len(blocks)


def search(epsilon=-np.inf, direction="forward") -> lab.GreedyResult:
    return lab.greedy_subtuning(Lookup(), epsilon=epsilon, direction=direction)
