"""Figures of profiles and of networks: which blocks are worth tuning, and what they cost. Tables in, Axes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import PercentFormatter

from subtuning_lab.plots import style
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked

_REFERENCES = {LINEAR_PROBING: (style.GREEN, "--"), FULL_FINETUNING: (style.ORANGE, "-.")}
_COSTS = {
    "trunk": (style.LIGHT, "frozen forward"),
    "forward": (style.PALE_BLUE, "forward from the first tuned part on"),
    "backward": (style.BLUE, "backward"),
}
_MOST_WORDS = 24  # rows of a heat map whose cells have room for a number


@checked(highlight=Several(Text(), least=0), ax=style.AXES)
def plot_profile(
    profile: Profile, highlight: Iterable[str] = (), parameters: bool = True, ax: Axes | None = None
) -> Axes:
    """Accuracy of each tuned block or window against its position, with the two references as lines.

    Args:
        profile: of `finetuning_profile`.
        highlight: names of chosen blocks; their bars stand out.
        parameters: whether to write each subset's parameter count into its bar.
    Returns:
        The axes; error bars and bands are one standard deviation over seeds and folds.
    Source: PAPER Figure 1 (left).
    """
    rows = profile.table[profile.table["kind"] == "blocks"]
    if rows.empty:
        raise ValueError("the profile has no blocks to plot")
    known = dict.fromkeys(name for blocks in profile.table["blocks"] for name in blocks)
    if unknown := [name for name in highlight if name not in known]:
        raise ValueError(f"highlight names {unknown[0]}, which is not in the profile; it has {', '.join(known)}")
    ax = style.axes_of(ax, profile_width(len(rows)), 4.2)
    chosen, places = set(highlight), np.arange(len(rows))
    colours = [style.BLUE if not chosen or chosen >= set(blocks) else style.PALE_BLUE for blocks in rows["blocks"]]
    ax.bar(places, rows["accuracy"], yerr=style.spread_of(rows), color=colours, capsize=3, ecolor=style.DARK, width=0.7)
    _draw_references(ax, profile.table)
    ax.set_xticks(places, rows["label"], rotation=45, ha="right")
    kind = "block" if profile.window == 1 else f"window of {profile.window} blocks"
    ax.set_xlabel(f"tuned {kind}, from input to output; in the bars: tuned parameters")
    ax.set_ylabel("validation accuracy")
    style.percent_axis(ax.yaxis)
    ax.set_ylim(_lower_limit(profile.table), _upper_limit(profile.table))
    if parameters:
        _write_counts(ax, rows, colours)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False, fontsize=9)
    n = style.count(profile.table["n"])
    return style.finish(ax, f"{profile.title}\nmean and standard deviation of {n} scores each")


@checked(ax=style.AXES)
def plot_pairs(pairs: Profile, ax: Axes | None = None) -> Axes:
    """Heat map of the accuracy of every pair of blocks; single blocks on the diagonal, the best pair framed.

    Args:
        pairs: of `pair_profile`.
    """
    rows = pairs.table[pairs.table["kind"] == "blocks"]
    names = [blocks[0] for blocks in rows["blocks"] if len(blocks) == 1]
    doubles = rows[rows["blocks"].map(len) == 2].sort_values("accuracy")["blocks"]
    if doubles.empty or len(names) * (len(names) - 1) != 2 * len(doubles):
        raise ValueError(f"pairs is a profile of {pairs.window} blocks at once; it must be one of pair_profile")
    matrix = pd.DataFrame(np.nan, index=names, columns=names)
    for blocks, accuracy in zip(rows["blocks"], rows["accuracy"], strict=True):
        matrix.loc[blocks[-1], blocks[0]] = accuracy
    side = 2.2 + 0.45 * min(len(names), _MOST_WORDS)
    ax = style.axes_of(ax, side + 1, side)
    words = matrix.map(lambda share: "" if pd.isna(share) else f"{100 * share:.0f}")
    bar = {"label": "validation accuracy", "format": PercentFormatter(1.0, decimals=0)}
    look = {"fmt": "", "cmap": "cividis", "square": True, "cbar_kws": bar, "linewidths": 0.5}
    sns.heatmap(matrix, annot=words if len(names) <= _MOST_WORDS else None, ax=ax, **look)
    best = doubles.iloc[-1]
    corner = (names.index(best[0]), names.index(best[1]))
    ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=style.ORANGE, linewidth=3))
    ax.set_xlabel("first tuned block")
    ax.set_ylabel("second tuned block (diagonal: one block alone)")
    n = style.count(pairs.table["n"])
    ax.set_title(f"{pairs.title}\nmean of {n} scores each, in percent; best pair framed", fontsize=10)
    return ax


@checked(part_names=Several(Text(), unique=True), tuned=Several(Text(), least=0), ax=style.AXES)
def plot_network(
    part_names: Sequence[str], tuned: Iterable[str] = (), counts: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """The network as a row of boxes, tuned parts coloured, frozen ones grey.

    Args:
        part_names: from input to output.
        tuned: names of the tuned parts.
        counts: parameters of every part, written under its name.
    """
    Several(Whole(), least=len(part_names), none=True).check("counts", counts)
    if counts is not None and len(counts) != len(part_names):
        raise ValueError(f"counts has {len(counts)} numbers for {len(part_names)} parts")
    if unknown := [name for name in tuned if name not in part_names]:
        raise ValueError(f"tuned names {unknown[0]}; the parts are {', '.join(part_names)}")
    ax = style.axes_of(ax, network_width(part_names), 1.7)
    tuned, names = set(tuned), [*part_names, "readout"]
    labels = [_human(number) for number in counts] + ["new"] if counts is not None else [""] * len(names)
    for x, (name, label) in enumerate(zip(names, labels, strict=True)):
        colour = style.BLUE if name in tuned else style.GREEN if name == "readout" else style.LIGHT
        ink = "black" if colour == style.LIGHT else "white"
        ax.add_patch(FancyBboxPatch((x + 0.12, 0.1), 0.7, 0.8, boxstyle="round,pad=0.04", fc=colour, ec=style.GREY))
        for height, text in ((0.62, name), (0.32, label)):
            ax.text(x + 0.47, height, text, ha="center", va="center", fontsize=7.5, color=ink)
    ax.set(xlim=(0, len(names)), ylim=(-0.05, 1.05))
    ax.set_title("blue: tuned   green: new readout   grey: frozen, with its parameters", fontsize=9)
    ax.axis("off")
    return ax


def network_width(names: Sequence[str]) -> float:
    """Inches that `plot_network` needs."""
    return max(6.0, 0.95 * (len(names) + 1))


def profile_width(bars: int) -> float:
    """Inches that `plot_profile` needs."""
    return max(6.0, 1.2 + 0.62 * bars)


@checked(ax=style.AXES)
def plot_tried(profile: Profile, tried: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The profile figure with further bars, in a colour of their own, for subsets that were tried by hand.

    Args:
        profile: of `finetuning_profile`.
        tried: rows with the columns of `Profile.table`; may be empty.
    """
    if tried.empty:
        return plot_profile(profile, ax=ax)
    rows = tried.assign(kind="blocks")
    ax = plot_profile(replace(profile, table=pd.concat([profile.table, rows])), ax=ax)
    bars = next(drawn for drawn in ax.containers if isinstance(drawn, BarContainer)).patches
    for bar in bars[-len(rows) :]:
        bar.set_color(style.PURPLE)
    ax.axvline(len(bars) - len(rows) - 0.5, color=style.GREY, linewidth=0.8, linestyle=":")
    # Labels of several blocks may be long: upright, a line for each block.
    labels = [label.get_text() for label in ax.get_xticklabels()]
    ax.set_xticks(ax.get_xticks(), labels[: -len(rows)] + [_wrapped(label) for label in labels[-len(rows) :]])
    for label in ax.get_xticklabels()[-len(rows) :]:
        label.set(rotation=90, ha="center", fontsize=8.5)
    ax.set_xlabel(f"{ax.get_xlabel()}\npurple: tried by hand")
    return ax


