"""The ground: tasks, their images, splits, augmentation and corruptions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "load": ["load_task", "task_names"],
        "task": ["Split", "Task"],
    },
)
