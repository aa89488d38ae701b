"""Figures of bounds: their terms as stacked bars, and what they say beside what was measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from subtuning_lab.plots import style
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Real, Several, Text, checked

_TERMS = {
    "empirical error": style.GREY,
    "Monte Carlo": "#111111",
    "complexity": style.BLUE,
    "price of selection": style.ORANGE,
    "price of the grids": style.YELLOW,
    "confidence": style.LIGHT,
}
_OTHERS = (style.PURPLE, style.GREEN, style.PALE_BLUE)
_KINDS = {"linear probing": (style.GREEN, "s"), "greedy": (style.PURPLE, "*"), "full finetuning": (style.ORANGE, "D")}
_ORDINARY = (style.BLUE, "o")


@checked(
    table=Table(("bound", "of", "term", "vacuous"), ("amount", "value", "confidence")),
    limit=Real(0, above=True, none=True),
    ax=style.AXES,
)
def plot_terms(table: pd.DataFrame, limit: float | None = None, ax: Axes | None = None) -> Axes:
    """Each bound as a stacked bar of its terms, with its value, and the line from which on a bound is vacuous.

    Args:
        table: of `bound_table`.
        limit: where the axis ends, above 0; longer bars are cut there and say so. None shows all bars whole.
    Returns:
        The axes: bounds from top to bottom in the table's order.
    """
    names = list(dict.fromkeys(table["bound"]))
    ax = style.axes_of(ax, 9.0, 1.5 + 0.5 * len(names))
    end = limit or max(1.0, float(table["value"].max()))
    left = dict.fromkeys(names, 0.0)
    for (term, rows), colour in zip(table.groupby("term", sort=False), _colours(table), strict=True):
        starts = [min(left[name], end) for name in rows["bound"]]
        left |= {name: left[name] + amount for name, amount in zip(rows["bound"], rows["amount"], strict=True)}
        widths = [min(left[name], end) - start for name, start in zip(rows["bound"], starts, strict=True)]
        ax.barh(rows["bound"], widths, left=starts, color=colour, label=term, height=0.62)
    _write_values(ax, table, names, end)
    ax.axvline(1, color="black", linestyle="--", linewidth=1.2)
    ax.text(1, -0.62, " vacuous from here on", fontsize=8.5, ha="left" if end > 1.5 else "right", va="center")
    ax.set(xlim=(0, 1.28 * end), ylim=(len(names) - 0.5, -0.8), xlabel=_measured(table))
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax


@checked
def plot_against_gap(
    table: Annotated[pd.DataFrame, Table(("label",))],
    column: Annotated[str, Text()],
    *,
    measured: Annotated[str, Text()] = "gap",
    spread: Annotated[str | None, Text(none=True)] = None,
    correlation: Annotated[Mapping[str, float] | None, Is((Mapping, pd.Series), none=True)] = None,
    name_points: Annotated[Sequence[str], Several(Text(), least=0)] = (),
    name: Annotated[str | None, Text(none=True)] = None,
    ax: Annotated[Axes | None, style.AXES] = None,
) -> Axes:
    """What a bound says of each subset against what was measured, on a logarithmic axis for the bound.

    Args:
        table: one row a subset, with `label` ("linear probing", "greedy" and "full finetuning" stand out).
        column: of the bound's values, above 0; rows without one are left out.
        measured: column of the measured gap, or error.
        spread: column of its standard deviation, for error bars; missing values draw none.
        correlation: `spearman`, `low`, `high` and `n` for the title: the rank correlation, its interval and how many
            subsets it is of, as in a row of `rank_correlations`.
        name_points: labels to write beside their points; the three that stand out always have theirs in the legend.
        name: of the bound, for the title; its column's by default.
    """
    Table(numbers=(column, measured, *([spread] if spread else []))).check("table", table)
    rows = table[table[column] > 0]
    if rows.empty:
        raise ValueError(f"no subset has a {column} above 0")
    ax = style.axes_of(ax, 5.6, 4.4)
    errors = rows[spread] if spread else [np.nan] * len(rows)
    for label, x, y, std in zip(rows["label"], rows[column], rows[measured], errors, strict=True):
        colour, marker = _KINDS.get(label, _ORDINARY)
        known = label if label in _KINDS else "single blocks"
        look = {"fmt": marker, "color": colour, "ms": 8, "capsize": 3, "alpha": 0.9}
        seen = known in ax.get_legend_handles_labels()[1]
        ax.errorbar(x, y, None if np.isnan(std) else std, label=None if seen else known, **look)
        if label in name_points:
            ax.annotate(label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    if rows[column].min() < 1 < rows[column].max():
        ax.axvline(1, color="black", linestyle="--", linewidth=1.0)
    ax.set(xlabel="value of the bound", ylabel=measured)
    return style.finish(ax, f"{name or column}: {len(rows)} subsets{_correlated(correlation)}", "inside")


def _correlated(correlation: Mapping[str, float] | None) -> str:
    if correlation is None:
        return ""
    rho, low, high = (float(correlation[name]) for name in ("spearman", "low", "high"))
    if np.isnan(rho):
        return "\nno rank correlation: one side is constant"
    return f"\nrank correlation {rho:+.2f}, interval {low:+.2f} to {high:+.2f}, n = {correlation['n']}"


def _colours(table: pd.DataFrame) -> list[str]:
    """One colour a term, in the order of first appearance; the known terms keep theirs in every figure."""
    others = iter(_OTHERS * len(table))
    return [_TERMS.get(term) or next(others) for term in dict.fromkeys(table["term"])]


def _write_values(ax: Axes, table: pd.DataFrame, names: Sequence[str], end: float) -> None:
    values = table.drop_duplicates("bound").set_index("bound")
    for place, name in enumerate(names):
        value = values.loc[name, "value"]
        text = f"{'... ' if value > end else ''}{value:.3g}{' (vacuous)' if values.loc[name, 'vacuous'] else ''}"
        look = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        box = {"fc": "white", "ec": "none", "pad": 0.5}  # so that the line at 1 does not cross the digits
        ax.annotate(text, (min(value, end), place), bbox=box, **look)


def _measured(table: pd.DataFrame) -> str:
    kinds = " or ".join(dict.fromkeys(table["of"]))
    confidence = ", ".join(f"{value:.0%}" for value in dict.fromkeys(table["confidence"]))
    return f"bound on the {kinds}, with confidence {confidence}"
