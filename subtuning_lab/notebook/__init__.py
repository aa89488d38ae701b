"""Widgets over finished results, and buttons that train."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "study_panels": ["ProfilePanel", "StudyPanel"],
        "block_panels": ["BlockPanel", "TrainPanel"],
        "browse": ["AlphaPanel", "RealPanel", "SizePanel", "TracePanel"],
        "shift": ["ShiftPanel"],
        "bounds": ["BoundPanel"],
        "criteria": ["CriterionPanel"],
        "merge": ["MergePanel", "untrained_task"],
    },
)
