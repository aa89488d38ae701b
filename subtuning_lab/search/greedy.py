"""Greedy SubTuning: the subset to tune, found block by block. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import pandas as pd

from subtuning_lab.search.candidates import SCORER, Chosen, Scorer, best_of, candidate_table, row_of
from subtuning_lab.search.exhaustive import RACE
from subtuning_lab.search.replay import Rounds, remembered_rounds
from subtuning_lab.search.significance import SignificantGain
from subtuning_lab.search.statistics import DIGITS
from subtuning_lab.utils.containers import Either
from subtuning_lab.utils.validation import OneOf, Real, Whole, checked

if TYPE_CHECKING:
    from subtuning_lab.search.racing import Halving, Race

DIRECTIONS: tuple[str, ...] = ("forward", "backward", "both")
COLUMNS = (
    *("direction", "round", "candidate", "blocks", "params", "accuracy", "std", "n", "error", "score", "gain", "p"),
    *("kept", "forced", "dropped", "trainings", "seconds", "flops"),
)
_EPSILON = Either(Real(0, 1), OneOf((math.inf, -math.inf)))


@dataclass(frozen=True)
class GreedyResult(Chosen):
    """What a greedy search chose, and all that it saw.

    Args:
        blocks: the chosen subset, in the network's order.
        trace: one row per scored subset: `direction`; `round` (0 for the start); `candidate` (the block added, or
            removed; empty for the start); `blocks`; `params`; `accuracy`, `std`, `n`, `error` and `score` as of
            `summarize`; `gain` in score over the last subset that paid; `p` (by the significance rule, if one was
            given); `kept`; `forced` (a removal made for `max_blocks` only); `dropped` (the stage of a race after which
            the candidate was given up: its scores are partial, its gain is missing; else 0); `trainings`, `seconds`
            and `flops` of that candidate, as if nothing had been recorded before.
        epsilon, direction, max_blocks, keep: as given.
        block_names: of the backbone, from input to output.
        title: backbone, task, number of training images.
        complete: False where `replay` ran out of rounds; `blocks` are then those of the last known one.
        scores: the rows that the trace sums up, one per subset, seed and fold.
    """

    blocks: tuple[str, ...]
    trace: pd.DataFrame
    epsilon: float
    direction: str
    max_blocks: int | None
    keep: SignificantGain | None
    block_names: tuple[str, ...]
    title: str
    complete: bool = True
    scores: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    @property
    def tried(self) -> pd.DataFrame:
        """The trace."""
        return self.trace

    @property
    def most(self) -> int:
        """Most blocks that may be chosen."""
        return self.max_blocks or len(self.block_names)

    @checked(epsilon=_EPSILON)
    def replay(self, epsilon: float) -> GreedyResult:
        """What the search gives with another epsilon, from the trace alone.

        One search with epsilon=-inf (forward) or inf (backward) goes through all rounds: it replays every epsilon.
        Rounds that the trace does not have leave `complete` False.
        """
        plan, traces = replace(self, epsilon=float(epsilon)), self.trace.groupby("direction", sort=False)
        return _better([_algorithm_1(replace(plan, direction=way), remembered_rounds(rows)) for way, rows in traces])


@checked
def greedy_subtuning(
    study: Annotated[Scorer, SCORER],
    epsilon: Annotated[float, _EPSILON] = 0.0,
    max_blocks: Annotated[int | None, Whole(1, none=True)] = None,
    direction: Annotated[str, OneOf(DIRECTIONS)] = "forward",
    *,
    keep: SignificantGain | None = None,
    race: Annotated[Race | Halving | None, RACE] = None,
) -> GreedyResult:
    """Adds blocks one by one, or removes them, as long as that pays.

    A block is in the subset only if it earns its place: with it the score must be higher by more than epsilon.
    "forward" starts from linear probing and adds the block that scores best, if it does. "backward" starts from all
    blocks and removes the one without which the rest scores best, if it does not: a removal that costs nothing is
    made. "both" does both and gives the better. Ties between candidates go to fewer parameters, then to the earlier
    block. A candidate of which a training diverged is shown, and never kept.

    Args:
        study: asked for all candidates of a round in one call.
        epsilon: accuracy in [0, 1]; each step is compared with the subset so far. -inf adds blocks up to `max_blocks`
            whatever they bring, inf removes all.
        max_blocks: most blocks that may be chosen; by default all of them. "backward" removes blocks until so few
            are left, whatever that costs.
        direction: "forward", "backward" or "both".
        keep: asks besides that a block makes it significantly better.
        race: drops hopeless candidates early; these are never kept. See `Race` and `Halving`. That none of the others
            pays does not say that no block does: the search then goes on with the best of them for one more round, and
            two blocks that bring more than 2 epsilon together stay both. With `keep` it ends there.
    Source: PAPER "Greedy SubTuning (Algorithm 1)"; elimination as in the official code, with our own rule. Ours:
        the round more of a race.
    """
    names = tuple(study.block_names)
    Whole(1, len(names), none=True).check("max_blocks", max_blocks)
    results = []
    for way in DIRECTIONS[:2] if direction == "both" else (direction,):
        plan = GreedyResult((), pd.DataFrame(), float(epsilon), way, max_blocks, keep, names, study.title)
        rounds = _ScoredRounds(study, plan, race)
        results.append(replace(_algorithm_1(plan, rounds), scores=pd.concat(rounds.rows.values(), ignore_index=True)))
    return _better(results)


def _algorithm_1(plan: GreedyResult, rounds: Rounds) -> GreedyResult:
    """Algorithm 1 in one direction, over rounds that are scored or remembered."""
    names = plan.block_names
    chosen = path = () if plan.direction == "forward" else names  # the path runs a round ahead after a failed race
    start = rounds(0, None, {"": chosen}).assign(direction=plan.direction, round=0, candidate="", gain=math.nan)
    best_score, paid = start["score"].fillna(-math.inf).iloc[0], 0  # of the last round that paid; one diverged is below
    trace, complete = [start.assign(kept=True, forced=False)], True
    for number in range(1, (plan.most if plan.direction == "forward" else len(names)) + 1):
        candidates = _neighbours(plan, path)
        table = rounds(number, chosen, candidates)
        if table is None:
            complete = False
            break
        table = table.assign(direction=plan.direction, round=number, candidate=list(candidates), kept=False)
        scored = table["dropped"] == 0
        table["gain"] = (table["score"] - best_score).round(DIGITS).where(scored)
        if table["gain"].isna().all():  # every training diverged
            trace.append(table.assign(forced=False))
            break
        best = best_of(table, names)
        path = table.at[best, "blocks"]
        pays = _pays(plan, table.loc[best], steps=number - paid)
        forced = plan.direction == "backward" and not pays and len(chosen) > plan.most
        table.loc[best, "kept"] = True
        trace.append(table.assign(forced=table["kept"] & forced))
        if pays or forced:
            chosen, best_score, paid = path, table.at[best, "score"], number
        elif not _looks_ahead(plan, table, failures=number - paid):
            break
    trace = pd.concat(trace, ignore_index=True)[list(COLUMNS)]
    trace["kept"] &= trace["round"] <= paid
    return replace(plan, blocks=chosen, trace=trace, complete=complete)


def _neighbours(plan: GreedyResult, subset: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Each block that can be added or removed, and the subset that this gives, in the network's order."""
    adds = plan.direction == "forward"
    changed = [name for name in plan.block_names if (name in subset) != adds]
    return {block: tuple(n for n in plan.block_names if (n in subset) != (n == block)) for block in changed}


