"""The methods that SubTuning is compared with: each a subset and a changed recipe, on one study's folds and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any

import numpy as np
import pandas as pd

from subtuning_lab.baselines.head2toe import Head2Toe
from subtuning_lab.data.task import Split
from subtuning_lab.nets.chain import in_order
from subtuning_lab.search.candidates import best_of, candidate_table, chosen_rows
from subtuning_lab.search.exhaustive import SearchResult
from subtuning_lab.search.greedy import GreedyResult
from subtuning_lab.study.keys import Method
from subtuning_lab.study.study import Study
from subtuning_lab.utils.containers import Blocks as BlocksRule
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Has, Is, OneOf, Several, Text, Whole, checked

Search = GreedyResult | SearchResult  # a finished one

_CHOSEN = "chosen"
_SEARCHES = Mapped(Is((GreedyResult, SearchResult)), least=0, none=True)
_OTHERS = Mapped(Several(Has(("name", "settings", "fit"), "a method")), least=0, none=True)


@dataclass(frozen=True)
class Baseline:
    """One method to compare with.

    Args:
        blocks: what it tunes: "all" (stem and tail included), part names, or "chosen", the subset of a search.
        choices: fields of the recipe that it changes; a list is tried on the folds.
        source: where it comes from.
    """

    blocks: str | tuple[str, ...]
    choices: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


#: every method by name; `compare_methods` adds those whose subsets are searched for
BASELINES: dict[str, Baseline] = {
    "linear probing": Baseline(()),
    "full finetuning": Baseline("all"),
    "LP-FT": Baseline("all", {"head_start": "probe"}, "Kumar et al. 2022"),
    "layer-wise decay": Baseline("all", {"lr_decay": [0.6, 0.8]}, "Howard and Ruder 2018; Clark et al. 2020"),
    "BitFit": Baseline("all", {"params": "bias"}, "Ben Zaken et al. 2022"),
    "norm tuning": Baseline("all", {"params": "norm"}, "Frankle et al. 2021"),
    "Auto-RGN": Baseline("all", {"lr_scaling": "rgn"}, "Lee et al. 2023, surgical finetuning"),
    "LoRA": Baseline("all", {"adapter": "lora"}, "Hu et al. 2022"),
    "IA3": Baseline("all", {"adapter": "ia3"}, "Liu et al. 2022"),
    "LayerNorm tuning": Baseline("all", {"adapter": "ln_tuning"}, "Zhao et al. 2024"),
    "LoRA in the chosen blocks": Baseline(_CHOSEN, {"adapter": "lora"}, "PAPER, ablations"),
    "Siamese readout": Baseline(_CHOSEN, {"siamese": True}, "PAPER, ablations"),
}
HEAD2TOE, BEST_STAGE = "Head2Toe", "best stage"
RANDOM_SIZE, RANDOM_PARAMETERS = "random subset of the same size", "random subset of as many parameters"
_TOLERANCE = 0.25  # how far a random subset's parameter count may be from the chosen one's
_PATTERNS = 20_000  # subsets looked at for one of a given parameter count


@dataclass(frozen=True)
class _Door:
    """What is scored when all choices are made: the test split if `test`, and further images if there are any."""

    test: bool
    also_on: Split | None = None

    def scores(self, study: Study, what: Any) -> dict[str, Any]:
        """Columns of a method's row."""
        if not self.test:
            return {}
        result = study.test(what, self.also_on)
        row = {"test_accuracy": result.mean, "test_std": result.std, "test_n": len(result.accuracies)}
        return row if self.also_on is None else row | {"also_accuracy": study.accuracy_on(what, self.also_on).mean}


