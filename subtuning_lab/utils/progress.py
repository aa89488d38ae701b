"""How far a training is: a bar in a terminal, one line for a cell of a notebook, or calls of a function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import lru_cache

from tqdm import tqdm

_REFRESH_S = 0.5
_PATIENCE_S = 2.0  # what is done sooner shows nothing


class Progress:
    """Counts steps of trained candidates, and shows the count while it is entered.

    Args:
        shown: True shows it; False doesn't; a function is called with (trained, total) instead, and may raise to stop.
        total: steps in all.
        subsets: different subsets among the candidates.
        trainings: candidates times folds and seeds.
    """

    def __init__(self, shown: bool | Callable[[int, int], None], total: int, subsets: int = 1, trainings: int = 1):
        self.total, self.trained = total, 0
        if callable(shown):
            self._show = _Reported(shown)
        elif shown and total > 0:
            cell = _cell_number()
            self._show = _TerminalBar(total) if cell is None else _line_of(cell).started(subsets, trainings)
        else:
            self._show = _Reported(lambda trained, total: None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._show.close(done=kind is None)

    def advance(self, trained: int) -> None:
        """Notes so many further steps."""
        self.trained += trained
        self._show.update(self.trained, self.total)


class _Reported:
    def __init__(self, report: Callable[[int, int], None]):
        self.update = report

    def close(self, done: bool) -> None:
        """Nothing is on display."""


class _TerminalBar:
    def __init__(self, total: int):
        interval = _REFRESH_S if sys.stderr.isatty() else 20.0  # a log file gets few lines
        self.bar = tqdm(total=total, unit="step", desc="training", mininterval=interval, delay=_PATIENCE_S)

    def update(self, trained: int, total: int) -> None:
        self.bar.update(trained - self.bar.n)

    def close(self, done: bool) -> None:
        self.bar.close()


class _NotebookLine:
    """The one line of a cell, however many trainings it starts; updates replace it, in a saved notebook too."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.last = self.start + _PATIENCE_S - _REFRESH_S
        self.handle = None
        self.subsets = self.trainings = 0  # of what has ended
        self.now, self.next = self.start, (0, 0)  # of what runs

    def started(self, subsets: int, trainings: int) -> _NotebookLine:
        self.now, self.next = time.perf_counter(), (subsets, trainings)
        return self

    def update(self, trained: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.last >= _REFRESH_S:
            left = (now - self.now) * max(0, total - trained) / trained
            self._write(f"training: {trained / total:.0%}, about {left:.0f} s left")
            self.last = now

    def close(self, done: bool) -> None:
        if done:
            self.subsets, self.trainings = self.subsets + self.next[0], self.trainings + self.next[1]
        if self.handle is not None:
            text = f"trained {self.subsets} subset" + "s" * (self.subsets != 1)
            text += f" ({self.trainings} trainings)" * (self.trainings > self.subsets)
            self._write(f"{text} in {time.perf_counter() - self.start:.0f} s" + ", then stopped" * (not done))

    def _write(self, text: str) -> None:
        from IPython.display import display

        if self.handle is None:
            self.handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)


@lru_cache(maxsize=1)
def _line_of(cell: int) -> _NotebookLine:
    return _NotebookLine()


def _cell_number() -> int | None:
    """The number of the cell that runs, if this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell.execution_count if hasattr(shell, "kernel") else None
