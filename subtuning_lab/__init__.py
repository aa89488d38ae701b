"""SubTuning Lab: learn, run and trust selective layer finetuning."""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "backbones": "backbone_names load_backbone",
    "chain": "Chain count_parameters part_table set_trainable",
    "job": "Fit",
    "deltas": "TunedTask load_tuned",
    "plots": "plot_network plot_pairs plot_profile",
    "profiles": "Profile finetuning_profile pair_profile",
    "recipe": "Recipe",
    "records": "Records",
    "study": "Study",
    "tasks": "Split Task load_task task_names",
    "training": "fit_together",
    "trials": "TestResult",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first asked for, so that `subtuning-lab --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
