"""Figures of searches and of methods side by side. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, NullLocator

from subtuning_lab.plots import style
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Real, Several, Text, checked

_TRACE = Table(("direction", "candidate", "kept", "dropped"), ("round", "accuracy", "std", "n"))
_METHODS = Table(("method",), ("n",))
_COLUMN = Text()
_MOST_WORDS = 24  # classes of a confusion matrix whose cells have room for a number


@checked(trace=_TRACE, block_names=Several(Text(), unique=True), epsilon=Real(infinite=True, none=True), ax=style.AXES)
def plot_trace(
    trace: pd.DataFrame, block_names: Sequence[str], epsilon: float | None = None, ax: Axes | None = None
) -> Axes:
    """A greedy search round by round: every candidate's accuracy, and the subset that it went on with.

    Args:
        trace: of `GreedyResult`, one direction.
        block_names: of the backbone, from input to output.
        epsilon: draws the accuracy that a next block must exceed.
    Returns:
        The axes: within a round, candidates stand from the first block (left) to the last; error bars on what was kept
        are one standard deviation.
    Source: PAPER "Greedy SubTuning (Algorithm 1)".
    """
    if trace["direction"].nunique() != 1:
        raise ValueError(f"the trace has directions {sorted(trace['direction'].unique())}; draw one at a time")
    if unknown := set(trace.loc[trace["round"] > 0, "candidate"]) - set(block_names):
        raise ValueError(f"block_names is {', '.join(block_names)}; it must hold {min(unknown)}, which was a candidate")
    rounds = sorted(trace["round"].unique())
    ax = style.axes_of(ax, trace_width(len(rounds)), 4.2)
    best = _draw_rounds(ax, trace, list(block_names))
    if epsilon is not None and np.isfinite(epsilon):
        goal = best + epsilon
        ax.axhline(goal, color=style.ORANGE, linestyle=":", linewidth=1.5)
        look = {"color": style.ORANGE, "fontsize": 8.5, "va": "bottom"}
        ax.text(-0.45, goal, f" a next block must exceed {style.percent(goal)}", **look)
    name_rounds(ax, rounds)
    style.accuracy_axis(ax, "validation accuracy")
    n = style.count(trace["n"])
    return style.finish(ax, f"dots: candidates, first block left, last block right; filled: kept; {n} scores each")


def trace_width(rounds: int) -> float:
    """Inches that `plot_trace` needs for so many rounds, the start included."""
    return max(6.0, 2.4 * rounds)


def name_rounds(ax: Axes, rounds: Sequence[int]) -> None:
    """Names the places of a trace's rounds."""
    ax.set_xticks(rounds, ["start" if number == 0 else f"round {number}" for number in rounds])
    ax.set_xlim(-0.5, rounds[-1] + 0.6)


@checked(table=_METHODS, x=_COLUMN, y=_COLUMN, spread=_COLUMN, ax=style.AXES)
def plot_curves(
    table: pd.DataFrame, x: str = "train_size", y: str = "accuracy", spread: str = "std", ax: Axes | None = None
) -> Axes:
    """Accuracy of each method against the number of training images, with bands of one standard deviation.

    Args:
        table: rows with `method`, the columns named by `x`, `y`, `spread`, and `n`.
        x, y, spread: names of columns.
    """
    Table(numbers=(x, y, spread)).check("table", table)
    ax = style.axes_of(ax, 7.0, 4.4)
    styles = style.method_styles(table["method"])
    for (method, rows), (colour, marker) in zip(table.groupby("method", sort=False), styles, strict=True):
        rows = rows.sort_values(x)
        ax.plot(rows[x], rows[y], color=colour, marker=marker, markersize=5, linewidth=1.8, label=method)
        style.band(ax, rows[x], rows[y], style.spread_of(rows, spread), colour)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted(table[x].unique())))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training images")
    style.accuracy_axis(ax)
    return style.finish(ax, f"bands: one standard deviation; {style.count(table['n'])}", "beside")


