"""Which blocks, without a search: scores of blocks, what they are worth, and a suggestion within a budget."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "score": ["criterion_names", "score_blocks", "select_blocks"],
        "compare": ["compare_criteria"],
        "suggest": ["suggest_blocks", "Suggestion"],
    },
)
