"""A panel of criteria: what each would tune, shown in the finetuning profile that it does without."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import pandas as pd

from subtuning_lab.criteria.score import select_blocks
from subtuning_lab.notebook.panel import Panel, Picture, described
from subtuning_lab.plots.profiles import plot_profile, profile_width
from subtuning_lab.search.profiles import Profile
from subtuning_lab.utils.containers import Mapped, Table
from subtuning_lab.utils.validation import Is, checked


class CriterionPanel(Panel):
    """Choose a task, a criterion and a number of blocks, and see what it would tune in the task's profile.

    Args:
        profiles: task -> finished `Profile` of single blocks.
        scores: task -> table of `score_blocks`; the same tasks.

    Raises:
        ValueError: tasks that one of the two lacks.
    """

    @checked(profiles=Mapped(Is(Profile)), scores=Mapped(Table(("criterion", "block"), ("rank",))))
    def __init__(self, profiles: Mapping[str, Profile], scores: Mapping[str, pd.DataFrame]):
        if set(profiles) != set(scores):
            tasks = ", ".join(profiles)
            raise ValueError(f"scores is of {', '.join(scores)}; it must be of the profiles' tasks {tasks}")
        self.profiles, self.scores = dict(profiles), dict(scores)
        first = next(iter(self.scores.values()))
        names, most = first["criterion"].drop_duplicates().tolist(), first["block"].nunique()
        self.task = widgets.Dropdown(options=list(self.profiles), description="task", **described(300, 60))
        self.criterion = widgets.Dropdown(options=names, description="criterion", **described(300, 70))
        self.count = widgets.IntSlider(value=1, min=1, max=most, description="blocks", **described(300, 60))
        self.figure = Picture()
        super().__init__(widgets.HBox([self.task, self.criterion, self.count]), self.figure)
        self.follow(self.task, self.criterion, self.count)

    @property
    def blocks(self) -> tuple[str, ...]:
        """What the criterion would tune."""
        scores = self.scores[self.task.value]
        return select_blocks(scores[scores["criterion"] == self.criterion.value], k=self.count.value)

    @property
    def facts(self) -> str:
        best, chosen = (" + ".join(blocks) for blocks in (self.profiles[self.task.value].best(), self.blocks))
        return f"{self.task.value}: {self.criterion.value} tunes {chosen}; the profile's best is {best}"

    def _redraw(self) -> None:
        profile = self.profiles[self.task.value]
        width = profile_width(len(profile.table) - 2)
        self.figure.draw(lambda ax: plot_profile(profile, self.blocks, ax=ax), width, 4.4)
        self.say(self.facts)
