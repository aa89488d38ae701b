"""Panels with a checkbox per part of the network: to see what a subset costs, and to train it."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable, Sequence

import ipywidgets as widgets
import pandas as pd

from subtuning_lab.nets.chain import in_order
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.notebook.panel import Panel, Picture, draw, network_width, profile_width
from subtuning_lab.plots.profiles import plot_flops, plot_network, plot_tried
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile, summarize
from subtuning_lab.study.study import Study

_REPORT_S = 0.1  # the browser need not know more often
# A name like "layer1.0" must fit under its box of the picture.
_SMALL = """<style>
.subtuning-ticks .widget-label-basic { font-size: 11px; gap: 0; padding: 0 2px 0 4px; }
.subtuning-ticks .widget-label-basic input[type="checkbox"] { flex-grow: 0; margin: 0 3px 0 0; }
</style>"""


class BlockPanel(Panel):
    """See `tick_blocks`."""

    def __init__(self, study: Study, blocks: Iterable[str]):
        self.study = study
        names = study.part_names
        self.boxes = {
            name: widgets.Checkbox(False, description=name, indent=False, style={"background": "#EEEEEE"})
            for name in names
        }
        for box in self.boxes.values():
            box.layout = widgets.Layout(width="auto", min_width="0", margin="0")
        self.presets = [
            widgets.Button(description=LINEAR_PROBING, tooltip="tick nothing: only the new readout is trained"),
            widgets.Button(description=FULL_FINETUNING, tooltip="tick everything"),
        ]
        self.network, self.costs, self._holding = Picture(), Picture(), False
        grid = widgets.GridBox([*self.boxes.values()], layout=_under_network(names))
        grid.add_class("subtuning-ticks")
        style = widgets.HTML(_SMALL, layout=widgets.Layout(display="none"))
        super().__init__(self.network, style, grid, widgets.HBox(self.presets), self.costs)
        for box in self.boxes.values():
            box.observe(self.shows_errors(self._redraw), "value")
        self.presets[0].on_click(self.shows_errors(lambda button: self.tick(())))
        self.presets[1].on_click(self.shows_errors(lambda button: self.tick(names)))
        self.tick(blocks)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The ticked parts, from input to output."""
        return tuple(name for name, box in self.boxes.items() if box.value)

    @property
    def parameters(self) -> int:
        """Tuned parameters, the readout not counted."""
        return self.study.count_parameters(self.blocks)

    @property
    def flops(self) -> int:
        """FLOPs per image of a training step."""
        return sum(training_flops(self.study.parts, self.blocks).values())

    @property
    def facts(self) -> str:
        tuned, total = self.parameters, self.study.count_parameters("all")
        share = self.flops / sum(training_flops(self.study.parts, self.study.part_names).values())
        return (
            f"tuned: {tuned:,} of {total:,} parameters ({tuned / total:.1%})\n"
            f"a training step takes {share:.0%} of the FLOPs of full finetuning"
        )

    def tick(self, blocks: Iterable[str]) -> None:
        """Ticks these parts and no others.

        Raises:
            ValueError: an unknown part.
        """
        wanted = in_order(self.study.backbone, blocks)
        self._holding = True
        for name, box in self.boxes.items():
            box.value = name in wanted
        self._holding = False
        self._redraw()

    def _redraw(self, change: object = None) -> None:
        if self._holding:
            return
        parts, blocks, width = self.study.parts, self.blocks, network_width(self.study.part_names)
        costs = {
            "ticked": training_flops(parts, blocks),
            FULL_FINETUNING: training_flops(parts, self.study.part_names),
        }
        self.network.show(draw(lambda ax: plot_network(list(parts.index), blocks, parts["params"], ax), width, 1.6))
        self.costs.show(draw(lambda ax: plot_flops(costs, ax).set_title(self.facts, fontsize=10), width, 1.7))


