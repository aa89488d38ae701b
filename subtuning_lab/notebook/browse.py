"""Panels for finished searches: what another epsilon would have chosen."""

from __future__ import annotations

import math

import ipywidgets as widgets
from matplotlib.axes import Axes

from subtuning_lab.notebook.panel import Panel, Picture, draw, network_width
from subtuning_lab.plots.comparison import plot_trace
from subtuning_lab.plots.profiles import GREY, plot_network
from subtuning_lab.search.greedy import GreedyResult

_STEP = 0.005  # half a point of accuracy: finer than what few images can tell


def replay_trace(found: GreedyResult, epsilon: float = 0.0) -> TracePanel:
    """Drag epsilon, and see which rounds the search would have made and which blocks it would have chosen.

    Nothing is trained: every position of the slider is `found.replay`.

    Args:
        found: a search in one direction; one with epsilon=-inf ("backward": inf) can be replayed with any epsilon.
        epsilon: where the slider stands at first.

    Raises:
        TypeError: something that is no `GreedyResult`.
        ValueError: a search in both directions, or an epsilon that `greedy_subtuning` does not take.
    """
    return TracePanel(found, epsilon)


class TracePanel(Panel):
    """See `replay_trace`."""

    def __init__(self, found: GreedyResult, epsilon: float):
        if not isinstance(found, GreedyResult):
            raise TypeError(f"found is a {type(found).__name__}; it must be a GreedyResult")
        if found.direction == "both":
            raise ValueError("found is a search in both directions; give one with direction forward or backward")
        found.replay(epsilon)  # refuses a wrong one before anything is shown
        self.found, self._limits = found, _limits(found)
        top = max(_top(found), math.ceil(epsilon / _STEP) * _STEP if math.isfinite(epsilon) else 0.0)
        self.choice = widgets.FloatSlider(
            max(0.0, min(epsilon, top)), min=0.0, max=top, step=_STEP, readout_format=".1%", description="epsilon"
        )
        self.choice.layout = widgets.Layout(width="480px")
        self.network, self.figure = Picture(), Picture()
        super().__init__(self.choice, self.network, self.figure)
        self.choice.observe(self.shows_errors(self._redraw), "value")
        self._redraw()

    @property
    def replayed(self) -> GreedyResult:
        """What the search gives with the slider's epsilon."""
        return self.found.replay(round(self.choice.value, 6))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that this epsilon chooses."""
        return self.replayed.blocks

    @property
    def facts(self) -> str:
        now = self.replayed
        chosen = " + ".join(now.blocks) or "no block (linear probing)"
        spread = "" if math.isnan(now.std) else f" ± {now.std:.1%}"
        text = f"epsilon {now.epsilon:.1%}: {chosen}, {now.accuracy:.1%}{spread}, n = {now.n}"
        rounds, trainings = now.trace["round"].max(), now.cost.trainings
        text += f"; {rounds} of {self.found.trace['round'].max()} rounds, {trainings} trainings"
        return text if now.complete else f"{text}; the search ended here, later rounds are not known"

    def _redraw(self, change: object = None) -> None:
        self.say("")
        now, names = self.replayed, self.found.block_names
        self.network.show(draw(lambda ax: plot_network(names, now.blocks, ax=ax), network_width(names), 1.4))
        width = max(6.0, 2.4 * (1 + self.found.trace["round"].max()))
        self.figure.show(draw(lambda ax: self._paint(ax, now), width, 4.4))

    def _paint(self, ax: Axes, now: GreedyResult) -> None:
        """The rounds of this epsilon on the axes of the whole search, so that positions of the slider compare."""
        forward = now.direction == "forward"
        plot_trace(now.trace, now.block_names, now.epsilon if forward else None, ax)
        last, rounds = now.trace["round"].max(), self.found.trace["round"].max()
        ax.set_xticks(range(rounds + 1), ["start", *(f"round {number}" for number in range(1, rounds + 1))])
        ax.set_xlim(-0.5, rounds + 0.6)
        ax.set_ylim(*self._limits)
        for number in range(last + 1, rounds + 1):
            ax.text(number, sum(self._limits) / 2, "not needed", color=GREY, ha="center", fontsize=9)
        ax.set_title(self.facts, fontsize=10)


def _limits(found: GreedyResult) -> tuple[float, float]:
    """Room for all candidates, the labels and error bars of those kept, and the line of the largest epsilon."""
    rows = found.trace
    spread = rows["std"].fillna(0.0).where(rows["kept"], 0.0)
    low, high = (rows["accuracy"] - spread).min(), (rows["accuracy"] + spread).max()
    room = max(0.05, high - low)
    return float(low - 0.05 * room), float(high + 0.2 * room)


def _top(found: GreedyResult) -> float:
    """The first step of the slider at which the path is decided for good: no gain, or loss, is larger."""
    steps = found.trace.loc[found.trace["kept"], "gain"].abs()
    largest = 0.0 if steps.dropna().empty else float(steps.max())
    return (math.floor(largest / _STEP + 1e-9) + 1) * _STEP
