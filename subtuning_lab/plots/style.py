"""One look for all figures: colours, axes, and how numbers are written. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, PercentFormatter

from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is

# Okabe and Ito's palette, which stays apart for colour-blind eyes.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#56B4E9"
BLACK, DARK, GREY, LIGHT, PALE_BLUE = "#000000", "#333333", "#666666", "#DDDDDD", "#9CC3DD"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, BLACK)
MARKERS = "osD^vP*X<>"
#: methods that are drawn in a colour of their own wherever they occur
METHOD_COLOURS = {
    LINEAR_PROBING: GREEN,
    FULL_FINETUNING: ORANGE,
    "greedy": BLUE,
    "SubTuning": BLUE,
    "LP-FT": PURPLE,
}
_OTHER_METHODS = (YELLOW, SKY, BLACK, GREY, PALE_BLUE)
_WIDEST = 16.0  # inches; what is wider is shrunk until nobody can read it

AXES = Is("Axes", none=True)
SCORED = Table(("method",), ("accuracy", "std", "n"))


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=(min(width, _WIDEST), height), layout="constrained")[1]


def finish(ax: Axes, title: str, legend: str = "") -> Axes:
    """Title, no frame, and a legend "beside" the axes or "inside"."""
    ax.set_title(title, fontsize=10)
    if legend:
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if legend == "beside" else {}
        ax.legend(frameon=False, fontsize=8.5, **place)
    sns.despine(ax=ax)
    return ax


def percent_axis(axis: Axis) -> None:
    """Shows shares as percents, at places where none has to be rounded."""
    axis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def accuracy_axis(ax: Axes, label: str = "accuracy") -> None:
    """A vertical axis in percent, once all is drawn; error bars may reach above 100, ticks don't."""
    ax.set_ylabel(label)
    percent_axis(ax.yaxis)
    limits = ax.get_ylim()
    ax.set_yticks([tick for tick in ax.get_yticks() if limits[0] <= tick <= min(1.0, limits[1])])
    ax.set_ylim(limits)


def percent(mean: float, spread: float = np.nan, decimals: int = 1) -> str:
    """A share as text, with its standard deviation where there is one: "95.5% ± 3.9%"."""
    if pd.isna(mean):
        return "not available"
    return f"{mean:.{decimals}%}" + ("" if pd.isna(spread) else f" ± {spread:.{decimals}%}")


def count(n: pd.Series | Sequence[int]) -> str:
    """How many scores stand behind numbers: "n = 3", or "n = 3 to 6"."""
    low, high = int(min(n)), int(max(n))
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def spread_of(rows: pd.DataFrame, column: str = "std") -> pd.Series:
    """Lengths of error bars; one score has none."""
    return rows[column].fillna(0.0)


def band(ax: Axes, x: pd.Series, mean: pd.Series, spread: pd.Series, colour: str) -> None:
    """A pale band around a line."""
    ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)


def method_styles(methods: Iterable[str]) -> list[tuple[str, str]]:
    """A colour and a marker per different method, in order; the known ones have their own colour."""
    different, others = list(dict.fromkeys(methods)), iter(_OTHER_METHODS * 9)
    colours = {method: METHOD_COLOURS[method] if method in METHOD_COLOURS else next(others) for method in different}
    return [(colours[method], MARKERS[i % len(MARKERS)]) for i, method in enumerate(different)]