@checked
def compare_methods(
    study: Study,
    methods: Annotated[Sequence[str] | None, Several(Text(), least=0, none=True)] = None,
    searches: Annotated[Mapping[str, Search] | None, _SEARCHES] = None,
    *,
    chosen: Annotated[Iterable[str] | None, BlocksRule(none=True)] = None,
    draws: Annotated[int, Whole(1)] = 10,
    head2toe: Annotated[Sequence[Head2Toe] | None, Several(Is(Head2Toe), none=True)] = None,
    subsets: Annotated[Mapping[str, Iterable[str]] | None, Mapped(BlocksRule(), least=0, none=True)] = None,
    others: Annotated[Mapping[str, Sequence[Method]] | None, _OTHERS] = None,
    test: bool = False,
    also_on: Split | None = None,
    seed: Annotated[int, Whole()] = 0,
) -> pd.DataFrame:
    """Scores methods on the folds of one study, and on its test split if asked.

    Every method is trained with every recipe of the study. A fold's score is that of the recipe, or setting, which is
    best on the other folds, so that many recipes are no advantage over few; the test split is asked about the one that
    is best on all folds. (The best of several subsets, as of stages or a search, is chosen on the folds that it is
    reported on: its accuracy there is optimistic, and only the test split tells it apart.)

    Args:
        study: its recipes are the grid that all methods choose from.
        methods: names out of `BASELINES`, "best stage" (surgical finetuning), "Head2Toe", and the two kinds of random
            subset; by default linear probing and full finetuning.
        searches: finished searches on this study by name, to stand beside the methods.
        chosen: the subset that methods "in the chosen blocks" and random subsets go by; by default the first search's.
        draws: random subsets of each kind.
        head2toe: settings to try; by default `Head2Toe.grid()`.
        subsets: further subsets by name.
        others: further methods that are no subsets by name, each with the settings to try.
        test: whether to train each on all training images and score it on the test split, once per seed.
        also_on: images that the tested trainings are scored on as well; see `Study.accuracy_on`.
        seed: of the random subsets.
    Returns:
        One row per method: `method`; `blocks`; `params` without readout; `accuracy`, `std` and `n` over folds and
        seeds; `subsets` scored to choose; `trainings`, `seconds` and `flops` spent on the folds; `settings`, those
        chosen; and with `test`, `test_accuracy` and `test_std` over `test_n` seeds, with `also_on` also
        `also_accuracy`. For random subsets all means and standard deviations are over the draws, of each draw's mean.
    Raises:
        ValueError: an unknown method, or one that needs `chosen` where there is none.
    """
    methods = ["linear probing", "full finetuning"] if methods is None else list(methods)
    searches = dict(searches or {})
    unknown = [name for name in methods if name not in method_names()]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; there are {', '.join(method_names())}")
    if chosen is None:
        chosen = next((search.blocks for search in searches.values()), None)
    go_by_chosen = [RANDOM_SIZE, RANDOM_PARAMETERS, *(name for name, b in BASELINES.items() if b.blocks == _CHOSEN)]
    needy = [name for name in methods if name in go_by_chosen]
    if needy and not chosen:
        raise ValueError(f"{needy[0]} goes by a chosen subset of at least one block: give `chosen`, or a search")
    like = None if chosen is None else tuple(chosen)
    others = {HEAD2TOE: list(head2toe or Head2Toe.grid())} | dict(others or {})
    door, rows = _Door(test, also_on), []
    named = {name: in_order(study.backbone, blocks) for name, blocks in (subsets or {}).items()}
    plain = [name for name in methods if name in BASELINES and not BASELINES[name].choices]
    if together := dict.fromkeys([*(_tuned_by(study, name, like) for name in plain), *named.values()]):
        study.all_scores(list(together))  # in one pass a fold; the rows below read what it noted
    for name in [*methods, *(name for name in others if name != HEAD2TOE)]:
        if name in others:
            rows.append(_method_row(study, name, others[name], door))
        elif name in (RANDOM_SIZE, RANDOM_PARAMETERS):
            rows.append(_random_row(study, name, like, draws, seed, door))
        elif name == BEST_STAGE:
            rows.append(_subset_row(study, name, stages(study.block_names), door))
        else:
            variant = study.variant(**BASELINES[name].choices)
            rows.append(_subset_row(variant, name, [_tuned_by(study, name, like)], door))
    rows += [_subset_row(study, name, [blocks], door) for name, blocks in named.items()]
    rows += [_search_row(study, name, search, door) for name, search in searches.items()]
    return pd.DataFrame(rows)


def method_names() -> tuple[str, ...]:
    """Names that `compare_methods` knows."""
    return (*BASELINES, BEST_STAGE, HEAD2TOE, RANDOM_SIZE, RANDOM_PARAMETERS)


@checked(block_names=Several(Text(), unique=True), count=Whole(1))
def stages(block_names: Sequence[str], count: int = 4) -> list[tuple[str, ...]]:
    """The network's stages: blocks whose names differ in the last part only; else `count` groups of like size.

    Source: surgical finetuning (Lee et al. 2023), which tunes one of them.
    """
    groups = [tuple(group) for _, group in groupby(block_names, lambda name: name.rpartition(".")[0])]
    if len(groups) > 1:
        return groups
    return [tuple(map(str, part)) for part in np.array_split(list(block_names), min(count, len(block_names)))]


@checked(like=BlocksRule(), draws=Whole(1), by=OneOf(("size", "parameters")), seed=Whole())
def random_subsets(study: Study, like: Sequence[str], draws: int, by: str, seed: int = 0) -> list[tuple[str, ...]]:
    """Different random subsets of blocks, as a control for a chosen one.

    Args:
        study: whose blocks they are of.
        like: the chosen subset; never among them.
        draws: how many; fewer where there are no more.
        by: "size" for as many blocks, "parameters" for a parameter count within 25 % of the chosen subset's.
        seed: of the draw.
    """
    names, generator = study.block_names, np.random.default_rng(seed)
    patterns = generator.random((_PATTERNS, len(names)))
    if by == "size":
        patterns = patterns.argsort(axis=1) < len(like)
    else:
        patterns = patterns < generator.random((_PATTERNS, 1))  # subsets of all sizes
        params, wanted = np.array([study.count_parameters([name]) for name in names]), study.count_parameters(like)
        patterns = patterns[abs(patterns @ params - wanted) <= _TOLERANCE * wanted]
    chosen = tuple(name in set(like) for name in names)
    different = [row for row in dict.fromkeys(map(tuple, patterns.tolist())) if row != chosen and any(row)]
    if not different:
        raise ValueError(f"no other subset has the {by} of {', '.join(like)}")
    return [tuple(name for name, tuned in zip(names, row, strict=True) if tuned) for row in different[:draws]]


