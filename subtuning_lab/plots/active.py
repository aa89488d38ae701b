"""Figures of active learning. Tables in, matplotlib Axes out. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import AutoLocator

from subtuning_lab.plots.comparison import plot_curves


def plot_strategies(summary: pd.DataFrame, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Test accuracy against the number of labels, a panel for each method and a line for each strategy.

    Args:
        summary: of `summarize_queries`.
        axes: where to draw, one for each method; a new figure by default.

    Returns:
        The axes, in the methods' order; bands are one standard deviation over repetitions.

    Raises:
        ValueError: another number of axes than of methods.
    """
    methods = list(dict.fromkeys(summary["method"]))
    if axes is None:
        size = (3.6 * len(methods) + 1.0, 3.8)
        _, grid = plt.subplots(1, len(methods), figsize=size, squeeze=False, layout="constrained")
        axes = grid[0]
    if len(axes) != len(methods):
        raise ValueError(f"{len(axes)} axes for {len(methods)} methods: {', '.join(methods)}")
    for method, ax in zip(methods, axes, strict=True):
        own = summary[summary["method"] == method]
        plot_curves(own.assign(method=own["strategy"]), ax=ax)
        ax.set_xlabel("labelled images")
        ax.set_ylabel("test accuracy")
        ax.set_title(f"{method}\n{ax.get_title()}", fontsize=10)
        if ax is not axes[-1]:
            ax.get_legend().remove()
        ax.label_outer()
    _share_accuracies(axes)
    return list(axes)


def _share_accuracies(axes: Sequence[Axes]) -> None:
    """Gives panels one range; each was drawn for its own, which sharing from the start would impose on the others."""
    limits = [limit for ax in axes for limit in ax.get_ylim()]
    low, high = min(limits), max(limits)
    for ax in axes:
        ax.set_yticks([tick for tick in AutoLocator().tick_values(low, high) if low <= tick <= min(1.0, high)])
        ax.set_ylim(low, high)
