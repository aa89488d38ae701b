"""A greedy search from its trace alone: rounds that are remembered where a new search would score them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

#: number of a round, subset so far (None: there is none), block that changes -> candidate: gives the candidates' table,
#: or None where it is not known
Rounds = Callable[[int, tuple[str, ...] | None, Mapping[str, tuple[str, ...]]], pd.DataFrame | None]


def remembered_rounds(trace: pd.DataFrame) -> Rounds:
    """The rounds of one direction's trace; a search that walks through them trains nothing."""

    def rounds(
        number: int, chosen: tuple[str, ...] | None, candidates: Mapping[str, tuple[str, ...]]
    ) -> pd.DataFrame | None:
        known = trace[trace["round"] == number]
        return known if len(known) else None

    return rounds
