"""Figures of ablations. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.plots.profiles import BLUE, GREEN, GREY, ORANGE, PURPLE, percent_axis

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")  # apart for colour-blind eyes
_MARKERS = "osD^vP*"
_IMAGES = {
    "target": (BLUE, "o", "-", "the task (validation images)"),
    "clean": (ORANGE, "s", "--", "clean images"),
}


def plot_variants(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy of every variant against the tuned subset, in the order of the table.

    Args:
        summary: of `summarize_variants`.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; bars are one standard deviation over repetitions.
    """
    subsets = list(dict.fromkeys(summary["subset"]))
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.0, 1.6 + 0.62 * len(subsets)), 3.8), layout="constrained")
    methods = list(dict.fromkeys(summary["method"]))
    for number, method in enumerate(methods):
        rows = summary[summary["method"] == method].set_index("subset").reindex(subsets)
        places = np.arange(len(subsets)) + 0.14 * (number - (len(methods) - 1) / 2)
        style = {"color": _COLOURS[number % 7], "marker": _MARKERS[number % 7], "linewidth": 1.2, "capsize": 2.5}
        ax.errorbar(places, rows["accuracy"], yerr=rows["std"].fillna(0), label=method, elinewidth=1, **style)
    ax.set_xticks(
        range(len(subsets)),
        subsets,
        rotation=45 if len(subsets) > 4 else 0,
        ha="right" if len(subsets) > 4 else "center",
    )
    ax.set_xlabel("tuned subset")
    _finish(ax, f"mean and one standard deviation over repetitions; n = {_range(summary['n'])}")
    ax.legend(frameon=False, fontsize=8.5)
    return ax


def plot_differences(differences: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far variants are ahead of what they are compared with, a line per row of the table.

    Args:
        differences: of `variant_differences`; several tables may stand below each other.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; thick bars are one standard error of the paired difference, thin ones two.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 1.1 + 0.34 * len(differences)), layout="constrained")
    rows = differences[::-1]  # the first row on top
    tuned, changed = (differences[name].nunique() > 1 for name in ("subset", "variant"))
    labels = [
        f"{own.variant}, {own.subset}" if tuned and changed else own.subset if tuned else own.variant
        for own in rows.itertuples()
    ]
    places = np.arange(len(rows))
    colours = [
        GREY if not abs(own.difference) > 2 * own.error else BLUE if own.difference > 0 else ORANGE
        for own in rows.itertuples()
    ]
    error = rows["error"].fillna(0)
    ax.hlines(places, rows["difference"] - 2 * error, rows["difference"] + 2 * error, color=colours, linewidth=1)
    ax.hlines(places, rows["difference"] - error, rows["difference"] + error, color=colours, linewidth=4)
    ax.scatter(rows["difference"], places, color=colours, s=40, zorder=3)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, labels)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    percent_axis(ax.xaxis)
    ax.set_xlabel("difference in accuracy" if changed else f"{rows['variant'].iloc[0]}: difference in accuracy")
    ax.set_title(f"paired differences with one and two standard errors; n = {_range(differences['n'])}", fontsize=10)
    sns.despine(ax=ax)
    return ax


