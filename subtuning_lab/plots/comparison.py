"""Figures of searches and of methods side by side. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from subtuning_lab.plots.profiles import BLUE, GREEN, GREY, LIGHT, ORANGE, PALE_BLUE, PURPLE, percent_axis

_BLACK, _YELLOW, _SKY = "#000000", "#E69F00", "#56B4E9"
#: methods that are drawn in a colour of their own wherever they occur
_COLOURS = {"linear probing": GREEN, "full finetuning": ORANGE, "greedy": BLUE, "SubTuning": BLUE, "LP-FT": PURPLE}
_OTHERS = (_YELLOW, _SKY, _BLACK, GREY, PALE_BLUE)
_MARKERS = "osD^vP*X<>"


def plot_trace(
    trace: pd.DataFrame, block_names: Sequence[str], epsilon: float | None = None, ax: Axes | None = None
) -> Axes:
    """A greedy search round by round: every candidate's accuracy, and the subset that it went on with.

    Args:
        trace: of `GreedyResult`, one direction.
        block_names: of the backbone, from input to output.
        epsilon: draws the accuracy that a next block must exceed.
        ax: where to draw; a new figure by default.

    Returns:
        The axes: within a round, candidates stand from the first block (left) to the last; error bars on what was kept
        are one standard deviation.

    Raises:
        ValueError: a trace of several directions.

    Source: PAPER "Greedy SubTuning (Algorithm 1)".
    """
    if trace["direction"].nunique() != 1:
        raise ValueError(f"the trace has directions {sorted(trace['direction'].unique())}; draw one at a time")
    rounds = sorted(trace["round"].unique())
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.0, 2.4 * len(rounds)), 4.2), layout="constrained")
    best = _draw_rounds(ax, trace, list(block_names))
    if epsilon is not None and np.isfinite(epsilon):
        ax.axhline(best + epsilon, color=ORANGE, linestyle=":", linewidth=1.5)
        ax.text(
            -0.45,
            best + epsilon,
            f" a next block must exceed {best + epsilon:.1%}",
            color=ORANGE,
            fontsize=8.5,
            va="bottom",
        )
    ax.set_xticks(rounds, ["start" if number == 0 else f"round {number}" for number in rounds])
    ax.set_xlim(-0.5, rounds[-1] + 0.6)
    _ticks_up_to_one(ax)
    ax.set_ylabel("validation accuracy")
    n = _range(trace["n"])
    ax.set_title(
        f"dots: candidates, first block left, last block right; filled: kept; n = {n} scores each", fontsize=10
    )
    sns.despine(ax=ax)
    return ax


def plot_curves(
    table: pd.DataFrame, x: str = "train_size", y: str = "accuracy", spread: str = "std", ax: Axes | None = None
) -> Axes:
    """Accuracy of each method against the number of training images, with bands of one standard deviation.

    Args:
        table: rows with `method`, the columns named by `x`, `y`, `spread`, and `n`.
        x, y, spread: names of columns.
        ax: where to draw; a new figure by default.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    for (method, rows), (colour, marker) in zip(
        table.groupby("method", sort=False), method_styles(table["method"]), strict=True
    ):
        rows = rows.sort_values(x)
        width = rows[spread].fillna(0)
        ax.plot(rows[x], rows[y], color=colour, marker=marker, markersize=5, linewidth=1.8, label=method)
        ax.fill_between(rows[x], rows[y] - width, rows[y] + width, color=colour, alpha=0.12, linewidth=0)
    sizes = sorted(table[x].unique())
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training images")
    _finish(ax, table, "bands: one standard deviation")
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def plot_tradeoff(
    table: pd.DataFrame,
    x: str = "params",
    y: str = "accuracy",
    spread: str = "std",
    xlabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy of each method against what it costs, on a logarithmic axis; zero stands at the left edge.

    Args:
        table: rows with `method`, the columns named by `x`, `y`, `spread`, and `n`.
        x: the cost, e.g. "params", "trainings", "flops".
        y, spread: names of columns.
        xlabel: the cost in words; by default its name.
        ax: where to draw; a new figure by default.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    cost = table[x].astype(float)
    least = cost[cost > 0].min() / 4 if (cost > 0).any() else 1.0
    for (_, row), (colour, marker) in zip(table.iterrows(), method_styles(table["method"]), strict=True):
        at = row[x] or least
        error = 0.0 if pd.isna(row[spread]) else row[spread]
        style = {"fmt": marker, "color": colour, "markersize": 8, "capsize": 3, "elinewidth": 1}
        ax.errorbar(at, row[y], yerr=error, label=row["method"], **style)
    ax.set_xscale("log")
    ax.set_xlabel((xlabel or x) + (" (left edge: 0)" if (cost == 0).any() else ""))
    _finish(ax, table, "bars: one standard deviation")
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def plot_methods(table: pd.DataFrame, y: str = "accuracy", spread: str = "std", ax: Axes | None = None) -> Axes:
    """One bar per method, the best on top.

    Args:
        table: rows with `method`, the columns named by `y` and `spread`, and `n`.
        y, spread: names of columns.
        ax: where to draw; a new figure by default.
    """
    rows = table.sort_values(y)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 0.9 + 0.34 * len(rows)), layout="constrained")
    colours = [_COLOURS.get(method, LIGHT) for method in rows["method"]]
    ax.barh(
        rows["method"], rows[y], xerr=rows[spread].fillna(0), color=colours, ecolor="#333333", capsize=2.5, height=0.7
    )
    lowest = (rows[y] - rows[spread].fillna(0)).min()
    ax.set_xlim(0.0 if lowest < 0.5 else np.floor(10 * lowest - 1) / 10, None)
    percent_axis(ax.xaxis)
    ax.set_xlabel("accuracy")
    ax.set_title(f"mean and one standard deviation; n = {_range(table['n'])}", fontsize=10)
    sns.despine(ax=ax)
    return ax


