"""Panels for notebooks: choose a study, browse finished profiles.

Every panel shows itself as the last value of a cell. Live, its widgets answer at once; in a saved notebook or an HTML
page its picture stands for it. Nothing is trained but by a Train button or `.train()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from subtuning_lab.data.builtin import GENERATED
from subtuning_lab.data.corruptions.registry import corruption_names
from subtuning_lab.data.load import load_task
from subtuning_lab.data.task import Task
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.registry import BUNDLED, load_backbone
from subtuning_lab.notebook.panel import Panel, Picture, described, slider_or_list
from subtuning_lab.plots.profiles import (
    network_width,
    plot_examples,
    plot_network,
    plot_profile,
    profile_width,
    share_limits,
)
from subtuning_lab.search.profiles import Profile
from subtuning_lab.utils.containers import Table
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked

CLEAN = "none"
_EXAMPLES_PER_CLASS = 3
_PROFILE = Table(("label", "kind", "position", "blocks"), ("params", "accuracy", "std", "n"))


class StudyPanel(Panel):
    """Choose backbone, task, corruption and number of training images, and see examples and the network.

    The choice is in `.backbone`, `.task` and `.train_size`, plain values to build a `Study` from in a cell below.

    Args:
        backbones: names for `load_backbone`; only their architecture is drawn.
        tasks: names for `load_task`, without corruptions.
        train_size: training images at first.
        max_train_size: the slider's end.
    """

    @checked(
        backbones=Several(Text()), tasks=Several(Text()), train_size=Whole(20, 10**7), max_train_size=Whole(20, 10**7)
    )
    def __init__(
        self,
        backbones: Sequence[str] = tuple(BUNDLED),
        tasks: Sequence[str] = ("digits", *GENERATED),
        *,
        train_size: int = 200,
        max_train_size: int = 1000,
    ):
        if train_size > max_train_size:
            raise ValueError(f"train_size is {train_size}; it must be at most max_train_size, {max_train_size}")
        wide = described(360, 110)
        self.backbone_choice = widgets.Dropdown(options=list(backbones), description="backbone", **wide)
        self.task_choice = widgets.Dropdown(options=list(tasks), description="task", **wide)
        corruptions = [CLEAN, *corruption_names()]
        self.corruption_choice = widgets.Dropdown(options=corruptions, description="corruption", **wide)
        self.severity_choice = widgets.IntSlider(3, 1, 5, description="severity", disabled=True, **wide)
        sizes = {"description": "training images", "continuous_update": False}
        self.size_choice = widgets.IntSlider(train_size, 20, max_train_size, 20, **sizes, **wide)
        choices = [self.backbone_choice, self.task_choice, self.size_choice]
        shift = [self.corruption_choice, self.severity_choice]
        self.examples, self.network = Picture(), Picture()
        super().__init__(widgets.HBox([widgets.VBox(choices), widgets.VBox(shift)]), self.examples, self.network)
        self.follow(*choices, *shift)

    @property
    def backbone(self) -> str:
        """For `load_backbone`."""
        return self.backbone_choice.value

    @property
    def task(self) -> str:
        """For `load_task`, with its corruption."""
        corruption = self.corruption_choice.value
        suffix = "" if corruption == CLEAN else f"+{corruption}@{self.severity_choice.value}"
        return self.task_choice.value + suffix

    @property
    def train_size(self) -> int:
        """For `load_task`."""
        return self.size_choice.value

    @property
    def facts(self) -> str:
        return f"{self.backbone} on {self.task}, {self.train_size} training images"

    def _redraw(self) -> None:
        self.severity_choice.disabled = self.corruption_choice.value == CLEAN
        task, backbone = _load_task(self.task, self.train_size), _architecture(self.backbone)
        self.examples.draw(lambda ax: _paint_task(ax, task), 9.0, 3.1)
        names, counts = backbone.part_names, [sum(p.numel() for p in part.parameters()) for part in backbone.parts]
        self.network.draw(lambda ax: plot_network(names, (), counts, ax), network_width(names), 1.7)


class ProfilePanel(Panel):
    """Look through finished profiles; a slider where their names are numbers, else a list.

    Args:
        profiles: name -> `Profile`, or a table like `Profile.table`; all share one accuracy axis.
        name: what the names stand for, e.g. "window".

    Raises:
        ValueError: no profiles, or a table without blocks.
    """

    @checked(profiles=Is(Mapping), name=Text())
    def __init__(self, profiles: Mapping[str | int, Profile | pd.DataFrame], name: str = "profile"):
        if not profiles:
            raise ValueError("profiles is empty; give at least one finished profile")
        self.profiles = {str(key): _as_profile(str(key), profile) for key, profile in profiles.items()}
        look = {"description": name, "style": {"description_width": "initial"}}
        numbers = not any(isinstance(key, str) for key in profiles)
        self.choice = (slider_or_list if numbers else widgets.Dropdown)(options=list(self.profiles), **look)
        self.figure = Picture()
        super().__init__(self.choice, self.figure)
        self.follow(self.choice)

    @property
    def profile(self) -> Profile:
        """The one that is shown."""
        return self.profiles[self.choice.value]

    @property
    def facts(self) -> str:
        return f"{self.choice.description} {self.choice.value}: best {' + '.join(self.profile.best())}"

    def _redraw(self) -> None:
        tables = [profile.table for profile in self.profiles.values()]
        width = profile_width(max(map(len, tables)) - 2)
        self.figure.draw(lambda ax: share_limits(plot_profile(self.profile, ax=ax), tables), width, 4.4)


def _as_profile(name: str, profile: Profile | pd.DataFrame) -> Profile:
    if isinstance(profile, Profile):
        return profile
    _PROFILE.check(f"profiles[{name!r}]", profile)
    blocks = profile.loc[profile["kind"] == "blocks", "blocks"]
    if blocks.empty:
        raise ValueError(f"profiles[{name!r}] has no rows of blocks")
    return Profile(profile, profile.iloc[:0], int(blocks.map(len).max()), name)


def _paint_task(ax: Axes, task: Task) -> None:
    labels = task.train.labels.numpy()
    rows = np.concatenate([np.flatnonzero(labels == k)[:_EXAMPLES_PER_CLASS] for k in range(task.num_classes)])
    examples = task.train.take(torch.from_numpy(rows))
    images = examples.images[:].permute(0, 2, 3, 1).cpu().numpy()
    plot_examples(images, examples.labels.numpy(), task.classes, _EXAMPLES_PER_CLASS, ax)
    ax.set_title(f"{task.name}: {len(labels)} training images, {task.num_classes} classes", fontsize=10)


@lru_cache(maxsize=16)
def _load_task(spec: str, train_size: int) -> Task:
    # The test images are not shown; of a generated task a few are quicker to draw than all.
    test_size = 20 if spec.partition("+")[0] in GENERATED else None
    return load_task(spec, train_size=train_size, test_size=test_size, progress=False)


@lru_cache(maxsize=16)
def _architecture(name: str) -> Chain:
    return load_backbone(name, weights="random")
