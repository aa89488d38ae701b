"""Panels of closed forms: what the paper's rate is made of, while its numbers are moved by sliders."""

from __future__ import annotations

import math

import ipywidgets as widgets
import pandas as pd

from subtuning_lab.notebook.panel import Panel, Picture, draw
from subtuning_lab.plots.bounds import plot_terms
from subtuning_lab.theory.bounds import Bound, bound_table, full_finetuning_bound, selection_price, subtuning_bound

SUBTUNING, FULL = "SubTuning", "full finetuning"
_LARGEST_N, _LARGEST_DELTA = 10**7, 1e6


def move_bound(
    *,
    n: int,
    tuned_params: int,
    params: int,
    delta: float,
    n_blocks: int,
    max_blocks: int = 1,
    confidence: float = 0.95,
    full_delta: float | None = None,
) -> BoundPanel:
    """Move sliders, and see the terms of the paper's rate for SubTuning and for full finetuning; constant 1 in both.

    Args:
        n: training examples, m in the paper.
        tuned_params: r', tuned parameters.
        params: r, all parameters; no slider.
        delta: distance of the tuned parameters from the pretrained ones.
        n_blocks: L, blocks of the backbone.
        max_blocks: k, blocks that greedy tunes at most.
        confidence: in (0, 1).
        full_delta: distance that full finetuning goes; None means always SubTuning's.

    Raises:
        ValueError: more tuned parameters than there are, or an argument that the bounds don't take.
    """
    return BoundPanel(n, tuned_params, params, delta, n_blocks, max_blocks, confidence, full_delta)


class BoundPanel(Panel):
    """See `move_bound`."""

    def __init__(
        self,
        n: int,
        tuned_params: int,
        params: int,
        delta: float,
        n_blocks: int,
        max_blocks: int,
        confidence: float,
        full_delta: float | None,
    ):
        if not 1 <= tuned_params <= params:
            raise ValueError(f"tuned_params is {tuned_params}; it must be from 1 to params, {params}")
        for name, value in {"delta": delta, "full_delta": full_delta}.items():
            if value is not None and not 0 < value < _LARGEST_DELTA:
                raise ValueError(f"{name} is {value}; it must be above 0, below {_LARGEST_DELTA:g}")
        subtuning_bound(  # raises for what a slider would quietly bring into its range
            n=n,
            tuned_params=tuned_params,
            delta=delta,
            n_blocks=n_blocks,
            max_blocks=max_blocks,
            confidence=confidence,
        )
        self.params, self.full_delta = params, full_delta
        self.n = _log_slider("m, examples", n, min(10, n), max(_LARGEST_N, n))
        self.tuned_params = _log_slider("r', tuned", tuned_params, 1, params)
        self.delta = _log_slider("Δ, distance", delta, min(0.01, delta), max(100.0, delta))
        self.n_blocks = _slider(widgets.IntSlider, "L, blocks", n_blocks, 1, max(60, n_blocks), 1)
        self.max_blocks = _slider(widgets.IntSlider, "k, at most", max_blocks, 1, n_blocks, 1)
        self.confidence = _slider(
            widgets.FloatSlider, "confidence", confidence, min(0.5, confidence), max(0.999, confidence), 0.001
        )
        self.confidence.readout_format = ".3f"
        self.sliders = (self.n, self.tuned_params, self.delta, self.n_blocks, self.max_blocks, self.confidence)
        self.figure, self._holding = Picture(), False
        columns = [widgets.VBox(self.sliders[:3]), widgets.VBox(self.sliders[3:])]
        super().__init__(widgets.HBox(columns), self.figure)
        for slider in self.sliders:
            slider.observe(self.shows_errors(self._redraw), "value")
        self._redraw()

    @property
    def bounds(self) -> dict[str, Bound]:
        """The two bounds of the gap that are shown."""
        common = {"n": round(self.n.value), "confidence": self.confidence.value}
        delta = self.delta.value
        own = subtuning_bound(
            delta=delta,
            tuned_params=round(self.tuned_params.value),
            n_blocks=self.n_blocks.value,
            max_blocks=self.max_blocks.value,
            **common,
        )
        distance = delta if self.full_delta is None else self.full_delta
        return {SUBTUNING: own, FULL: full_finetuning_bound(params=self.params, delta=distance, **common)}

    @property
    def table(self) -> pd.DataFrame:
        """Of `bound_table`."""
        return bound_table(self.bounds)

    @property
    def facts(self) -> str:
        own, full = self.bounds.values()
        factor = max(1.0, selection_price(self.n_blocks.value, self.max_blocks.value, "evaluations"))
        most = self.params / (factor * own.inputs["delta"] / full.inputs["delta"]) ** 2
        better = SUBTUNING if own.value < full.value else FULL
        return (
            f"m = {own.inputs['n']:,}, r' = {own.inputs['tuned_params']:,} of {self.params:,}, "
            f"Δ = {own.inputs['delta']:.3g} and {full.inputs['delta']:.3g}, factor log(kL) = {factor:.2f}\n"
            f"smaller rate: {better}; SubTuning's is smaller as long as r' < {min(most, self.params):,.0f}"
        )

    def _redraw(self, change: object = None) -> None:
        if self._holding:
            return
        self._holding = True
        self.max_blocks.max = self.n_blocks.value  # lowers k with it
        self._holding = False
        self.say("")
        table, facts = self.table, self.facts
        self.figure.show(draw(lambda ax: plot_terms(table, ax=ax).set_title(facts, fontsize=9, pad=26), 9.6, 2.9))


def _slider(kind: type, name: str, value: float, low: float, high: float, step: float) -> widgets.Widget:
    wide = {"style": {"description_width": "90px"}, "layout": widgets.Layout(width="380px")}
    return kind(value=value, min=low, max=high, step=step, description=name, continuous_update=False, **wide)


def _log_slider(name: str, value: float, low: float, high: float) -> widgets.FloatLogSlider:
    wide = {"style": {"description_width": "90px"}, "layout": widgets.Layout(width="380px")}
    return widgets.FloatLogSlider(
        value=value,
        base=10,
        min=math.log10(low) - 1e-9,  # a hair more, so that the ends themselves fit
        max=math.log10(high) + 1e-9,
        step=0.01,
        readout_format=".3g",
        description=name,
        continuous_update=False,
        **wide,
    )
