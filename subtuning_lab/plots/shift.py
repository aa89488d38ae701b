"""Figures of distribution shifts: methods and blocks against shifts, and what is forgotten. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.plots.comparison import method_styles
from subtuning_lab.plots.profiles import GREY, ORANGE, percent_axis
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile


def plot_shifts(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of accuracy under each shift (rows) by each method (columns), the best of a row framed.

    Args:
        summary: of `summarize_shifts`, for one training-set size: `shift`, `method`, `accuracy`, `std`, `n`.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: several training-set sizes, or a method that is there twice under one shift.
    """
    size, accuracy = one_size(summary), _matrix(summary, "accuracy")
    spread = _matrix(summary, "std")
    if ax is None:
        figure = (2.6 + 0.95 * accuracy.shape[1], 2.0 + 0.5 * len(accuracy))
        _, ax = plt.subplots(figsize=figure, layout="constrained")
    words = [
        [_percent(*pair) for pair in zip(*rows, strict=True)]
        for rows in zip(accuracy.to_numpy(), spread.to_numpy(), strict=True)
    ]
    bar = {"label": "accuracy under the shift", "format": PercentFormatter(1.0, decimals=0)}
    style = {"fmt": "", "cmap": "cividis", "vmin": 0.0, "vmax": 1.0, "linewidths": 0.5, "annot_kws": {"fontsize": 8.5}}
    sns.heatmap(accuracy, annot=np.array(words), ax=ax, cbar_kws=bar, **style)
    for row, best in enumerate(accuracy.to_numpy().round(12)):
        ax.add_patch(plt.Rectangle((int(np.nanargmax(best)), row), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5))
    _name_axes(ax)
    spread = "mean and standard deviation in percent" if summary["n"].max() > 1 else "percent"
    ax.set_title(f"{size} labelled images; {spread}, n = {_range(summary['n'])}; best framed", fontsize=10)
    return ax


