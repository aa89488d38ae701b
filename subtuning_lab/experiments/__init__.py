"""What a section of the paper asks, as one function each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "low_data": ["low_data_curves", "method_differences", "summarize_repeats"],
        "shift": [
            "average_shifts", "chosen_steps", "corrupted", "shift_differences", "shift_profiles",
            "shift_studies", "shift_study", "stage_subsets", "summarize_shifts",
        ],
        "ablations": ["ABLATIONS", "SUBTUNING", "ablate", "summarize_variants", "variant_differences"],
        "active_learning": ["active_learning", "strategy_differences", "summarize_queries"],
        "queries": ["query_images", "strategy_names"],
        "vtab": ["vtab_protocol", "vtab_table"],
        "stability": ["profile_agreement", "profile_stability"],
        "pruning": ["fit_pruned", "pruning_table"],
        "reported": ["official_recipe", "reported"],
    },
)