@checked(ax=Is("Axes"), tables=Is(Iterable))
def share_limits(ax: Axes, tables: Iterable[pd.DataFrame]) -> Axes:
    """Gives a profile figure the accuracy axis that fits all of several profiles' tables, so that they compare.

    Args:
        ax: of `plot_profile`.
        tables: at least one `Profile.table`.
    """
    tables = list(tables)
    Several(Is("DataFrame")).check("tables", tables)
    bottom, top = min(map(_lower_limit, tables)), max(map(_upper_limit, tables))
    for text in ax.texts:  # the parameter counts stand at the foot of the bars
        text.set_y(bottom + 0.02 * (top - bottom))
    ax.set_ylim(bottom, top)
    return ax


def plot_flops(costs: Mapping[str, Mapping[str, int]], ax: Axes | None = None) -> Axes:
    """Stacked bars of what a training step costs per image; the last row counts as 100 %.

    Args:
        costs: label -> what `training_flops` gives.
    """
    ax = style.axes_of(ax, 9.0, 0.7 + 0.4 * len(costs))
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
    """
    shown = np.unique(np.linspace(0, len(classes) - 1, min(10, len(classes))).round().astype(int))
    height, width = images.shape[1] + 2, images.shape[2] + 2
    sheet = np.full((per_class * height, len(shown) * width, 3), 255, np.uint8)
    for column, label in enumerate(shown):
        for row, image in enumerate(images[labels == label][:per_class]):
            sheet[row * height + 1 : (row + 1) * height - 1, column * width + 1 : (column + 1) * width - 1] = image
    ax = style.axes_of(ax, 0.85 * len(shown), 0.85 * per_class + 0.5)
    ax.imshow(sheet, interpolation="nearest")
    ax.set_xticks((np.arange(len(shown)) + 0.5) * width, [classes[label] for label in shown], fontsize=8)
    ax.set_yticks([])
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def _draw_references(ax: Axes, table: pd.DataFrame) -> None:
    for kind, (colour, line) in _REFERENCES.items():
        rows = table[table["kind"] == kind]
        for mean, std, spread in zip(rows["accuracy"], rows["std"], style.spread_of(rows), strict=True):
            label = f"{kind}: {style.percent(mean, std)}"
            ax.axhline(mean, color=colour, linestyle=line, linewidth=1.8, label=label)
            ax.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)


def _write_counts(ax: Axes, rows: pd.DataFrame, colours: Sequence[str]) -> None:
    bottom, top = ax.get_ylim()
    for x, (number, colour) in enumerate(zip(rows["params"], colours, strict=True)):
        ink = "white" if colour == style.BLUE else "black"
        at = bottom + 0.02 * (top - bottom)
        ax.text(x, at, _human(number), ha="center", va="bottom", rotation=90, fontsize=7.5, color=ink)


def _lower_limit(table: pd.DataFrame) -> float:
    """Zero, unless all the action is far above it."""
    lowest = (table["accuracy"] - style.spread_of(table)).min()
    return 0.0 if not lowest >= 0.6 else float(np.floor(10 * (lowest - 0.12)) / 10)


def _upper_limit(table: pd.DataFrame) -> float:
    highest = (table["accuracy"] + style.spread_of(table)).max()
    return min(1.0, float(highest) + 0.04) if highest > 0 else 1.0


def _human(number: float) -> str:
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:.3g} {unit}"
    return str(int(number))


def _wrapped(label: str) -> str:
    """A subset's label with each of its blocks on a line of its own."""
    return label.replace(" + ", " +\n").replace(" ... ", " ...\n").replace(" (", "\n(")
