"""Figures of merged networks: which rows go where, and accuracy against what a choice of blocks costs. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from subtuning_lab.plots import style
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Several, Text, checked

_WINDOWS = {0: style.GREEN, 1: style.BLUE, 2: style.ORANGE, 3: style.PURPLE}
_TRUNK = "original"
_TALL, _WIDE = 0.56, 0.72  # of a box, where lanes and columns are 1 apart


@checked(
    rows=Table(("tuned_by", "shared_by"), ("trunk", "frozen_rows", "tuned_rows")),
    tasks=Several(Text(), least=0),
    ax=style.AXES,
)
def plot_fork(rows: pd.DataFrame, tasks: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """A merged network from left to right: a lane for the frozen trunk, and one for each task from its fork on.

    A frozen part that several lanes share is one wide box over all of them; a task's own parts have its colour. The
    number of rows that each part works on, for one image, stands under it.

    Args:
        rows: of `MergedNetwork.rows_table` or `Schedule.table`.
        tasks: names in an order of your own; those that tune nothing are in no table, and must be named to be drawn.
    Source: PAPER "Efficient Multi-Task Inference".
    """
    forks, end = _forks(rows, tasks), len(rows)
    lanes = _lanes(forks, bool(rows["trunk"].any()))
    colours = {task: style.PALETTE[i % len(style.PALETTE)] for i, task in enumerate(forks)}
    depth = len(lanes)
    ax = style.axes_of(ax, *fork_size(rows, len(forks)))
    trunk_end = int(rows["trunk"].to_numpy().nonzero()[0].max()) + 1 if rows["trunk"].any() else 0
    last = end + 0.14 if rows["trunk"].iloc[-1] else trunk_end - 0.5
    ax.plot([-0.75, last], [0, 0], color=style.GREY, linewidth=2, zorder=1)
    for task, fork in forks.items():
        _draw_lane(ax, fork, lanes[task], end, colours[task])
    for x, (part, row) in enumerate(rows.iterrows()):
        _draw_part(ax, x, row, lanes, colours)
        ax.text(x, -0.62, part, ha="left", va="bottom", rotation=40, fontsize=8.5)
        images = row["frozen_rows"] + row["tuned_rows"]
        ax.text(x, depth - 0.28, str(images), ha="center", va="center", fontsize=11, weight="bold")
    _draw_readouts(ax, end, lanes, colours, bool(rows["trunk"].iloc[-1]))
    ax.text(-0.85, 0, "image", ha="right", va="center", fontsize=9)
    ax.text(-0.85, depth - 0.28, "rows\nper image", ha="right", va="center", fontsize=9)
    ax.set(xlim=(-1.6, end + 2.0), ylim=(depth + 0.1, -1.6))
    ax.set_title("grey: frozen, shared by the lanes it spans   coloured: a task's own", fontsize=9)
    ax.axis("off")
    return ax


def fork_size(rows: pd.DataFrame, n_tasks: int) -> tuple[float, float]:
    """Width and height in inches that `plot_fork` needs for so many tasks."""
    return max(7.0, 0.78 * (len(rows) + 3.6)), 0.95 + 0.62 * (n_tasks + 1.6)


@checked(
    table=Table(("blocks", "label"), ("accuracy", "error", "n")),
    x=Text(),
    xlabel=Is(str),
    chosen=Several(Text(), least=0, none=True),
    ax=style.AXES,
)
def plot_choices(
    table: pd.DataFrame, x: str, xlabel: str = "", chosen: Iterable[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Accuracy of each choice of blocks against what it costs, one colour for each number of tuned blocks.

    Args:
        table: rows with `blocks` (tuple), `label`, `accuracy`, `error` (its standard error), `n`, the column named by
            `x`, and quartiles of it in `x` + "_q25" and `x` + "_q75" where it is measured.
        x: the cost.
        xlabel: the cost in words; by default its name.
        chosen: blocks of the choice to ring and to name; none of them is linear probing, None rings nothing.
    Source: PAPER "Efficient Multi-Task Inference", accuracy against latency for consecutive blocks.
    """
    Table(numbers=(x,)).check("table", table)
    chosen = None if chosen is None else tuple(chosen)
    if chosen is not None and chosen not in set(table["blocks"]):
        raise ValueError(f"chosen is {chosen}; the table has no such blocks")
    ax = style.axes_of(ax, 7.0, 4.6)
    for width, group in table.groupby(table["blocks"].map(len)):
        label = "linear probing" if width == 0 else f"{width} block{'s' * (width > 1)}"
        colour = _WINDOWS.get(width, style.GREY)
        look = {"fmt": "o", "color": colour, "markersize": 5, "elinewidth": 0.8, "label": label}
        errors = {"yerr": style.spread_of(group, "error"), "xerr": _quartiles(group, x)}
        ax.errorbar(group[x], group["accuracy"], **errors, **look)
    if chosen is not None:
        _ring(ax, table[[blocks == chosen for blocks in table["blocks"]]].iloc[0], x)
    ax.set_xlabel(xlabel or x)
    ax.set_ylabel("validation accuracy")
    style.percent_axis(ax.yaxis)
    measured = "; horizontal: quartiles" if f"{x}_q25" in table else ""
    title = f"vertical bars: standard error, {style.count(table['n'])} scores each{measured}"
    return style.finish(ax, title, "beside")


