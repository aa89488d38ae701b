"""Figures of distribution shifts: methods and blocks against shifts, and what is forgotten. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.plots import style
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Several, Text, checked

_AVERAGE = Table(("method",), ("train_size", "accuracy", "std", "clean_accuracy", "clean_std", "n"))
_SUMMARY = Table(("shift", "method"), ("train_size", "accuracy", "std", "n"))
_STEPS = Table(("shift", "block"), ("train_size", "step", "chosen", "n"))


@checked(summary=_SUMMARY, ax=style.AXES)
def plot_shifts(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of accuracy under each shift (rows) by each method (columns), the best of a row framed.

    Args:
        summary: of `summarize_shifts`, for one training-set size: `shift`, `method`, `accuracy`, `std`, `n`.
    """
    size, accuracy = one_size(summary), _matrix(summary, "accuracy")
    ax = style.axes_of(ax, 2.6 + 0.95 * accuracy.shape[1], 2.0 + 0.5 * len(accuracy))
    words = np.vectorize(_percent, otypes=[object])(accuracy, _matrix(summary, "std"))
    bar = {"label": "accuracy under the shift", "format": PercentFormatter(1.0, decimals=0)}
    look = {"fmt": "", "cmap": "cividis", "vmin": 0.0, "vmax": 1.0, "linewidths": 0.5, "annot_kws": {"fontsize": 8.5}}
    sns.heatmap(accuracy, annot=words, ax=ax, cbar_kws=bar, **look)
    for row, scores in enumerate(accuracy.to_numpy().round(12)):
        if not np.isnan(scores).all():
            best = int(np.nanargmax(scores))
            ax.add_patch(plt.Rectangle((best, row), 1, 1, fill=False, edgecolor=style.ORANGE, linewidth=2.5))
    _name_axes(ax)
    spread = "mean and standard deviation in percent" if summary["n"].max() > 1 else "percent"
    ax.set_title(f"{size} labelled images; {spread}, {style.count(summary['n'])}; best framed", fontsize=10)
    return ax


