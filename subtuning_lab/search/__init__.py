"""Which blocks: pure search over scores, without torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "candidates": ["summarize"],
        "profiles": ["Profile", "finetuning_profile", "pair_profile"],
        "greedy": ["GreedyResult", "greedy_subtuning"],
        "exhaustive": ["SearchResult", "agreement_table", "best_window", "exhaustive_search"],
        "racing": ["Halving", "Race"],
        "significance": ["FoldDifference", "SignificantGain", "compare_with_best", "fold_difference"],
    },
)
