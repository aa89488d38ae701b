"""Panel for distribution shifts: what a corruption does to images, and which block repairs it."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes

from subtuning_lab.data.corruptions.registry import SEVERITIES, check_corruption, corrupt, corruption_names
from subtuning_lab.data.task import Task
from subtuning_lab.notebook.panel import Panel, Picture, draw, profile_width
from subtuning_lab.plots.profiles import plot_profile, share_limits
from subtuning_lab.search.profiles import Profile

_EXAMPLES = 10


def browse_shifts(task: Task, profiles: Mapping[str, Profile], n_examples: int = _EXAMPLES) -> ShiftPanel:
    """Choose a corruption and its severity, and see example images, and beside them the profile where one is finished.

    Nothing is trained: images are corrupted on the spot, profiles are those given.

    Args:
        task: clean images; the first training image of so many classes is shown.
        profiles: of `shift_profiles`: "name@severity" -> profile, on one accuracy axis; other shifts are left out.
        n_examples: images in a row.

    Raises:
        TypeError: something that is no `Task`, or no `Profile`.
        ValueError: no profile under a single corruption.
    """
    return ShiftPanel(task, profiles, n_examples)


class ShiftPanel(Panel):
    """See `browse_shifts`."""

    def __init__(self, task: Task, profiles: Mapping[str, Profile], n_examples: int):
        if not isinstance(task, Task):
            raise TypeError(f"task is a {type(task).__name__}; it must be a Task")
        self.profiles = {shift: own for shift, own in profiles.items() if _is_single(shift)}
        if not self.profiles:
            names = ", ".join(profiles) or "none"
            raise ValueError(f"no profile is under a corruption, written name@severity; there are {names}")
        for shift, own in self.profiles.items():
            if not isinstance(own, Profile):
                raise TypeError(f"the profile under {shift} is a {type(own).__name__}; it must be a Profile")
        self.images = _examples(task, n_examples)
        name, severity = next(iter(self.profiles)).split("@")
        wide = {"style": {"description_width": "80px"}, "layout": widgets.Layout(width="320px")}
        self.corruption_choice = widgets.Dropdown(
            options=list(corruption_names()), value=name, description="corruption", **wide
        )
        self.severity_choice = widgets.SelectionSlider(
            options=list(SEVERITIES), value=int(severity), description="severity", **wide
        )
        self.examples, self.figure = Picture(), Picture()
        super().__init__(widgets.HBox([self.corruption_choice, self.severity_choice]), self.examples, self.figure)
        for choice in (self.corruption_choice, self.severity_choice):
            choice.observe(self.shows_errors(self._redraw), "value")
        self._redraw()

    @property
    def shift(self) -> str:
        """What is chosen, "name@severity"."""
        return f"{self.corruption_choice.value}@{self.severity_choice.value}"

    @property
    def profile(self) -> Profile | None:
        """The finished profile under it; None where there is none."""
        return self.profiles.get(self.shift)

    @property
    def corrupted(self) -> torch.Tensor:
        """The example images under it, uint8 (n, 3, H, W)."""
        return corrupt(self.images, self.corruption_choice.value, self.severity_choice.value)

    @property
    def facts(self) -> str:
        if self.profile is None:
            return f"{self.shift}: no profile was made; there are {', '.join(self.profiles)}"
        table = self.profile.table.set_index("label")
        best = " + ".join(self.profile.best())
        spread = "" if np.isnan(table.at[best, "std"]) else f" ± {table.at[best, 'std']:.1%}"
        return f"{self.shift}: best single block {best}, {table.at[best, 'accuracy']:.1%}{spread}"

    def _redraw(self, change: object = None) -> None:
        self.say("" if self.profile else self.facts)
        self.examples.show(draw(self._paint_examples, 8.6, 2.3))
        bars = max(len(own.table) for own in self.profiles.values()) - 2
        self.figure.show(draw(self._paint_profile, profile_width(bars), 4.4))

    def _paint_examples(self, ax: Axes) -> None:
        """Clean images above, corrupted ones below."""
        sheet = np.concatenate([_row(self.images), _row(self.corrupted)])
        ax.imshow(sheet, interpolation="nearest")
        ax.axis("off")
        ax.set_title(f"above: clean; below: {self.shift}", fontsize=10)

    def _paint_profile(self, ax: Axes) -> None:
        if self.profile is None:
            ax.text(0.5, 0.5, self.facts.replace("; ", ";\n"), ha="center", va="center", fontsize=10)
            ax.axis("off")
            return
        tables = [own.table for own in self.profiles.values()]
        share_limits(plot_profile(self.profile, self.profile.best(), ax=ax), tables)


def _is_single(shift: str) -> bool:
    """Whether a shift is one corruption with its severity."""
    name, _, severity = shift.partition("@")
    try:
        check_corruption(name, int(severity) if severity.isdecimal() else severity)
    except ValueError:
        return False
    return True


def _examples(task: Task, count: int) -> torch.Tensor:
    """The first training image of each of `count` classes, evenly chosen, (n, 3, H, W)."""
    classes = np.unique(np.linspace(0, task.num_classes - 1, min(count, task.num_classes)).round().astype(int))
    first = [int((task.train.labels == label).nonzero()[0]) for label in classes.tolist()]
    return task.train.images[torch.tensor(first)].cpu()


def _row(images: torch.Tensor) -> np.ndarray:
    """Images side by side with white between them, (H + 2, n (W + 2), 3)."""
    tiles = [np.pad(image.permute(1, 2, 0).numpy(), ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(tiles, axis=1)
