"""Panels with a checkbox per part of the network: to see what a subset costs, and to train it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import ipywidgets as widgets
import pandas as pd

from subtuning_lab.nets.chain import in_order
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.notebook.panel import Panel, Picture, checkbox, tick_grid
from subtuning_lab.plots import style
from subtuning_lab.plots.profiles import network_width, plot_flops, plot_network, plot_tried, profile_width
from subtuning_lab.search.candidates import summarize
from subtuning_lab.search.profiles import FULL_FINETUNING, LINEAR_PROBING, Profile
from subtuning_lab.study.study import Study
from subtuning_lab.utils.validation import Is, Real, Several, Text, checked

_REPORT_S = 0.1  # the browser need not know more often
_BLOCKS = Several(Text(), least=0, unique=True)


class BlockPanel(Panel):
    """Tick parts on a picture of the network, and see tuned parameters and FLOPs change; `.blocks` is the choice.

    Args:
        study: whose backbone is shown; nothing is trained.
        blocks: names of the parts that are ticked at first.

    Raises:
        ValueError: an unknown part.
    """

    @checked(study=Is(Study), blocks=_BLOCKS)
    def __init__(self, study: Study, blocks: Iterable[str] = ()):
        self.study, names = study, study.part_names
        self.boxes = {name: checkbox(name) for name in names}
        self.presets = [
            widgets.Button(description=LINEAR_PROBING, tooltip="tick nothing: only the new readout is trained"),
            widgets.Button(description=FULL_FINETUNING, tooltip="tick everything"),
        ]
        self.network, self.costs = Picture(), Picture()
        # A column under each box of the network's picture, whose last box is the readout.
        columns = f"repeat({len(names) + 1}, minmax(0, 1fr))"
        grid = tick_grid([*self.boxes.values()], columns, network_width(names), padding="0 0 0 8px")
        super().__init__(self.network, grid, widgets.HBox(self.presets), self.costs)
        self.tick(blocks)
        self.follow(*self.boxes.values())
        self.presets[0].on_click(self.shows_errors(lambda button: self.tick(())))
        self.presets[1].on_click(self.shows_errors(lambda button: self.tick(names)))

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
        self._changed()

    def _redraw(self) -> None:
        parts, names = self.study.parts, self.study.part_names
        width = network_width(names)
        costs = {"ticked": training_flops(parts, self.blocks), FULL_FINETUNING: training_flops(parts, names)}
        self.network.draw(lambda ax: plot_network(names, self.blocks, list(parts["params"]), ax), width, 1.6)
        self.costs.draw(lambda ax: plot_flops(costs, ax).set_title(self.facts, fontsize=10), width, 1.7)


class TrainPanel(Panel):
    """Tick parts, train them with a button, and see the subset land in the profile figure.

    Args:
        study: trains and records the subset.
        profile: finished, of the same study.
        blocks: names of the parts that are ticked at first.

    Raises:
        ValueError: an unknown part, or a profile of other parts.
    """

    @checked(study=Is(Study), profile=Is(Profile), blocks=_BLOCKS)
    def __init__(self, study: Study, profile: Profile, blocks: Iterable[str] = ()):
        if unknown := {name for subset in profile.table["blocks"] for name in subset} - set(study.part_names):
            raise ValueError(f"profile is of another network: the study's has no part {min(unknown)}")
        self.study, self.profile = study, profile
        #: rows of the subsets trained here, with the columns of `Profile.table`
        self.tried = profile.table.iloc[:0]
        self.ticks = BlockPanel(study, blocks)
        self.train_button = widgets.Button(description="Train", icon="play", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.bar = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="300px"))
        self.figure = Picture()
        buttons = widgets.HBox([self.train_button, self.stop_button, self.bar])
        super().__init__(self.ticks.box, buttons, self.figure, news_first=True)
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
        tried = self.tried.itertuples()
        rows = [f"{row.label}: {style.percent(row.accuracy)}, {row.params:,} parameters" for row in tried]
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

    @checked(timeout=Real(0, none=True))
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
        study = self.study.with_(progress=self._report)
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
        self.say(f"{row['label']}: {style.percent(row['accuracy'], row['std'])}, n = {row['n']}")

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
        self.figure.draw(lambda ax: plot_tried(self.profile, self.tried, ax), width, 4.4)


class _StoppedError(Exception):
    """Stop was pressed."""


def _label(study: Study, blocks: tuple[str, ...]) -> str:
    if not blocks or blocks == study.part_names:
        return FULL_FINETUNING if blocks else LINEAR_PROBING
    return " + ".join(blocks) if len(blocks) < 4 else f"{blocks[0]} ... {blocks[-1]} ({len(blocks)} parts)"
