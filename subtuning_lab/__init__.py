"""SubTuning Lab: learn, run and trust selective layer finetuning."""

import importlib
from typing import Any

from subtuning_lab import baselines, criteria, data, engine, experiments, inference, nets, plots, search, study, theory

__version__ = "0.1.0"

_ROOMS = (nets, data, engine, inference, study, search, baselines, theory, criteria, experiments, plots)
_HOME = {name: room for room in _ROOMS for name in room.__all__}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name's module is imported when it is first asked for, so that `subtuning-lab --help` needs no torch."""
    if name in ("notebook", "report"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(_HOME[name], name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