def plot_interpolation(summary: pd.DataFrame, alpha: float | None = None, ax: Axes | None = None) -> Axes:
    """Accuracy on the task and on clean images along the way from the pretrained blocks to the tuned ones.

    Args:
        summary: of `summarize_interpolation`.
        alpha: draws a line there.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; bands are one standard deviation.

    Source: Wortsman et al. (WiSE-FT, 2022).
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for images, (colour, marker, line, label) in _IMAGES.items():
        rows = summary[summary["images"] == images].sort_values("alpha")
        spread, n = rows["std"].fillna(0), _range(rows["n"])
        ax.plot(rows["alpha"], rows["accuracy"], line, color=colour, marker=marker, label=f"{label}, n = {n}")
        low, high = rows["accuracy"] - spread, rows["accuracy"] + spread
        ax.fill_between(rows["alpha"], low, high.clip(upper=1.0), color=colour, alpha=0.12, linewidth=0)
    if alpha is not None:
        ax.axvline(alpha, color=GREY, linestyle=":", linewidth=1.5)
    ax.set_xlabel("alpha: 0 pretrained blocks, 1 tuned blocks")
    _finish(ax, "mean; bands: one standard deviation")
    ax.legend(frameon=False, fontsize=8.5)
    return ax


def plot_alphas(summary: pd.DataFrame, alpha: float, ax: Axes | None = None) -> Axes:
    """What each alpha keeps of the clean images, against what it brings on the task; the best corner is top right.

    Args:
        summary: of `summarize_interpolation`.
        alpha: its point is filled.
        ax: where to draw; a new figure by default.

    Raises:
        ValueError: an alpha that the table doesn't have.
    """
    wide = summary.pivot(index="alpha", columns="images", values=["accuracy", "std"]).sort_index()
    if alpha not in wide.index:
        raise ValueError(f"alpha is {alpha}; the table has {', '.join(f'{own:g}' for own in wide.index)}")
    if ax is None:
        _, ax = plt.subplots(figsize=(5.0, 3.8), layout="constrained")
    means, spread = wide["accuracy"], wide["std"].fillna(0)
    ax.plot(means["clean"], means["target"], color=GREY, marker="o", fillstyle="none", linewidth=1)
    for end in (means.index[0], means.index[-1]):
        at = (means.loc[end, "clean"], means.loc[end, "target"])
        ax.annotate(f"alpha {end:g}", at, xytext=(4, 6), textcoords="offset points", fontsize=8.5)
    own, error = means.loc[alpha], spread.loc[alpha]
    style = {"fmt": "o", "color": BLUE, "markersize": 9, "capsize": 3, "elinewidth": 1}
    ax.errorbar(own["clean"], own["target"], xerr=error["clean"], yerr=error["target"], **style)
    ax.margins(0.12)
    low, high = ax.get_xlim()  # of a few points perhaps: few ticks, as long as they must be, none above 100 %
    ax.set_xticks([tick for tick in MaxNLocator(4).tick_values(low, min(high, 1.0)) if low <= tick <= 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("accuracy on clean images")
    _finish(ax, f"blue: alpha {alpha:g}, with one standard deviation")
    ax.set_ylabel("accuracy on the task")
    return ax


def plot_stability(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rank correlation of each setting's profile with the reference's, beside the noise ceiling.

    Args:
        table: of `profile_stability`.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; filled: halves of the folds that share no validation image, with their interval; hollow: the same
        folds, which share their luck; dotted: the reference's own halves, the ceiling of the filled points.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(7.0, 1.5 + 0.42 * len(table)), layout="constrained")
    rows = table[::-1]  # the reference on top
    places = np.arange(len(rows))
    colours = [GREY if own else BLUE for own in rows["reference"]]
    ax.hlines(places, rows["halves_low"], rows["halves_high"], color=colours, linewidth=2)
    ax.scatter(rows["halves"], places, color=colours, s=46, zorder=3, label="different halves of the folds")
    others = ~rows["reference"].to_numpy()
    style = {"facecolors": "none", "edgecolors": ORANGE, "s": 46, "zorder": 4}
    ax.scatter(rows["spearman"][others], places[others], label="the same folds", **style)
    ceiling = float(table.loc[table["reference"], "halves"].iloc[0])
    ax.axvline(ceiling, color=GREY, linestyle=":", linewidth=1.5, label=f"noise ceiling {ceiling:.2f}")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, [f"{own.setting}{' (reference)' if own.reference else ''}" for own in rows.itertuples()])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("Spearman's rank correlation with the reference's profile")
    count = f"{int(table['n'].iloc[0])} blocks, {int(table['scores'].iloc[0])} scores each"
    ax.set_title(f"{count}; bars: bootstrap interval over blocks", fontsize=10)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(ax=ax)
    return ax


def _finish(ax: Axes, title: str) -> None:
    percent_axis(ax.yaxis)
    ax.set_ylabel("accuracy")
    ax.set_title(title, fontsize=10)
    sns.despine(ax=ax)


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
