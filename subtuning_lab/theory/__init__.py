"""Why fewer tuned parameters help: bounds, gradients per image, linearization."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bounds": [
            "Bound", "bound_table", "full_finetuning_bound", "geometric_grid", "selection_price",
            "subtuning_bound", "test_set_bound",
        ],
        "rademacher": ["empirical_rademacher", "rademacher_bound", "ramp_error"],
        "pac_bayes": ["kl_inverse", "pac_bayes_bound"],
        "weight_noise": ["readout_start"],
        "per_sample_grads": ["gradient_norms"],
        "linearization": ["linearization_gap", "tuned_distance"],
        "measure": ["measure_bounds", "rank_correlations"],
    },
)
