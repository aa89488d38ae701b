"""Figures of ablations. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.plots import style
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Real, checked

_IMAGES = {
    "target": (style.BLUE, "o", "-", "the task (validation images)"),
    "clean": (style.ORANGE, "s", "--", "clean images"),
}
INTERPOLATION = Table(("images",), ("alpha", "accuracy", "std", "n"))
_STABILITY = Table(("setting", "reference"), ("spearman", "halves", "halves_low", "halves_high", "n", "scores"))


@checked(summary=Table(("subset", "method"), ("accuracy", "std", "n")), ax=style.AXES)
def plot_variants(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy of every variant against the tuned subset, in the order of the table.

    Args:
        summary: of `summarize_variants`.
    Returns:
        The axes; bars are one standard deviation over repetitions.
    """
    subsets = list(dict.fromkeys(summary["subset"]))
    ax = style.axes_of(ax, max(6.0, 1.6 + 0.62 * len(subsets)), 3.8)
    methods = list(dict.fromkeys(summary["method"]))
    for number, method in enumerate(methods):
        rows = summary[summary["method"] == method].set_index("subset").reindex(subsets)
        places = np.arange(len(subsets)) + 0.14 * (number - (len(methods) - 1) / 2)
        colour, marker = style.PALETTE[number % 7], style.MARKERS[number % 7]
        look = {"color": colour, "marker": marker, "linewidth": 1.2, "elinewidth": 1, "capsize": 2.5}
        ax.errorbar(places, rows["accuracy"], yerr=style.spread_of(rows), label=method, **look)
    turned = {"rotation": 45, "ha": "right"} if len(subsets) > 4 else {}
    ax.set_xticks(range(len(subsets)), subsets, **turned)
    ax.set_xlabel("tuned subset")
    style.accuracy_axis(ax)
    return style.finish(ax, f"mean and one standard deviation over repetitions; {style.count(summary['n'])}", "inside")