def _pays(plan: GreedyResult, row: pd.Series, steps: int) -> bool:
    """Whether to go to a candidate: the larger of it and the chosen subset must be so much better that `steps` blocks
    earn their place, and forward goes to the larger, backward away from it where it doesn't."""
    forward = plan.direction == "forward"
    gain = row["gain"] if forward else -row["gain"]
    earned = bool(gain > steps * plan.epsilon and (plan.keep is None or row["p"] <= plan.keep.alpha))
    return earned if forward else not earned


def _looks_ahead(plan: GreedyResult, table: pd.DataFrame, failures: int) -> bool:
    """Whether a round that didn't pay is followed by one more: a race may have dropped the block that would have."""
    return failures == 1 and plan.keep is None and bool(table["dropped"].any())


class _ScoredRounds:
    """Rounds scored by a study: the start together with the first round, since sharing a pass is cheaper."""

    def __init__(self, study: Scorer, plan: GreedyResult, race: Race | Halving | None):
        self.study, self.plan, self.race = study, plan, race
        self.rows: dict[tuple[str, ...], pd.DataFrame] = {}  # of each subset
        self.first = pd.DataFrame()

    def __call__(
        self, number: int, chosen: tuple[str, ...] | None, candidates: Mapping[str, tuple[str, ...]]
    ) -> pd.DataFrame:
        subsets = list(candidates.values())
        if number == 0:
            both = self._scored(list(_neighbours(self.plan, subsets[0]).values()), certain=subsets)
            self.first = both[1:]
            return both[:1].assign(p=math.nan)
        table = self.first if number == 1 else self._scored(subsets)
        return table.assign(p=self._p_values(chosen, table))

    def _scored(self, subsets: Sequence[tuple[str, ...]], certain: Sequence[tuple[str, ...]] = ()) -> pd.DataFrame:
        table, scores = candidate_table(self.study, subsets, self.race, certain)
        self.rows |= dict(iter(scores.groupby("blocks", sort=False)))
        return table

    def _p_values(self, chosen: tuple[str, ...], table: pd.DataFrame) -> list[float]:
        """By the significance rule, if there is one; what was dropped or diverged counts as not better."""
        if self.plan.keep is None:
            return [math.nan] * len(table)
        forward, current = self.plan.direction == "forward", self.rows[chosen]
        if current["accuracy"].isna().any():
            return [0.0 if forward else 1.0] * len(table)  # anything is better
        sound = [not row.dropped and not math.isnan(row.score) for row in table.itertuples()]
        rows = [self.rows[blocks] if known else None for blocks, known in zip(table["blocks"], sound, strict=True)]
        return self.plan.keep.p_values(current, rows, larger=forward)


def _better(results: Sequence[GreedyResult]) -> GreedyResult:
    """The better of the directions, with the traces of all."""
    trace = pd.concat([one.trace for one in results], ignore_index=True)
    ends = pd.concat([row_of(one.trace, one.blocks).to_frame().T for one in results], ignore_index=True)
    broken = ends["score"].isna().all()
    best = results[0 if broken else best_of(ends.drop(columns="candidate"), results[0].block_names)]
    direction = "both" if len(results) > 1 else best.direction
    complete = all(one.complete for one in results)
    scores = pd.concat([one.scores for one in sorted(results, key=lambda one: one is not best)], ignore_index=True)
    if len(results) > 1:  # a subset that both have scored
        scores = scores.drop_duplicates(["blocks", "fold", "seed"], ignore_index=True)
    return replace(best, trace=trace, scores=scores, direction=direction, complete=complete)
