"""Panel for distribution shifts: what a corruption does to images, and which block repairs it."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes

from subtuning_lab.data.corruptions.registry import SEVERITIES, check_corruption, corrupt, corruption_names
from subtuning_lab.data.task import Task
from subtuning_lab.notebook.panel import Panel, Picture, described
from subtuning_lab.plots import style
from subtuning_lab.plots.profiles import plot_profile, profile_width, share_limits
from subtuning_lab.plots.shift import check_profiles
from subtuning_lab.search.profiles import Profile
from subtuning_lab.utils.validation import Is, Whole, checked


class ShiftPanel(Panel):
    """Choose a corruption and its severity, and see example images, and beside them the profile where one is finished.

    Nothing is trained: images are corrupted on the spot, profiles are those given.

    Args:
        task: clean images; the first training image of so many classes is shown.
        profiles: of `shift_profiles`: "name@severity" -> profile, on one accuracy axis; other shifts are left out.
        n_examples: images in a row.

    Raises:
        ValueError: no profile under a single corruption.
    """

    @checked(task=Is(Task), profiles=Is(Mapping), n_examples=Whole(1))
    def __init__(self, task: Task, profiles: Mapping[str, Profile], n_examples: int = 10):
        check_profiles(profiles)
        self.profiles = {shift: profile for shift, profile in profiles.items() if _is_single(shift)}
        if not self.profiles:
            names = ", ".join(profiles)
            raise ValueError(f"profiles has none under a corruption, written name@severity; there are {names}")
        self.images = _examples(task, n_examples)
        name, severity = next(iter(self.profiles)).split("@")
        wide = described(320, 80)
        names = {"options": list(corruption_names()), "value": name, "description": "corruption"}
        steps = {"options": list(SEVERITIES), "value": int(severity), "description": "severity"}
        self.corruption_choice = widgets.Dropdown(**names, **wide)
        self.severity_choice = widgets.SelectionSlider(**steps, **wide)
        self.examples, self.figure = Picture(), Picture()
        choices = [self.corruption_choice, self.severity_choice]
        super().__init__(widgets.HBox(choices), self.examples, self.figure)
        self.follow(*choices)

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
        return f"{self.shift}: best single block {best}, {style.percent(*table.loc[best, ['accuracy', 'std']])}"

    def _redraw(self) -> None:
        self.say("" if self.profile else self.facts)
        self.examples.draw(self._paint_examples, 8.6, 2.3)
        bars = max(len(profile.table) for profile in self.profiles.values()) - 2
        self.figure.draw(self._paint_profile, profile_width(bars), 4.4)

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
        tables = [profile.table for profile in self.profiles.values()]
        share_limits(plot_profile(self.profile, self.profile.best(), ax=ax), tables)


def _is_single(shift: str) -> bool:
    """Whether a shift is one corruption with its severity."""
    name, _, severity = shift.partition("@")
    try:
        check_corruption(name, int(severity) if severity.isdecimal() else severity)
    except (TypeError, ValueError):
        return False
    return True


def _examples(task: Task, count: int) -> torch.Tensor:
    """The first training image of each of `count` classes that have one, evenly chosen, (n, 3, H, W)."""
    classes = task.train.labels.unique()
    places = np.unique(np.linspace(0, len(classes) - 1, min(count, len(classes))).round().astype(int))
    first = [int((task.train.labels == label).nonzero()[0]) for label in classes[places]]
    return task.train.images[torch.tensor(first)].cpu()


def _row(images: torch.Tensor) -> np.ndarray:
    """Images side by side with white between them, (H + 2, n (W + 2), 3)."""
    tiles = [np.pad(image.permute(1, 2, 0).numpy(), ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(tiles, axis=1)