@checked(steps=_STEPS, ax=style.AXES)
def plot_steps(steps: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Heat map of which block (columns) greedy chose under each shift (rows), coloured by the step; white: never.

    Args:
        steps: of `chosen_steps`, for one training-set size.
    Returns:
        The axes; in a cell stands how many of the repetitions chose the block, where there are several.
    """
    size = one_size(steps)
    step, chosen = (steps.pivot(index="shift", columns="block", values=name) for name in ("step", "chosen"))
    rows, columns = (list(dict.fromkeys(steps[name])) for name in ("shift", "block"))
    step, chosen = step.loc[rows, columns].astype(float), chosen.loc[rows, columns]
    ax = style.axes_of(ax, 2.6 + 0.62 * len(columns), 1.8 + 0.42 * len(rows))
    n = int(steps["n"].max())
    words = chosen.map(lambda times: f"{times}/{n}" if times and n > 1 else "")
    last = max(2.0, step.max(axis=None) if step.notna().any(axis=None) else 2.0)
    # From dark to light: what is chosen first stands out. The lightest tone stays apart from white.
    colours = ListedColormap(sns.color_palette("cividis", 256)[:235])
    ax.set_facecolor("white")
    bar = {"label": "step (mean)", "ticks": MaxNLocator(integer=True)}
    look = {"fmt": "", "cmap": colours, "vmin": 1.0, "vmax": last, "linewidths": 0.5, "linecolor": "#DDDDDD"}
    sns.heatmap(step, annot=words, ax=ax, cbar_kws=bar, annot_kws={"fontsize": 8}, **look)
    ax.collections[0].colorbar.ax.invert_yaxis()
    _name_axes(ax)
    ax.set_xlabel("block, from input to output")
    ax.set_title(f"{size} labelled images; the step at which greedy chose a block, n = {n}", fontsize=10)
    return ax


@checked(average=_AVERAGE, summary=Table(_SUMMARY.columns, _AVERAGE.numbers, none=True), ax=style.AXES)
def plot_forgetting(average: pd.DataFrame, summary: pd.DataFrame | None = None, ax: Axes | None = None) -> Axes:
    """Accuracy under the shift against accuracy on clean images, by method; the upper right corner is the best.

    Args:
        average: of `average_shifts`, for one training-set size: `method`, `accuracy`, `std`, `clean_accuracy`,
            `clean_std`, `n`.
        summary: of `summarize_shifts`: adds a small dot for every single shift.
    """
    size = one_size(average)
    ax, drawn = style.axes_of(ax, 7.4, 4.4), average.fillna({"std": 0.0, "clean_std": 0.0})
    for (_, row), (colour, marker) in zip(drawn.iterrows(), style.method_styles(drawn["method"]), strict=True):
        if summary is not None:
            shifts = summary[summary["method"] == row["method"]]
            look = {"color": colour, "marker": marker, "s": 14, "alpha": 0.45, "lw": 0}
            ax.scatter(shifts["clean_accuracy"], shifts["accuracy"], **look)
        errors = {"xerr": row["clean_std"], "yerr": row["std"], "capsize": 2.5, "elinewidth": 1}
        look = {"fmt": marker, "color": colour, "markersize": 8, "markeredgecolor": "white", **errors}
        ax.errorbar(row["clean_accuracy"], row["accuracy"], label=row["method"], **look)
    before = average.loc[average["method"] == "no adaptation", "clean_accuracy"]
    if len(before):
        ax.axvline(before.iloc[0], color=style.GREY, linestyle=":", linewidth=1.5)
    for axis in (ax.xaxis, ax.yaxis):
        style.percent_axis(axis)
    ax.set_xlabel("accuracy on clean images after adaptation" + (" (dotted: before)" if len(before) else ""))
    ax.set_ylabel("accuracy under the shift")
    small = "" if summary is None else "; small: each corruption"
    title = f"{size} labelled images; means over corruptions, {style.count(average['n'])}{small}"
    return style.finish(ax, title, "beside")


@checked(profiles=Is(Mapping), new_classes=Several(Text(), least=0), ax=style.AXES)
def plot_shift_profiles(
    profiles: Mapping[str, Profile], new_classes: Iterable[str] = (), ax: Axes | None = None
) -> Axes:
    """Finetuning profiles under several shifts on the same axes: linear probing left, single blocks, all parts right.

    Args:
        profiles: of `shift_profiles`, of one backbone and window.
        new_classes: names of label shifts; their lines are dashed.
    Returns:
        The axes; bands and error bars are one standard deviation over repetitions and folds.
    """
    check_profiles(profiles)
    dashed, tables = set(new_classes), {shift: _in_place(profile.table) for shift, profile in profiles.items()}
    ticks = next(iter(tables.values()))["label"]
    if any(list(table["label"]) != list(ticks) for table in tables.values()):
        raise ValueError("profiles are of different parts; draw those of one backbone and window at a time")
    ax = style.axes_of(ax, max(6.4, 2.6 + 0.6 * len(ticks)), 4.2)
    for (shift, rows), (colour, marker) in zip(tables.items(), style.method_styles(tables), strict=True):
        line = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "--" if shift in dashed else "-"}
        blocks, ends = rows.iloc[1:-1], rows.iloc[[0, -1]]
        ax.plot(blocks.index, blocks["accuracy"], label=shift, **line)
        style.band(ax, blocks.index, blocks["accuracy"], style.spread_of(blocks), colour)
        look = line | {"linestyle": "none", "markersize": 8, "capsize": 3, "elinewidth": 1}
        ax.errorbar(ends.index, ends["accuracy"], yerr=style.spread_of(ends), **look)
    ax.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right")
    style.percent_axis(ax.yaxis)
    ax.set_ylabel("validation accuracy")
    n = style.count(pd.concat(list(tables.values()))["n"])
    title = f"what is tuned alone; bands and bars: one standard deviation, {n}; dashed: new classes"
    return style.finish(ax, title, "beside")


def check_profiles(profiles: Mapping[str, Profile]) -> None:
    """Raises ValueError where there is none, and TypeError for what is none."""
    if not profiles:
        raise ValueError("profiles is empty; give at least one finished profile")
    for name, profile in profiles.items():
        Is(Profile).check(f"profiles[{name!r}]", profile)


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
    """Mean and standard deviation in percent, without the sign, as a cell has room for; one score has no spread."""
    if pd.isna(mean):
        return ""
    return f"{100 * mean:.0f}" if pd.isna(spread) else f"{100 * mean:.0f} ± {100 * spread:.0f}"