@checked(summary=Table(("method", "strategy"), ("train_size", "accuracy", "std", "n")))
def plot_strategies(summary: pd.DataFrame, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Test accuracy against the number of labels, a panel for each method and a line for each strategy.

    Args:
        summary: of `summarize_queries`.
        axes: where to draw, one for each method; a new figure by default.
    Returns:
        The axes, in the methods' order; bands are one standard deviation over repetitions.
    """
    Several(Is("Axes"), none=True).check("axes", axes)
    methods = list(dict.fromkeys(summary["method"]))
    if axes is None:
        size = (3.6 * len(methods) + 1.0, 3.8)
        axes = plt.subplots(1, len(methods), figsize=size, squeeze=False, layout="constrained")[1][0]
    if len(axes) != len(methods):
        raise ValueError(f"{len(axes)} axes for {len(methods)} methods: {', '.join(methods)}")
    for method, ax in zip(methods, axes, strict=True):
        rows = summary[summary["method"] == method]
        plot_curves(rows.assign(method=rows["strategy"]), ax=ax)
        ax.set(xlabel="labelled images", ylabel="test accuracy")
        ax.set_title(f"{method}\n{ax.get_title()}", fontsize=10)
        if ax is not axes[-1]:
            ax.get_legend().remove()
        ax.label_outer()
    _share_accuracies(axes)
    return list(axes)


@checked(table=_METHODS, x=_COLUMN, y=_COLUMN, spread=_COLUMN, xlabel=Is(str), ax=style.AXES)
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
    """
    Table(numbers=(x, y, spread)).check("table", table)
    ax = style.axes_of(ax, 7.0, 4.4)
    cost, errors = table[x].astype(float), style.spread_of(table, spread)
    least = cost[cost > 0].min() / 4 if (cost > 0).any() else 1.0
    points = zip(table["method"], cost, table[y], errors, style.method_styles(table["method"]), strict=True)
    for method, price, accuracy, error, (colour, marker) in points:
        look = {"fmt": marker, "color": colour, "markersize": 8, "capsize": 3, "elinewidth": 1}
        ax.errorbar(price or least, accuracy, yerr=error, label=method, **look)
    ax.set_xscale("log")
    ax.set_xlabel((xlabel or x) + (" (left edge: 0)" if (cost == 0).any() else ""))
    style.accuracy_axis(ax)
    return style.finish(ax, f"bars: one standard deviation; {style.count(table['n'])}", "beside")


@checked(table=_METHODS, y=_COLUMN, spread=_COLUMN, ax=style.AXES)
def plot_methods(table: pd.DataFrame, y: str = "accuracy", spread: str = "std", ax: Axes | None = None) -> Axes:
    """One bar per method, the best on top.

    Args:
        table: rows with `method`, the columns named by `y` and `spread`, and `n`.
        y, spread: names of columns.
    """
    Table(numbers=(y, spread)).check("table", table)
    rows = table.sort_values(y)
    ax, errors = style.axes_of(ax, 7.0, 0.9 + 0.34 * len(rows)), style.spread_of(rows, spread)
    colours = [style.METHOD_COLOURS.get(method, style.LIGHT) for method in rows["method"]]
    ax.barh(rows["method"], rows[y], xerr=errors, color=colours, ecolor=style.DARK, capsize=2.5, height=0.7)
    lowest = (rows[y] - errors).min()
    ax.set_xlim(0.0 if not lowest >= 0.5 else np.floor(10 * lowest - 1) / 10, None)
    style.percent_axis(ax.xaxis)
    ax.set_xlabel("accuracy")
    return style.finish(ax, f"mean and one standard deviation; {style.count(table['n'])}")


@checked(confusion=Table(), ax=style.AXES)
def plot_confusion(confusion: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of which class (row) was taken for which (column), in percent of each class's images.

    Args:
        confusion: numbers of images, a row for each true class and a column for each answer, in one order.
    Returns:
        The axes; a class without images has an empty row.
    """
    if list(map(str, confusion.index)) != list(map(str, confusion.columns)):
        raise ValueError("confusion must have the same classes as rows and as columns, in one order")
    Table(numbers=tuple(confusion.columns)).check("confusion", confusion)
    if not (confusion >= 0).all(axis=None):
        raise ValueError("confusion must hold numbers of images, from 0")
    images = confusion.sum(axis=1)
    shares = confusion.div(images.where(images > 0), axis=0)
    few = len(shares) <= _MOST_WORDS
    words = shares.map(lambda share: "" if pd.isna(share) or share == 0 else f"{100 * share:.0f}")
    side = 1.8 + 0.45 * min(len(shares), _MOST_WORDS)
    ax = style.axes_of(ax, side + 1.2, side)
    look = {"fmt": "", "cmap": "cividis", "vmin": 0.0, "vmax": 1.0, "square": True, "annot_kws": {"fontsize": 8.5}}
    sns.heatmap(shares, annot=words if few else None, ax=ax, cbar_kws={"label": "share of the class"}, **look)
    style.percent_axis(ax.collections[0].colorbar.ax.yaxis)
    ax.set(xlabel="answer", ylabel="true class")
    right = np.diag(confusion).sum() / images.sum() if images.sum() else np.nan
    ax.set_title(f"{style.percent(right)} right, n = {int(images.sum())} images; rows in percent", fontsize=10)
    return ax


def _draw_rounds(ax: Axes, trace: pd.DataFrame, names: list[str]) -> float:
    """Draws candidates and what was kept; returns the accuracy of the last kept subset."""
    path, best = [], np.nan
    for row in trace.sort_values("round", kind="stable").itertuples():
        shift = 0.6 * (names.index(row.candidate) / max(1, len(names) - 1) - 0.5) if row.round else 0.0
        place, kept = row.round + shift, bool(row.kept) or row.round == 0
        if row.dropped:
            ax.plot(place, row.accuracy, "x", color=style.GREY, markersize=5)
            continue
        look = {"fillstyle": "full" if kept else "none", "markersize": 7 if kept else 5}
        ax.plot(place, row.accuracy, "o", color=style.BLUE, **look)
        if kept:
            best = row.accuracy
            path.append((place, best))
            _name_kept(ax, row, place)
    ax.plot(*zip(*path, strict=True), color=style.BLUE, linewidth=1, alpha=0.6)
    ax.margins(y=0.18)
    return best


def _name_kept(ax: Axes, row: object, place: float) -> None:
    """Writes what was kept in a round, and its accuracy, above its error bar."""
    error = 0.0 if pd.isna(row.std) else row.std
    ax.errorbar(place, row.accuracy, yerr=error, color=style.BLUE, capsize=3, linewidth=1)
    label = f"{'−' if row.direction == 'backward' else '+'} {row.candidate}" if row.round else "start"
    look = {"ha": "center", "va": "bottom", "fontsize": 8.5, "xytext": (0, 3), "textcoords": "offset points"}
    ax.annotate(f"{label}\n{style.percent(row.accuracy)}", (place, row.accuracy + error), **look)


def _share_accuracies(axes: Sequence[Axes]) -> None:
    """Gives panels one range; each was drawn for its own, which sharing from the start would impose on the others."""
    limits = [limit for ax in axes for limit in ax.get_ylim()]
    low, high = min(limits), max(limits)
    for ax in axes:
        ax.set_yticks([tick for tick in AutoLocator().tick_values(low, high) if low <= tick <= min(1.0, high)])
        ax.set_ylim(low, high)
