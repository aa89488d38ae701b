"""Tables in, matplotlib axes out: every figure is drawn where `ax` says, by default in a new one; no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "profiles": ["plot_network", "plot_pairs", "plot_profile", "share_limits"],
        "comparison": [
            "plot_confusion", "plot_curves", "plot_methods", "plot_strategies", "plot_trace", "plot_tradeoff",
        ],
        "merge": ["plot_choices", "plot_fork"],
        "shift": ["plot_forgetting", "plot_shift_profiles", "plot_shifts", "plot_steps"],
        "ablations": ["plot_alphas", "plot_differences", "plot_interpolation", "plot_stability", "plot_variants"],
        "bounds": ["plot_against_gap", "plot_terms"],
        "claims": ["plot_cases"],
    },
)
