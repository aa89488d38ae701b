"""Greedy SubTuning: the subset to tune, found block by block. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from subtuning_lab.search.exhaustive import (
    DIGITS,
    CheapScores,
    Cost,
    best_of,
    candidate_table,
    check_count,
    row_of,
    total_cost,
)
from subtuning_lab.search.profiles import Scorer
from subtuning_lab.search.significance import SignificantGain

DIRECTIONS: tuple[str, ...] = ("forward", "backward", "both")
COLUMNS = (
    *("direction", "round", "candidate", "blocks", "params", "accuracy", "std", "n", "gain", "p", "kept", "forced"),
    *("dropped", "trainings", "seconds", "flops"),
)

#: number of a round, subset so far (None: there is none), the round's candidates -> their table, or None: not known
_Rounds = Callable[[int, tuple[str, ...] | None, list[tuple[str, ...]]], pd.DataFrame | None]


@dataclass(frozen=True)
class GreedyResult:
    """What a greedy search chose, and all that it saw.

    Args:
        blocks: the chosen subset, in the network's order.
        trace: one row per scored subset: `direction`; `round` (0 for the start); `candidate` (the block added, or
            removed; empty for the start); `blocks`; `params`; `accuracy` and `std` (mean and standard deviation over
            seeds and folds), `n`; `gain` over the last subset that paid; `p` (by the significance rule, if one was
            given); `kept`; `forced` (a removal made for `max_blocks` only); `dropped` (the stage of a race after which
            the candidate was given up: its scores are partial, its gain is missing; else 0); `trainings`, `seconds`
            and `flops` of that candidate, as if nothing had been recorded before.
        epsilon, direction, max_blocks, keep: as given.
        block_names: of the backbone, from input to output.
        title: backbone, task, number of training images.
        complete: False where `replay` ran out of rounds; `blocks` are then those of the last known one.
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

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the chosen subset over seeds and folds, in [0, 1]."""
        return float(row_of(self.trace, self.blocks)["accuracy"])

    @property
    def std(self) -> float:
        """Its standard deviation over seeds and folds; missing for one score."""
        return float(row_of(self.trace, self.blocks)["std"])

    @property
    def n(self) -> int:
        """How many scores these are of."""
        return int(row_of(self.trace, self.blocks)["n"])

    @property
    def cost(self) -> Cost:
        """Of the whole search, every subset counted once."""
        return total_cost(self.trace)

    def replay(self, epsilon: float) -> GreedyResult:
        """What the search gives with another epsilon, from the trace alone.

        One search with epsilon=-inf (forward) or inf (backward) goes through all rounds: it replays every epsilon.
        Rounds that the trace does not have leave `complete` False.

        Raises:
            ValueError: an epsilon that `greedy_subtuning` does not take.
        """
        plan, found = replace(self, epsilon=_checked_epsilon(epsilon)), []
        for direction, trace in self.trace.groupby("direction", sort=False):
            found.append(_walk(replace(plan, direction=direction), _remembered_rounds(trace)))
        return _better(found)


def greedy_subtuning(
    study: Scorer,
    epsilon: float = 0.0,
    max_blocks: int | None = None,
    direction: str = "forward",
    *,
    keep: SignificantGain | None = None,
    race: CheapScores | None = None,
) -> GreedyResult:
    """Adds blocks one by one, or removes them, as long as that pays.

    A block is in the subset only if it earns its place: with it the accuracy must be higher by more than epsilon.
    "forward" starts from linear probing and adds the block that scores best, if it does. "backward" starts from all
    blocks and removes the one without which the rest scores best, if it does not: a removal that costs nothing is
    made. "both" does both and gives the better. Ties between candidates go to fewer parameters, then to the earlier
    block.

    Args:
        study: a `Study`, or whatever scores subsets likewise. All candidates of a round are scored in one call.
        epsilon: accuracy in [0, 1], at least 0; each step is compared with the subset so far. -inf adds blocks up to
            `max_blocks` whatever they bring, inf removes all.
        max_blocks: most blocks that may be chosen; by default all of them. "backward" removes blocks until so few
            are left, whatever that costs.
        direction: "forward", "backward" or "both".
        keep: asks besides that a block makes it significantly better.
        race: drops hopeless candidates early; these are never kept. See `Race` and `Halving`. That none of the others
            pays does not say that no block does: the search then goes on with the best of them for one more round, and
            two blocks that bring more than 2 epsilon together stay both. With `keep` it ends there.

    Raises:
        TypeError, ValueError: wrong arguments; scores that are no numbers.

    Source: PAPER "Greedy SubTuning (Algorithm 1)"; elimination as in the official code, with our own rule. Ours:
        the round more of a race.
    """
    epsilon = _checked_epsilon(epsilon)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}")
    if max_blocks is not None:
        check_count("max_blocks", max_blocks, len(study.block_names))
    if keep is not None and not isinstance(keep, SignificantGain):
        raise TypeError(f"keep is a {type(keep).__name__}; it must be a SignificantGain, or None")
    found = []
    for way in DIRECTIONS[:2] if direction == "both" else (direction,):
        names = tuple(study.block_names)
        plan = GreedyResult((), pd.DataFrame(), epsilon, way, max_blocks, keep, names, study.title)
        found.append(_walk(plan, _scored_rounds(study, plan, race)))
    return _better(found)


def _walk(plan: GreedyResult, rounds: _Rounds) -> GreedyResult:
    """Algorithm 1 in one direction, over rounds that are scored or remembered."""
    forward, names = plan.direction == "forward", plan.block_names
    most = plan.max_blocks or len(names)
    path = chosen = () if forward else names  # after a failed race the path is a round ahead
    start = rounds(0, None, [path]).assign(direction=plan.direction, round=0, candidate="", gain=math.nan)
    seen, accuracy = [start.assign(kept=True, forced=False)], start["accuracy"].iloc[0]
    complete, paid = True, 0  # the last round that paid
    for number in range(1, (most if forward else len(names)) + 1):
        candidates = _neighbours(names, path, forward)
        table = rounds(number, chosen, list(candidates.values()))
        if table is None:
            complete = False
            break
        table = table.assign(direction=plan.direction, round=number, candidate=list(candidates), kept=False)
        table["gain"] = (table["accuracy"] - accuracy).round(DIGITS).where(table["dropped"] == 0)
        best = best_of(table, names)
        path = table.at[best, "blocks"]
        earned = _earns(plan, table.loc[best], forward, number - paid)
        pays = earned if forward else not earned
        forced = not forward and not pays and len(chosen) > most
        table.loc[best, "kept"] = True
        seen.append(table.assign(forced=table["kept"] & forced))
        if pays or forced:
            chosen, accuracy, paid = path, table.at[best, "accuracy"], number
        elif number > paid + 1 or plan.keep is not None or not table["dropped"].any():
            break
    trace = pd.concat(seen, ignore_index=True)[list(COLUMNS)]
    trace["kept"] &= trace["round"] <= paid
    return replace(plan, blocks=chosen, trace=trace, complete=complete)


def _earns(plan: GreedyResult, row: pd.Series, forward: bool, steps: int) -> bool:
    """Whether the larger of two subsets, the chosen one and a candidate, is so much better that `steps` blocks pay."""
    gain = row["gain"] if forward else -row["gain"]
    return bool(gain > steps * plan.epsilon and (plan.keep is None or row["p"] <= plan.keep.alpha))


def _neighbours(names: Sequence[str], current: tuple[str, ...], forward: bool) -> dict[str, tuple[str, ...]]:
    """Each block that can be added or removed, and the subset that this gives, in the network's order."""
    changed = [name for name in names if (name in current) != forward]
    return {block: tuple(n for n in names if (n in current) != (n == block)) for block in changed}


