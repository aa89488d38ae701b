"""How far a training is: a bar in a terminal, one line that updates itself in a notebook, or calls of a function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

_REFRESH_S = 0.5
_PATIENCE_S = 2.0  # what is done sooner shows nothing


class Progress:
    """Counts steps of trained candidates, and shows the count while it is entered.

    Args:
        shown: True shows it; False doesn't; a function is called with (trained, total) instead, and may raise to stop.
        total: steps in all.
    """

    def __init__(self, shown: bool | Callable[[int, int], None], total: int):
        self.total, self.trained = total, 0
        if callable(shown):
            self._show = _Reported(shown)
        elif shown and total > 0:
            self._show = _NotebookLine() if _in_kernel() else _TerminalBar(total)
        else:
            self._show = _Reported(lambda trained, total: None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._show.close(self.trained, self.total)

    def advance(self, trained: int) -> None:
        """Notes so many further steps."""
        self.trained += trained
        self._show.update(self.trained, self.total)


class _Reported:
    def __init__(self, report: Callable[[int, int], None]):
        self.update = report

    def close(self, trained: int, total: int) -> None:
        """Nothing is on display."""


class _TerminalBar:
    def __init__(self, total: int):
        interval = _REFRESH_S if sys.stderr.isatty() else 20.0  # a log file gets few lines
        self.bar = tqdm(total=total, unit="step", desc="training", mininterval=interval, delay=_PATIENCE_S)

    def update(self, trained: int, total: int) -> None:
        self.bar.update(trained - self.bar.n)

    def close(self, trained: int, total: int) -> None:
        self.bar.close()


class _NotebookLine:
    """One line of output; updates replace it, in a saved notebook too."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.last = self.start + _PATIENCE_S - _REFRESH_S
        self.handle = None

    def update(self, trained: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.last >= _REFRESH_S:
            left = (now - self.start) * max(0, total - trained) / trained
            self._write(f"training: {trained / total:.0%}, about {left:.0f} s left")
            self.last = now

    def close(self, trained: int, total: int) -> None:
        seconds = time.perf_counter() - self.start
        if self.handle is not None:
            self._write(f"trained {trained} of {total} steps in {seconds:.1f} s")

    def _write(self, text: str) -> None:
        from IPython.display import display

        if self.handle is None:
            self.handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": text}, raw=True)


def _in_kernel() -> bool:
    """Whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
