"""Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.container import BarContainer
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile

# Okabe and Ito's palette, which stays apart for colour-blind eyes.
BLUE, PALE_BLUE, ORANGE, GREEN = "#0072B2", "#9CC3DD", "#D55E00", "#009E73"
GREY, LIGHT = "#666666", "#DDDDDD"
PURPLE = "#AA4499"
_REFERENCES = {LINEAR_PROBING: (GREEN, "--"), FULL_FINETUNING: (ORANGE, "-.")}
_COSTS = {
    "trunk": (LIGHT, "frozen forward"),
    "forward": (PALE_BLUE, "forward from the first tuned part on"),
    "backward": (BLUE, "backward"),
}


def percent_axis(axis: Axis) -> None:
    """Shows shares as percents, at places where none has to be rounded."""
    axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def plot_profile(
    profile: Profile, highlight: Iterable[str] = (), parameters: bool = True, ax: Axes | None = None
) -> Axes:
    """Accuracy of each tuned block or window against its position, with the two references as lines.

    Args:
        profile: of `finetuning_profile`.
        highlight: names of chosen blocks; their bars stand out.
        parameters: whether to write each subset's parameter count into its bar.
        ax: where to draw; a new figure by default.

    Returns:
        The axes; error bars and bands are one standard deviation over seeds and folds.

    Raises:
        ValueError: an empty profile.

    Source: PAPER Figure 1 (left).
    """
    rows = profile.table[profile.table["kind"] == "blocks"]
    if rows.empty:
        raise ValueError("the profile has no blocks to plot")
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.0, 1.2 + 0.62 * len(rows)), 4.2), layout="constrained")
    chosen = set(highlight)
    places = np.arange(len(rows))
    colours = [BLUE if not chosen or chosen >= set(blocks) else PALE_BLUE for blocks in rows["blocks"]]
    ax.bar(places, rows["accuracy"], yerr=rows["std"].fillna(0), color=colours, capsize=3, ecolor="#333333", width=0.7)
    _draw_references(ax, profile.table)
    ax.set_xticks(places, rows["label"], rotation=45, ha="right")
    kind = "block" if profile.window == 1 else f"window of {profile.window} blocks"
    ax.set_xlabel(f"tuned {kind}, from input to output; in the bars: tuned parameters")
    ax.set_ylabel("validation accuracy")
    percent_axis(ax.yaxis)
    ax.set_ylim(_lower_limit(profile.table), _upper_limit(profile.table))
    if parameters:
        _write_counts(ax, rows, colours)
    ax.set_title(f"{profile.title}\nmean and standard deviation of {_counts(profile.table)} scores each", fontsize=10)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax


def plot_pairs(pairs: Profile, ax: Axes | None = None) -> Axes:
    """Heat map of the accuracy of every pair of blocks; single blocks on the diagonal, the best pair framed.

    Args:
        pairs: of `pair_profile`.
        ax: where to draw; a new figure by default.
    """
    rows = pairs.table[pairs.table["kind"] == "blocks"]
    names = [blocks[0] for blocks in rows["blocks"] if len(blocks) == 1]
    matrix = pd.DataFrame(np.nan, index=names, columns=names)
    for blocks, accuracy in zip(rows["blocks"], rows["accuracy"], strict=True):
        matrix.loc[blocks[-1], blocks[0]] = accuracy
    if ax is None:
        side = 3.0 + 0.55 * len(names)
        _, ax = plt.subplots(figsize=(side + 1, side), layout="constrained")
    annotations = (100 * matrix).round(0).astype(object)
    annotations = annotations.map(lambda value: "" if pd.isna(value) else f"{value:.0f}")
    bar = {"label": "validation accuracy", "format": PercentFormatter(1.0, decimals=0)}
    sns.heatmap(matrix, annot=annotations, fmt="", cmap="cividis", square=True, ax=ax, cbar_kws=bar, linewidths=0.5)
    best = rows[rows["blocks"].map(len) == 2].sort_values("accuracy")["blocks"].iloc[-1]
    corner = (names.index(best[0]), names.index(best[1]))
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=ORANGE, linewidth=3))
    ax.set_xlabel("first tuned block")
    ax.set_ylabel("second tuned block (diagonal: one block alone)")
    count = _counts(pairs.table)
    ax.set_title(f"{pairs.title}\nmean of {count} scores each, in percent; best pair framed", fontsize=10)
    return ax


def plot_network(
    part_names: Sequence[str], tuned: Iterable[str] = (), counts: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """The network as a row of boxes, tuned parts coloured, frozen ones grey.

    Args:
        part_names: from input to output.
        tuned: names of the tuned parts.
        counts: parameters of every part, written under its name.
        ax: where to draw; a new figure by default.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6.0, 0.95 * (len(part_names) + 1)), 1.7), layout="constrained")
    tuned, names = set(tuned), [*part_names, "readout"]
    labels = [_human(count) for count in counts] + ["new"] if counts is not None else [""] * len(names)
    for x, (name, label) in enumerate(zip(names, labels, strict=True)):
        trained = name in tuned or name == "readout"
        colour = BLUE if name in tuned else GREEN if name == "readout" else LIGHT
        ax.add_patch(FancyBboxPatch((x + 0.12, 0.1), 0.7, 0.8, boxstyle="round,pad=0.04", fc=colour, ec=GREY))
        ink = "white" if trained else "black"
        ax.text(x + 0.47, 0.62, name, ha="center", va="center", fontsize=7.5, color=ink)
        ax.text(x + 0.47, 0.32, label, ha="center", va="center", fontsize=7.5, color=ink)
    ax.set(xlim=(0, len(names)), ylim=(-0.05, 1.05))
    ax.set_title("blue: tuned   green: new readout   grey: frozen, with its parameters", fontsize=9)
    ax.axis("off")
    return ax