@checked
def grid_caption(study: Study) -> str:
    """What every method chose from, in words for a table's caption."""
    tried = {
        name: sorted({getattr(recipe, name) for recipe in study.recipes}, key=str)
        for name in ("lr", "head_lr", "weight_decay", "bn")
    }
    words = "; ".join(
        f"{name} {', '.join('lr' if v is None else str(v) for v in values)}" for name, values in tried.items()
    )
    places = "one holdout" if study.n_folds == 1 else f"the other ones of {study.n_folds} folds"
    return (
        f"every method is trained with each of {words}, and counts with its best on {places} x "
        f"{len(study.seeds)} seeds"
    )


def _tuned_by(study: Study, name: str, like: tuple[str, ...] | None) -> tuple[str, ...]:
    """What a method of `BASELINES` tunes."""
    wanted = BASELINES[name].blocks
    return study.part_names if wanted == "all" else like if wanted == _CHOSEN else tuple(wanted)


def _subset_row(study: Study, name: str, subsets: Sequence[tuple[str, ...]], door: _Door) -> dict[str, Any]:
    """A method that is one subset, or the best of several."""
    table, _ = candidate_table(study, subsets)
    best = table.loc[best_of(table, study.part_names)]
    costs = table[["trainings", "seconds", "flops"]].sum()
    row = {"method": name, **best[["blocks", "params", "accuracy", "std", "n"]], "subsets": len(subsets), **costs}
    return row | {"settings": _settings(study, best["blocks"])} | door.scores(study, best["blocks"])


def _search_row(study: Study, name: str, search: Search, door: _Door) -> dict[str, Any]:
    blocks, subsets = search.blocks, search.tried["blocks"].nunique()
    row = {"method": name, "blocks": blocks, "params": study.count_parameters(blocks), "accuracy": search.accuracy}
    row |= {"std": search.std, "n": search.n, "subsets": subsets, **vars(search.cost)}
    return row | {"settings": _settings(study, blocks)} | door.scores(study, blocks)


def _random_row(study: Study, name: str, like: tuple[str, ...], draws: int, seed: int, door: _Door) -> dict[str, Any]:
    subsets = random_subsets(study, like, draws, "size" if name == RANDOM_SIZE else "parameters", seed)
    table, _ = candidate_table(study, subsets)
    row = {"method": name, "blocks": None, "params": int(table["params"].mean()), "accuracy": table["accuracy"].mean()}
    row |= {"std": table["accuracy"].std(ddof=1), "n": len(subsets), "subsets": len(subsets)}
    row |= dict(table[["trainings", "seconds", "flops"]].sum()) | {"settings": "each its own"}
    if not door.test:
        return row
    table = pd.DataFrame([door.scores(study, blocks) for blocks in subsets])
    means = table["test_accuracy"]
    row |= {"test_accuracy": means.mean(), "test_std": means.std(ddof=1), "test_n": len(means)}
    return row | {name: table[name].mean() for name in table if name.startswith("also")}


def _method_row(study: Study, name: str, grid: Sequence[Method], door: _Door) -> dict[str, Any]:
    """A method that is no subset, with the best of its settings."""
    scores = study.method_scores(grid)
    best = grid[chosen_rows(scores.assign(place=scores["method"]), "method", nested=False)["place"].iloc[0]]
    accuracy = chosen_rows(scores, "method")["accuracy"]  # each fold's settings chosen on the others, as for subsets
    row = {"method": name, "blocks": (), "params": 0, "accuracy": accuracy.mean(), "std": accuracy.std()}
    row |= {"n": len(accuracy), "subsets": len(grid), "trainings": len(scores), "seconds": scores["seconds"].sum()}
    settings = ", ".join(f"{k} {v:g}" if isinstance(v, float | int) else f"{k} {v}" for k, v in best.settings().items())
    return row | {"flops": scores["flops"].sum(), "settings": settings} | door.scores(study, best)


def _settings(study: Study, blocks: Sequence[str]) -> str:
    """What of the recipe was chosen on the folds, in words."""
    chosen, tried = study.recipe_of(blocks), [recipe.as_dict() for recipe in study.recipes]
    differing = [f"{k} {v}" for k, v in chosen.as_dict().items() if len({settings[k] for settings in tried}) > 1]
    return ", ".join(differing) or f"lr {chosen.lr:g}"