class _Run(NamedTuple):
    """Neighbouring lanes."""

    first: int
    last: int


def _forks(rows: pd.DataFrame, tasks: Sequence[str]) -> dict[str, int]:
    """Task -> position of its first own part; behind the last part for those that have none."""
    forks: dict[str, int] = {}
    for x, tuned in enumerate(rows["tuned_by"]):
        for task in tuned:
            forks.setdefault(task, x)
    return {task: forks.get(task, len(rows)) for task in dict.fromkeys([*tasks, *forks])}


def _lanes(forks: Mapping[str, int], trunk: bool) -> dict[str | None, int]:
    """Lanes from the top: the trunk, then who forks last, so that no fork crosses a lane."""
    ordered = sorted(forks, key=lambda task: -forks[task])
    return {None: 0} | {task: lane for lane, task in enumerate(ordered, start=1)}


def _draw_lane(ax: Axes, fork: int, lane: int, end: int, colour: str) -> None:
    """A task's line, which leaves the trunk between two parts."""
    start, bend = fork - 0.5, 0.22
    points = [(start - bend, 0), (start, 0), (start, 0.3), (start, lane - 0.3), (start, lane), (start + bend, lane)]
    codes = [Path.MOVETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3]
    points, codes = [*points, (end + 0.14, lane)], [*codes, Path.LINETO]
    ax.add_patch(PathPatch(Path(points, codes), fc="none", ec=colour, linewidth=2, zorder=1))


def _draw_part(ax: Axes, x: int, row: pd.Series, lanes: Mapping[str | None, int], colours: Mapping[str, str]) -> None:
    shared = sorted(lanes[member] for member in [None] * bool(row["trunk"]) + list(row["shared_by"]))
    if shared:
        _box(ax, x, shared[0], shared[-1], style.LIGHT, width=0.2, zorder=2)  # what joins lanes that are no neighbours
    for run in _runs(shared):
        _box(ax, x, run.first, run.last, style.LIGHT, zorder=3)
    if len(shared) > 1:
        first = next(_runs(shared))
        ax.text(x, (first.first + first.last) / 2, f"×{len(shared)}", ha="center", va="center", fontsize=9, zorder=5)
    for task in row["tuned_by"]:
        _box(ax, x, lanes[task], lanes[task], colours[task], zorder=4)


def _runs(lanes: Sequence[int]) -> Iterator[_Run]:
    """Sorted lanes as runs of neighbours."""
    for group in np.split(np.array(lanes, int), np.flatnonzero(np.diff(lanes) > 1) + 1):
        if len(group):
            yield _Run(int(group[0]), int(group[-1]))


def _box(ax: Axes, x: float, first: int, last: int, colour: str, width: float = _WIDE, zorder: int = 3) -> None:
    corner, height = (x - width / 2, first - _TALL / 2), last - first + _TALL
    look = {"boxstyle": "round,pad=0,rounding_size=0.1", "linewidth": 0.8, "zorder": zorder}
    edge = style.GREY if colour == style.LIGHT else "white"
    ax.add_patch(FancyBboxPatch(corner, width, height, fc=colour, ec=edge, **look))


def _draw_readouts(
    ax: Axes, end: int, lanes: Mapping[str | None, int], colours: Mapping[str, str], trunk: bool
) -> None:
    for task, lane in lanes.items():
        if task is None and not trunk:
            continue
        ax.plot(end + 0.2, lane, "o", color=colours.get(task, style.GREY), markersize=9, zorder=4)
        ax.text(end + 0.42, lane, task or _TRUNK, ha="left", va="center", fontsize=9.5)


def _quartiles(group: pd.DataFrame, x: str) -> list[pd.Series] | None:
    if f"{x}_q25" not in group:
        return None
    return [(group[x] - group[f"{x}_q25"]).clip(lower=0), (group[f"{x}_q75"] - group[x]).clip(lower=0)]


def _ring(ax: Axes, row: pd.Series, x: str) -> None:
    ax.plot(row[x], row["accuracy"], "o", color="black", fillstyle="none", markersize=14, markeredgewidth=1.6)
    box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85}
    side = "right" if row[x] > sum(ax.get_xlim()) / 2 else "left"  # where there is room for a long name
    place = {"xytext": (-11 if side == "right" else 11, -15), "textcoords": "offset points", "ha": side}
    ax.annotate(row["label"], (row[x], row["accuracy"]), zorder=6, fontsize=9, weight="bold", bbox=box, **place)