def _draw_references(ax: Axes, table: pd.DataFrame) -> None:
    for kind, (colour, style) in _REFERENCES.items():
        for _, row in table[table["kind"] == kind].iterrows():
            spread = 0.0 if pd.isna(row["std"]) else row["std"]
            label = f"{kind}: {row['accuracy']:.1%} ± {spread:.1%}"
            ax.axhline(row["accuracy"], color=colour, linestyle=style, linewidth=1.8, label=label)
            ax.axhspan(row["accuracy"] - spread, row["accuracy"] + spread, color=colour, alpha=0.12, linewidth=0)


def _write_counts(ax: Axes, rows: pd.DataFrame, colours: Sequence[str]) -> None:
    bottom, top = ax.get_ylim()
    for x, (count, colour) in enumerate(zip(rows["params"], colours, strict=True)):
        ink = "white" if colour == BLUE else "black"
        at = bottom + 0.02 * (top - bottom)
        ax.text(x, at, _human(count), ha="center", va="bottom", rotation=90, fontsize=7.5, color=ink)


def _lower_limit(table: pd.DataFrame) -> float:
    """Zero, unless all the action is far above it."""
    lowest = (table["accuracy"] - table["std"].fillna(0)).min()
    return 0.0 if lowest < 0.6 else float(np.floor(10 * (lowest - 0.12)) / 10)


def _upper_limit(table: pd.DataFrame) -> float:
    return min(1.0, float((table["accuracy"] + table["std"].fillna(0)).max()) + 0.04)


