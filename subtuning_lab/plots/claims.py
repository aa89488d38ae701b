"""Figures of what real networks say to a claim. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from matplotlib.axes import Axes

from subtuning_lab.plots import style
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import checked

CASES = Table(("claim", "notebook", "network", "where", "unit"), ("difference", "low", "high", "n"))


@checked
def plot_cases(cases: Annotated[pd.DataFrame, CASES], ax: Annotated[Axes | None, style.AXES] = None) -> Axes:
    """Every case of one claim with its interval: blue speaks for the claim, orange against it, grey is undecided.

    Args:
        cases: rows of `claim_cases`, of one claim that was tried.

    Returns:
        The axes; bars are the intervals of the table.

    Raises:
        ValueError: several claims, or one that nothing was tried of.
    """
    claims, tried = cases["claim"].unique(), cases.dropna(subset=["difference"])[::-1]
    if len(claims) > 1:
        raise ValueError(f"cases are of {len(claims)} claims; give those of one, e.g. {claims[0]!r}")
    if tried.empty:
        raise ValueError(f"nothing was tried of {claims[0]!r}; there is nothing to plot")
    ax = style.axes_of(ax, 9.4, 1.6 + 0.34 * len(tried))
    in_points = (tried["unit"] == "points").all()
    scale, bars = (100, "95 % intervals") if in_points else (1, "intervals as in docs/verdicts.md")
    for place, case in enumerate(tried.itertuples()):
        colour = style.BLUE if case.low > 0 else style.ORANGE if case.high < 0 else style.DARK
        ends = [[scale * (case.difference - case.low)], [scale * (case.high - case.difference)]]
        ax.errorbar([scale * case.difference], [place], xerr=ends, color=colour, marker="o", capsize=3, linewidth=1.8)
    ax.axvline(0, color=style.DARK, linewidth=0.8, linestyle=":")
    networks = tried["network"][::-1].unique()
    labels = [f"{case.where}  (n = {int(case.n)})" for case in tried.itertuples()]
    if len(networks) > 1:
        labels = [f"{name.split()[0]}: {label}" for name, label in zip(tried["network"], labels, strict=True)]
    ax.set_yticks(range(len(tried)), labels)
    ax.set_ylim(-0.6, len(tried) - 0.4)
    ax.set_xlabel("difference in points" if scale == 100 else str(tried["unit"].iloc[0]))
    return style.finish(ax, "\n".join([claims[0], *networks, f"bars: {bars}"]))