def _draw_rounds(ax: Axes, trace: pd.DataFrame, names: list[str]) -> float:
    """Draws candidates and what was kept; returns the accuracy of the last kept subset."""
    path, best = [], np.nan
    for number, rows in trace.groupby("round"):
        for _, row in rows.iterrows():
            place = number + (
                0.0 if number == 0 else 0.6 * (names.index(row["candidate"]) / max(1, len(names) - 1) - 0.5)
            )
            kept = bool(row["kept"]) or number == 0
            if row["dropped"]:
                ax.plot(place, row["accuracy"], "x", color=GREY, markersize=5)
                continue
            ax.plot(
                place,
                row["accuracy"],
                "o",
                color=BLUE,
                fillstyle="full" if kept else "none",
                markersize=7 if kept else 5,
            )
            if kept:
                path.append((place, row["accuracy"]))
                best = row["accuracy"]
                error = 0.0 if pd.isna(row["std"]) else row["std"]
                ax.errorbar(place, best, yerr=error, color=BLUE, capsize=3, linewidth=1)
                sign = "−" if row["direction"] == "backward" else "+"
                label = "start" if number == 0 else f"{sign} {row['candidate']}"
                ax.annotate(
                    f"{label}\n{best:.1%}",
                    (place, best + error),
                    ha="center",
                    va="bottom",
                    fontsize=8.5,
                    xytext=(0, 3),
                    textcoords="offset points",
                )
    ax.plot(*zip(*path, strict=True), color=BLUE, linewidth=1, alpha=0.6)
    ax.margins(y=0.18)
    return best


def method_styles(methods: Iterable[str]) -> list[tuple[str, str]]:
    """A colour and a marker per different method, in order; the known ones have their own colour."""
    different, others = list(dict.fromkeys(methods)), iter(_OTHERS * 9)
    colours = {method: _COLOURS[method] if method in _COLOURS else next(others) for method in different}
    return [(colours[method], _MARKERS[i % len(_MARKERS)]) for i, method in enumerate(different)]


def _finish(ax: Axes, table: pd.DataFrame, spread: str) -> None:
    _ticks_up_to_one(ax)
    ax.set_ylabel("accuracy")
    ax.set_title(f"{spread}; n = {_range(table['n'])}", fontsize=10)
    sns.despine(ax=ax)


def _ticks_up_to_one(ax: Axes) -> None:
    """Ticks in percent; error bars may reach above 100, ticks don't."""
    percent_axis(ax.yaxis)
    limits = ax.get_ylim()
    ax.set_yticks([tick for tick in ax.get_yticks() if limits[0] <= tick <= min(1.0, limits[1])])
    ax.set_ylim(limits)


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
