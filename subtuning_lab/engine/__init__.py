"""How a subset is trained: one candidate at a time, or all of them in one pass."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fit": ["Fit", "fit_together"],
        "memory": ["Prepared"],
        "recipe": ["Recipe", "recipe_grid"],
    },
)
