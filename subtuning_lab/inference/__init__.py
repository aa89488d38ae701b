"""What becomes of a tuned task: files, merged networks, export, latency, pruning."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "preparation": ["Preparation"],
        "tuned_task": ["TunedTask", "load_tuned"],
        "merge": ["MergedNetwork", "merge_tasks"],
        "schedule": ["plan_rows"],
        "export": ["export_merged", "optimize"],
        "latency": ["Latency", "OneAfterAnother", "compare_latency", "measure_latency"],
        "hub": ["from_hub", "push_to_hub", "write_repository"],
        "prune": ["prune_backbone", "prune_blocks"],
    },
)
