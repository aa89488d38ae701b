"""The ground: a pretrained network as a chain of blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chain": ["Chain", "count_parameters", "set_trainable"],
        "flops": ["part_table"],
        "registry": ["backbone_names", "check_backbone", "load_backbone"],
    },
)
