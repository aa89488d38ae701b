"""What a section of the paper asks, as one function each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "low_data": ["low_data_curves", "summarize_repeats"],
        "tables": ["method_differences"],
        "shift": [
            "average_shifts", "chosen_steps", "corrupted", "shift_differences", "shift_profiles",
            "shift_studies", "shift_study", "stage_subsets", "summarize_shifts",
        ],
        "ablations": ["ABLATIONS", "SUBTUNING", "ablate", "summarize_variants", "variant_differences"],
        "active_learning": [
            "active_learning", "query_images", "strategy_differences", "strategy_names", "summarize_queries",
        ],
        "vtab": ["vtab_protocol", "vtab_table"],
        "stability": ["profile_agreement", "profile_stability"],
        "pruning": ["fit_pruned", "pruning_table"],
        "reported": ["official_recipe", "reported"],
        "claims": ["claim_cases", "verdicts"],
    },
)