def _scored_rounds(study: Scorer, plan: GreedyResult, race: CheapScores | None) -> _Rounds:
    """Rounds scored by a study: the start together with the first round, since sharing a pass is cheaper."""
    ahead, so_far = {}, {}  # the first round's table; subset -> rows of its scores

    def scored(subsets: list, beside: Sequence[tuple[str, ...]] = ()) -> pd.DataFrame:
        table, scores = candidate_table(study, subsets, race, beside)
        so_far.update(dict(iter(scores.groupby("blocks"))))
        return table

    def rounds(number: int, current: tuple[str, ...] | None, subsets: list) -> pd.DataFrame:
        if number == 0:
            first = list(_neighbours(plan.block_names, subsets[0], plan.direction == "forward").values())
            together = scored(first, beside=subsets)
            ahead[1] = together[1:]
            return together[:1].assign(p=math.nan)
        table = ahead[1] if number == 1 else scored(subsets)
        return table.assign(p=_p_values(plan, so_far, current, table))

    return rounds


def _remembered_rounds(trace: pd.DataFrame) -> _Rounds:
    def rounds(number: int, current: tuple[str, ...] | None, subsets: list) -> pd.DataFrame | None:
        known = trace[trace["round"] == number]
        return known if len(known) else None

    return rounds


def _p_values(plan: GreedyResult, rows: dict, current: tuple[str, ...], table: pd.DataFrame) -> list[float]:
    """By the significance rule, if there is one; a dropped candidate counts as not better."""
    if plan.keep is None:
        return [math.nan] * len(table)
    forward = plan.direction == "forward"
    scored = [None if row.dropped else rows[row.blocks] for row in table.itertuples()]
    return plan.keep.p_values(rows[current], scored, larger=forward)


def _better(found: Sequence[GreedyResult]) -> GreedyResult:
    """The better of the directions, with the traces of all."""
    trace = pd.concat([one.trace for one in found], ignore_index=True)
    ends = pd.concat([row_of(one.trace, one.blocks).to_frame().T for one in found], ignore_index=True)
    ends = ends.drop(columns="candidate").astype({"accuracy": float})
    best = found[best_of(ends, found[0].block_names)]
    direction = "both" if len(found) > 1 else best.direction
    return replace(best, trace=trace, direction=direction, complete=all(one.complete for one in found))


def _checked_epsilon(epsilon: object) -> float:
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise TypeError(f"epsilon is {epsilon!r}; it must be a number")
    if not (epsilon >= 0 or epsilon == -math.inf):
        raise ValueError(f"epsilon is {epsilon}; it must be at least 0, or -inf to go through all rounds")
    return float(epsilon)
