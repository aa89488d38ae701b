"""The ground: a pretrained network as a chain of blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chain": ["Chain", "count_parameters", "part_table", "set_trainable"],
        "registry": ["backbone_names", "load_backbone"],
    },
)
