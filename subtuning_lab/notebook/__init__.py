"""Widgets over finished results, and buttons that train."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "study_panels": ["browse_profile", "choose_study", "tick_blocks", "train_ticked"],
        "browse": ["replay_trace"],
        "curves": ["browse_sizes"],
        "ablations": ["browse_alphas"],
        "shift": ["browse_shifts"],
        "bounds": ["move_bound"],
        "merge": ["plan_merge", "untrained_task"],
    },
)