def plot_steps(steps: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of which block (columns) greedy chose under each shift (rows), coloured by the step; white: never.

    Args:
        steps: of `chosen_steps`, for one training-set size.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; in a cell stands how many of the repetitions chose the block, where there are several.

    Raises:
        ValueError: several training-set sizes.
    """
    size = one_size(steps)
    step, chosen = (steps.pivot(index="shift", columns="block", values=name) for name in ("step", "chosen"))
    rows, columns = (list(dict.fromkeys(steps[name])) for name in ("shift", "block"))
    step, chosen = step.loc[rows, columns].astype(float), chosen.loc[rows, columns]
    if ax is None:
        _, ax = plt.subplots(figsize=(2.6 + 0.62 * len(columns), 1.8 + 0.42 * len(rows)), layout="constrained")
    n = int(steps["n"].max())
    words = chosen.map(lambda count: f"{count}/{n}" if count and n > 1 else "")
    last = max(2.0, step.max(axis=None) if step.notna().any(axis=None) else 2.0)
    # From dark to light: what is chosen first stands out. The lightest tone stays apart from white.
    colours = ListedColormap(sns.color_palette("cividis", 256)[:235])
    ax.set_facecolor("white")
    bar = {"label": "step (mean)", "ticks": MaxNLocator(integer=True)}
    style = {"fmt": "", "cmap": colours, "vmin": 1.0, "vmax": last, "linewidths": 0.5, "linecolor": "#DDDDDD"}
    sns.heatmap(step, annot=words, ax=ax, cbar_kws=bar, annot_kws={"fontsize": 8}, **style)
    ax.collections[0].colorbar.ax.invert_yaxis()
    _name_axes(ax)
    ax.set_xlabel("block, from input to output")
    ax.set_title(f"{size} labelled images; the step at which greedy chose a block, n = {n}", fontsize=10)
    return ax


def plot_forgetting(average: pd.DataFrame, summary: pd.DataFrame | None = None, ax: Axes | None = None) -> Axes:
    """Accuracy under the shift against accuracy on clean images, by method; the upper right corner is the best.

    Args:
        average: of `average_shifts`, for one training-set size: `method`, `accuracy`, `std`, `clean_accuracy`,
            `clean_std`, `n`.
        summary: of `summarize_shifts`: adds a small dot for every single shift.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: several training-set sizes.
    """
    size = one_size(average)
    if ax is None:
        _, ax = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
    for (_, row), (colour, marker) in zip(average.iterrows(), method_styles(average["method"]), strict=True):
        own = None if summary is None else summary[summary["method"] == row["method"]]
        if own is not None:
            ax.scatter(own["clean_accuracy"], own["accuracy"], color=colour, marker=marker, s=14, alpha=0.45, lw=0)
        errors = {"xerr": _zero(row["clean_std"]), "yerr": _zero(row["std"]), "capsize": 2.5, "elinewidth": 1}
        style = {"fmt": marker, "color": colour, "markersize": 8, "markeredgecolor": "white", **errors}
        ax.errorbar(row["clean_accuracy"], row["accuracy"], label=row["method"], **style)
    before = average.loc[average["method"] == "no adaptation", "clean_accuracy"]
    if len(before):
        ax.axvline(before.iloc[0], color=GREY, linestyle=":", linewidth=1.5)
    for axis in (ax.xaxis, ax.yaxis):
        percent_axis(axis)
    ax.set_xlabel("accuracy on clean images after adaptation" + (" (dotted: before)" if len(before) else ""))
    ax.set_ylabel("accuracy under the shift")
    small = "" if summary is None else "; small: each corruption"
    ax.set_title(f"{size} labelled images; means over corruptions, n = {_range(average['n'])}{small}", fontsize=10)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(ax=ax)
    return ax


def plot_shift_profiles(
    profiles: Mapping[str, Profile], new_classes: Iterable[str] = (), ax: Axes | None = None
) -> Axes:
    """Finetuning profiles under several shifts on the same axes: linear probing left, single blocks, all parts right.

    Args:
        profiles: of `shift_profiles`, of one backbone and window.
        new_classes: names of label shifts; their lines are dashed.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; bands and error bars are one standard deviation over repetitions and folds.

    Raises:
        ValueError: no profiles.
    """
    if not profiles:
        raise ValueError("profiles is empty; give at least one finished profile")
    dashed, tables = set(new_classes), {shift: _in_place(profile.table) for shift, profile in profiles.items()}
    ticks = next(iter(tables.values()))["label"]
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.4, 2.6 + 0.6 * len(ticks)), 4.2), layout="constrained")
    for (shift, rows), (colour, marker) in zip(tables.items(), method_styles(tables), strict=True):
        places, spread = rows.index, rows["std"].fillna(0.0)
        low, high = rows["accuracy"] - spread, rows["accuracy"] + spread
        line = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "--" if shift in dashed else "-"}
        ax.plot(places[1:-1], rows["accuracy"][1:-1], label=shift, **line)
        ax.fill_between(places[1:-1], low[1:-1], high[1:-1], color=colour, alpha=0.12, linewidth=0)
        ends = rows.iloc[[0, -1]]
        style = line | {"linestyle": "none", "markersize": 8, "capsize": 3, "elinewidth": 1}
        ax.errorbar(ends.index, ends["accuracy"], yerr=ends["std"].fillna(0.0), **style)
    ax.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right")
    percent_axis(ax.yaxis)
    ax.set_ylabel("validation accuracy")
    n = _range(pd.concat(list(tables.values()))["n"])
    ax.set_title(
        f"what is tuned alone; bands and bars: one standard deviation, n = {n}; dashed: new classes", fontsize=10
    )
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(ax=ax)
    return ax


def one_size(table: pd.DataFrame) -> int:
    """The training-set size of a table. Raises ValueError unless it is one."""
    sizes = sorted(table["train_size"].unique())
    if len(sizes) != 1:
        raise ValueError(f"the table has training-set sizes {', '.join(map(str, sizes)) or 'none'}; draw one at a time")
    return int(sizes[0])


def _in_place(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a profile with linear probing first and full finetuning last."""
    order = table["kind"].map({LINEAR_PROBING: 0, FULL_FINETUNING: 2}).fillna(1)
    return table.assign(order=order).sort_values(["order", "position"], kind="stable", ignore_index=True)


def _matrix(summary: pd.DataFrame, values: str) -> pd.DataFrame:
    twice = summary[summary.duplicated(["shift", "method"])]
    if len(twice):
        raise ValueError(f"{twice.iloc[0]['method']} is there twice under {twice.iloc[0]['shift']}")
    rows, columns = (list(dict.fromkeys(summary[name])) for name in ("shift", "method"))
    return summary.pivot(index="shift", columns="method", values=values).loc[rows, columns].astype(float)


def _name_axes(ax: Axes) -> None:
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=35, ha="right")
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)


def _percent(mean: float, spread: float) -> str:
    """Mean and standard deviation in percent; one score has no spread."""
    if pd.isna(mean):
        return ""
    return f"{100 * mean:.0f}" if pd.isna(spread) else f"{100 * mean:.0f} ± {100 * spread:.0f}"


def _zero(spread: float) -> float:
    return 0.0 if pd.isna(spread) else float(spread)


def _range(counts: Sequence[int]) -> str:
    low, high = int(min(counts)), int(max(counts))
    return str(low) if low == high else f"{low} to {high}"
