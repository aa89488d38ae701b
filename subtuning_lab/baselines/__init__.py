"""The rivals: other ways to use a pretrained network, on equal terms."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "compare": ["compare_methods", "grid_caption", "method_names", "random_subsets"],
        "head2toe": ["Head2Toe"],
        "bn_adapt": ["SourceNetwork", "with_readout_of", "with_statistics"],
        "wise_ft": ["best_alpha", "interpolate", "interpolated", "interpolation_curve", "summarize_interpolation"],
    },
)
