"""Batches of notebooks by papermill, and the page that shows them all."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["reproduce"],
        "machine": ["machine_line"],
        "page": ["write_section"],
        "html": ["styled"],
    },
)