class TrainPanel(Panel):
    """See `train_ticked`."""

    def __init__(self, study: Study, profile: Profile, blocks: Iterable[str]):
        self.study, self.profile = study, profile
        #: rows of the subsets trained here, with the columns of `Profile.table`
        self.tried = profile.table.iloc[:0]
        self.ticks = BlockPanel(study, blocks)
        self.train_button = widgets.Button(description="Train", icon="play", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="300px"))
        self.figure = Picture()
        buttons = widgets.HBox([self.train_button, self.stop_button, self.bar])
        super().__init__(self.ticks.box, buttons, self.figure)
        # The line of news stands beside the button that it is about, not under the figure.
        self.box.children = [self.ticks.box, buttons, self.status, self.figure]
        self._stopping, self._thread, self._start = threading.Event(), None, 0.0
        self.train_button.on_click(self.shows_errors(self._train_aside))
        self.stop_button.on_click(lambda button: self.stop())
        self._draw_profile()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The ticked parts, from input to output."""
        return self.ticks.blocks

    @property
    def training(self) -> bool:
        """Whether a training runs now."""
        return self.train_button.disabled

    @property
    def facts(self) -> str:
        rows = [f"{row.label}: {row.accuracy:.1%}, {row.params:,} parameters" for row in self.tried.itertuples()]
        return "\n".join([self.ticks.facts, *rows])

    def train(self) -> pd.DataFrame:
        """Trains the ticked subset, waits for it, and draws it into the profile figure.

        Returns:
            All rows tried in this panel so far, with the columns of `Profile.table`.

        Raises:
            Whatever the training raises, once it is shown in the panel.
        """
        self._declare(training=True)
        self._train(self.blocks)
        return self.tried

    def stop(self) -> None:
        """Ends the training at its next step; finished folds stay recorded."""
        self._stopping.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the training that the button started, at most `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _train_aside(self, button: widgets.Button) -> None:
        """A running cell would keep Stop's click waiting, so the button trains in a thread."""
        self._declare(training=True)
        train = self.shows_errors(self._train)
        self._thread = threading.Thread(target=train, args=(self.blocks,), daemon=True)
        self._thread.start()

    def _train(self, blocks: tuple[str, ...]) -> None:
        study = copy.copy(self.study)  # shares backbone, folds and records
        study.progress = self._report
        try:
            scores = study.scores([blocks])
        except _StoppedError:
            self.bar.bar_style = "warning"
            self.say("Stopped. Finished folds are kept: Train goes on from there.")
        except (Exception, KeyboardInterrupt) as error:
            self.bar.bar_style = "danger"
            self.say(f"{type(error).__name__}: {error}", error=True)
            raise
        else:
            self._land(blocks, scores)
        finally:
            self._declare(training=False)

    def _land(self, blocks: tuple[str, ...], scores: pd.DataFrame) -> None:
        """Adds the subset to the figure; once trained again, it keeps one row."""
        (row,) = summarize(scores).to_dict("records")
        row |= {"label": _label(self.study, blocks), "kind": "blocks", "position": pd.NA, "blocks": blocks}
        new = pd.DataFrame([row | {"params": self.study.count_parameters(blocks)}])
        new = new.reindex(columns=self.profile.table.columns).astype({"position": "Int64"})
        others = self.tried[self.tried["blocks"] != blocks]
        self.tried = pd.concat([others, new], ignore_index=True) if len(others) else new
        self._draw_profile()
        self.bar.value, self.bar.bar_style = 1.0, "success"
        spread = "" if pd.isna(row["std"]) else f" ± {row['std']:.1%}"
        self.say(f"{row['label']}: {row['accuracy']:.1%}{spread}, n = {row['n']}")

    def _report(self, trained: int, total: int) -> None:
        """Shows how far the training is, and ends it when Stop was pressed."""
        if self._stopping.is_set():
            raise _StoppedError
        now = time.perf_counter()
        if now - self._start > _REPORT_S or trained == total:
            self._start, self.bar.value = now, trained / total

    def _declare(self, training: bool) -> None:
        """Declares what can be pressed; a new training clears the last one's bar and news.

        Raises:
            RuntimeError: a training runs already.
        """
        if training:
            if self.training:
                raise RuntimeError("a training runs already; press Stop first")
            self._stopping.clear()
            self.bar.value, self.bar.bar_style = 0.0, "info"
            self.say("training ...")
        for widget in (self.train_button, *self.ticks.boxes.values(), *self.ticks.presets):
            widget.disabled = training
        self.stop_button.disabled = not training

    def _draw_profile(self) -> None:
        width = profile_width(len(self.profile.table) - 2 + len(self.tried))
        self.figure.show(draw(lambda ax: plot_tried(self.profile, self.tried, ax), width, 4.4))


class _StoppedError(Exception):
    """Stop was pressed."""


def _label(study: Study, blocks: tuple[str, ...]) -> str:
    if not blocks or blocks == study.part_names:
        return FULL_FINETUNING if blocks else LINEAR_PROBING
    return " + ".join(blocks) if len(blocks) < 4 else f"{blocks[0]} ... {blocks[-1]} ({len(blocks)} parts)"


def _under_network(names: Sequence[str]) -> widgets.Layout:
    """A column under each box of the network's picture, whose last box is the readout."""
    return widgets.Layout(
        grid_template_columns=f"repeat({len(names) + 1}, minmax(0, 1fr))",
        grid_gap="4px",
        width=f"{80 * network_width(names):.0f}px",
        max_width="100%",
        padding="0 0 0 8px",
    )