@checked(differences=Table(("subset", "variant"), ("difference", "error", "n")), ax=style.AXES)
def plot_differences(differences: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How far variants are ahead of what they are compared with, a line per row of the table.

    Args:
        differences: of `variant_differences`; several tables may stand below each other.
    Returns:
        The axes; thick bars are one standard error of the paired difference, thin ones two.
    """
    ax = style.axes_of(ax, 7.0, 1.1 + 0.34 * len(differences))
    rows = differences[::-1]  # the first row on top
    tuned, changed = (differences[name].nunique() > 1 for name in ("subset", "variant"))
    if tuned and changed:
        labels = [f"{row.variant}, {row.subset}" for row in rows.itertuples()]
    else:
        labels = list(rows["subset"] if tuned else rows["variant"])
    places, error = np.arange(len(rows)), style.spread_of(rows, "error")
    clear = rows["difference"].abs() > 2 * rows["error"]
    colours = np.where(~clear, style.GREY, np.where(rows["difference"] > 0, style.BLUE, style.ORANGE))
    ax.hlines(places, rows["difference"] - 2 * error, rows["difference"] + 2 * error, color=colours, linewidth=1)
    ax.hlines(places, rows["difference"] - error, rows["difference"] + error, color=colours, linewidth=4)
    ax.scatter(rows["difference"], places, color=colours, s=40, zorder=3)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, labels)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    style.percent_axis(ax.xaxis)
    ax.set_xlabel("difference in accuracy" if changed else f"{rows['variant'].iloc[0]}: difference in accuracy")
    return style.finish(ax, f"paired differences with one and two standard errors; {style.count(differences['n'])}")


@checked(summary=INTERPOLATION, alpha=Real(none=True), ax=style.AXES)
def plot_interpolation(summary: pd.DataFrame, alpha: float | None = None, ax: Axes | None = None) -> Axes:
    """Accuracy on the task and on clean images along the way from the pretrained blocks to the tuned ones.

    Args:
        summary: of `summarize_interpolation`.
        alpha: draws a line there.
    Returns:
        The axes; bands are one standard deviation.
    Source: Wortsman et al. (WiSE-FT, 2022).
    """
    check_kinds(summary)
    ax = style.axes_of(ax, 6.4, 3.8)
    for images, (colour, marker, line, label) in _IMAGES.items():
        rows = summary[summary["images"] == images].sort_values("alpha")
        look = {"color": colour, "marker": marker, "label": f"{label}, {style.count(rows['n'])}"}
        ax.plot(rows["alpha"], rows["accuracy"], line, **look)
        style.band(ax, rows["alpha"], rows["accuracy"], style.spread_of(rows), colour)
    if alpha is not None:
        ax.axvline(alpha, color=style.GREY, linestyle=":", linewidth=1.5)
    ax.set_xlabel("alpha: 0 pretrained blocks, 1 tuned blocks")
    style.accuracy_axis(ax)
    return style.finish(ax, "mean; bands: one standard deviation", "inside")


@checked(summary=INTERPOLATION, alpha=Real(), ax=style.AXES)
def plot_alphas(summary: pd.DataFrame, alpha: float, ax: Axes | None = None) -> Axes:
    """What each alpha keeps of the clean images, against what it brings on the task; the best corner is top right.

    Args:
        summary: of `summarize_interpolation`.
        alpha: its point is filled.
    """
    check_kinds(summary)
    wide = summary.pivot(index="alpha", columns="images", values=["accuracy", "std"]).sort_index()
    if alpha not in wide.index:
        raise ValueError(f"alpha is {alpha}; the table has {', '.join(f'{each:g}' for each in wide.index)}")
    ax = style.axes_of(ax, 5.0, 3.8)
    means, spread = wide["accuracy"], wide["std"].fillna(0)
    ax.plot(means["clean"], means["target"], color=style.GREY, marker="o", fillstyle="none", linewidth=1)
    for end in (means.index[0], means.index[-1]):
        at = (means.loc[end, "clean"], means.loc[end, "target"])
        ax.annotate(f"alpha {end:g}", at, xytext=(4, 6), textcoords="offset points", fontsize=8.5)
    point, error = means.loc[alpha], spread.loc[alpha]
    look = {"fmt": "o", "color": style.BLUE, "markersize": 9, "capsize": 3, "elinewidth": 1}
    ax.errorbar(point["clean"], point["target"], xerr=error["clean"], yerr=error["target"], **look)
    ax.margins(0.12)
    low, high = ax.get_xlim()  # of a few points perhaps: few ticks, as long as they must be, none above 100 %
    ax.set_xticks([tick for tick in MaxNLocator(4).tick_values(low, min(high, 1.0)) if low <= tick <= 1.0])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("accuracy on clean images")
    style.accuracy_axis(ax, "accuracy on the task")
    return style.finish(ax, f"blue: alpha {alpha:g}, with one standard deviation")


def check_kinds(summary: pd.DataFrame) -> None:
    """Raises ValueError unless a table of `summarize_interpolation` tells of both kinds of images, each point once."""
    absent = [name for name in _IMAGES if name not in set(summary["images"])]
    if absent:
        raise ValueError(f"summary has no rows of {absent[0]} images; it must be of summarize_interpolation")
    if summary.duplicated(["alpha", "images"]).any():
        raise ValueError("summary has an alpha twice for the same images; give one curve at a time")


@checked(table=_STABILITY, ax=style.AXES)
def plot_stability(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rank correlation of each setting's profile with the reference's, beside the noise ceiling.

    Args:
        table: of `profile_stability`.
    Returns:
        The axes; filled: halves of the folds that share no validation image, with their interval; hollow: the same
        folds, which share their luck; dotted: the reference's own halves, the ceiling of the filled points.
    """
    if table["reference"].sum() != 1:
        raise ValueError(f"table has {table['reference'].sum()} references; it must have one")
    ax = style.axes_of(ax, 7.0, 1.5 + 0.42 * len(table))
    rows = table[::-1]  # the reference on top
    places = np.arange(len(rows))
    colours = [style.GREY if reference else style.BLUE for reference in rows["reference"]]
    ax.hlines(places, rows["halves_low"], rows["halves_high"], color=colours, linewidth=2)
    ax.scatter(rows["halves"], places, color=colours, s=46, zorder=3, label="different halves of the folds")
    others = ~rows["reference"].to_numpy()
    look = {"facecolors": "none", "edgecolors": style.ORANGE, "s": 46, "zorder": 4}
    ax.scatter(rows["spearman"][others], places[others], label="the same folds", **look)
    ceiling = float(table.loc[table["reference"], "halves"].iloc[0])
    ax.axvline(ceiling, color=style.GREY, linestyle=":", linewidth=1.5, label=f"noise ceiling {ceiling:.2f}")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, [f"{row.setting}{' (reference)' if row.reference else ''}" for row in rows.itertuples()])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("Spearman's rank correlation with the reference's profile")
    of = f"{int(table['n'].iloc[0])} blocks, {int(table['scores'].iloc[0])} scores each"
    return style.finish(ax, f"{of}; bars: bootstrap interval over blocks", "beside")
