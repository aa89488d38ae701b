"""SubTuning Lab: learn, run and trust selective layer finetuning."""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ablations": "ablate summarize_variants variant_differences",
    "active": "active_learning strategy_differences summarize_queries",
    "active_plots": "plot_strategies",
    "backbones": "backbone_names load_backbone",
    "baselines": "compare_methods grid_caption method_names random_subsets",
    "bounds": "Bound bound_table full_finetuning_bound geometric_grid selection_price subtuning_bound test_set_bound",
    "bound_study": "measure_bounds rank_correlations",
    "chain": "Chain count_parameters part_table set_trainable",
    "comparison_plots": "plot_curves plot_methods plot_trace plot_tradeoff",
    "deltas": "TunedTask load_tuned",
    "export": "export_merged optimize",
    "greedy": "GreedyResult greedy_subtuning",
    "head2toe": "Head2Toe",
    "hub": "from_hub push_to_hub write_repository",
    "interpolation": "interpolate interpolation_curve summarize_interpolation",
    "jacobian": "gradient_norms",
    "job": "Fit",
    "latency": "Latency compare_latency measure_latency",
    "linearity": "linearization_gap",
    "low_data": "low_data_curves method_differences summarize_repeats",
    "pac_bayes": "pac_bayes_bound",
    "plots": "plot_network plot_pairs plot_profile",
    "prepared": "Prepared",
    "profiles": "Profile finetuning_profile pair_profile",
    "queries": "query_images strategy_names",
    "pruning": "prune_backbone prune_blocks",
    "pruning_study": "fit_pruned pruning_table",
    "racing": "Halving Race",
    "rademacher": "rademacher_bound ramp_error",
    "recipe": "Recipe recipe_grid",
    "records": "Records",
    "robustness": "average_shifts chosen_steps shift_differences shift_profiles shift_studies shift_study"
    " summarize_shifts",
    "search": "SearchResult agreement_table best_window exhaustive_search",
    "significance": "SignificantGain",
    "siamese": "MergedNetwork merge_tasks",
    "shift_plots": "plot_forgetting plot_shift_profiles plot_shifts plot_steps",
    "source_network": "SourceNetwork with_statistics",
    "stability": "profile_agreement profile_stability",
    "study": "Study",
    "tasks": "Split Task load_task task_names",
    "training": "fit_together",
    "trials": "TestResult",
    "vtab": "vtab_protocol vtab_table",
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