def _counts(table: pd.DataFrame) -> str:
    low, high = int(table["n"].min()), int(table["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _human(count: int) -> str:
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= bound:
            return f"{count / bound:.3g} {unit}"
    return str(int(count))


def plot_tried(profile: Profile, tried: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The profile figure with further bars, in a colour of their own, for subsets that were tried by hand.

    Args:
        profile: of `finetuning_profile`.
        tried: rows with the columns of `Profile.table`; may be empty.
        ax: where to draw; a new figure by default.
    """
    if tried.empty:
        return plot_profile(profile, ax=ax)
    rows = tried.assign(kind="blocks")
    ax = plot_profile(replace(profile, table=pd.concat([profile.table, rows])), ax=ax)
    bars = next(drawn for drawn in ax.containers if isinstance(drawn, BarContainer)).patches
    for bar in bars[-len(rows) :]:
        bar.set_color(PURPLE)
    ax.axvline(len(bars) - len(rows) - 0.5, color=GREY, linewidth=0.8, linestyle=":")
    for label in ax.get_xticklabels()[-len(rows) :]:  # these may be long: upright, a line for each block
        label.set(text=_wrapped(label.get_text()), rotation=90, ha="center", fontsize=8.5)
    ax.set_xlabel(f"{ax.get_xlabel()}\npurple: tried by hand")
    return ax


def share_limits(ax: Axes, tables: Iterable[pd.DataFrame]) -> Axes:
    """Gives a profile figure the accuracy axis that fits all of several profiles' tables, so that they compare."""
    tables = list(tables)
    bottom, top = min(map(_lower_limit, tables)), max(map(_upper_limit, tables))
    for text in ax.texts:  # the parameter counts stand at the foot of the bars
        text.set_y(bottom + 0.02 * (top - bottom))
    ax.set_ylim(bottom, top)
    return ax


def plot_flops(costs: Mapping[str, Mapping[str, int]], ax: Axes | None = None) -> Axes:
    """Stacked bars of what a training step costs per image; the last row counts as 100 %.

    Args:
        costs: label -> what `training_flops` gives.
        ax: where to draw; a new figure by default.
    """
    if ax is None:
        _, ax = plt.subplots(figsize=(9.0, 0.7 + 0.4 * len(costs)), layout="constrained")
    table = pd.DataFrame(costs).T[::-1]  # the first row on top
    left = np.zeros(len(table))
    for part, (colour, label) in _COSTS.items():
        ax.barh(table.index, table[part], left=left, color=colour, label=label, height=0.7)
        left += table[part].to_numpy()
    whole = left[0]
    for place, (name, total) in enumerate(zip(table.index, left, strict=True)):
        text = f"{name}: {_human(total)}FLOPs per image, {total / whole:.0%}"
        ax.text(total + 0.01 * whole, place, text, va="center", fontsize=8.5)
    ax.set_xlim(0, 1.4 * max(left))
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.02), ncols=3, frameon=False, fontsize=8.5, borderpad=0)
    ax.axis("off")
    return ax


def plot_examples(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], per_class: int = 3, ax: Axes | None = None
) -> Axes:
    """Example images, a column for each of up to ten classes; a gap where a class has no further image.

    Args:
        images: uint8 (n, height, width, 3).
        labels: whole numbers (n,).
        classes: names; label i means classes[i].
        per_class: images in a column.
        ax: where to draw; a new figure by default.
    """
    shown = np.unique(np.linspace(0, len(classes) - 1, min(10, len(classes))).round().astype(int))
    height, width = images.shape[1] + 2, images.shape[2] + 2
    sheet = np.full((per_class * height, len(shown) * width, 3), 255, np.uint8)
    for column, label in enumerate(shown):
        for row, image in enumerate(images[labels == label][:per_class]):
            sheet[row * height + 1 : (row + 1) * height - 1, column * width + 1 : (column + 1) * width - 1] = image
    if ax is None:
        _, ax = plt.subplots(figsize=(0.85 * len(shown), 0.85 * per_class + 0.5), layout="constrained")
    ax.imshow(sheet, interpolation="nearest")
    ax.set_xticks((np.arange(len(shown)) + 0.5) * width, [classes[label] for label in shown], fontsize=8)
    ax.set_yticks([])
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def _wrapped(label: str) -> str:
    """A subset's label with each of its blocks on a line of its own."""
    return label.replace(" + ", " +\n").replace(" ... ", " ...\n").replace(" (", "\n(")
