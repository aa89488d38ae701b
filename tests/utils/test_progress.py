"""The line of progress in a notebook: one a cell, however many trainings the cell starts."""

import sys
from types import SimpleNamespace

import pytest

from subtuning_lab.utils import progress
from subtuning_lab.utils.progress import Progress


@pytest.fixture
def shell(monkeypatch):
    """A notebook's kernel that runs cell 1; `.shown` are its lines, each with the texts that it had."""
    shell = SimpleNamespace(kernel=object(), execution_count=1, shown=[])

    def display(data, raw, display_id):
        line = [data["text/plain"]]
        shell.shown.append(line)
        return SimpleNamespace(update=lambda data, raw: line.append(data["text/plain"]))

    ipython = SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "_REFRESH_S", 0.0)
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    progress._line_of.cache_clear()
    yield shell
    progress._line_of.cache_clear()


def test_a_cell_has_one_line_however_many_trainings_it_starts(shell):
    for _ in range(3):
        with Progress(True, 10, subsets=4, trainings=8) as bar:
            bar.advance(5)
            bar.advance(5)
    (line,) = shell.shown
    assert line[0] == "training: 50%, about 0 s left"
    assert line[-1] == "trained 12 subsets (24 trainings) in 0 s"


def test_the_next_cell_has_a_line_of_its_own_and_an_interrupted_training_does_not_count(shell):
    with Progress(True, 1, subsets=1) as bar:
        bar.advance(1)
    shell.execution_count = 2
    with pytest.raises(KeyboardInterrupt), Progress(True, 2, subsets=3) as bar:
        bar.advance(1)
        raise KeyboardInterrupt
    assert [line[-1] for line in shell.shown] == ["trained 1 subset in 0 s", "trained 0 subsets in 0 s, then stopped"]


def test_what_is_read_from_the_records_or_done_at_once_shows_nothing(shell, monkeypatch):
    with Progress(True, 0):
        pass
    monkeypatch.setattr(progress, "_PATIENCE_S", 60.0)
    progress._line_of.cache_clear()
    with Progress(True, 1) as bar:
        bar.advance(1)
    assert shell.shown == []


def test_a_function_is_called_instead_and_may_stop_the_training(shell):
    told = []
    with Progress(lambda *counts: told.append(counts), 3) as bar:
        bar.advance(2)
        bar.advance(1)
    assert told == [(2, 3), (3, 3)] and shell.shown == []
