"""Blocks with fewer inner channels, rebuilt from the shapes of their tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

State = Mapping[str, torch.Tensor]
_RESIZABLE = (nn.Conv2d, nn.Linear, _BatchNorm, nn.LayerNorm, nn.GroupNorm, GlobalResponseNorm)


def narrowed(part: nn.Module, state: State) -> nn.Module:
    """A part with other tensors in the place of its own, whose inner widths may be smaller.

    Args:
        part: as the backbone has it; it stays as it is.
        state: a tensor for each of the part's `state_dict`; not copied if it has the part's precision and device.

    Raises:
        ValueError: tensors of one module that disagree about its width.
    """
    held = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}  # replaced anyway, so not copied
    narrow = copy.deepcopy(part, held)
    for path, module in narrow.named_modules():
        for own in (module._parameters, module._buffers):
            for name in own:
                key = f"{path}.{name}" if path else name
                if key in state:  # None and buffers that no file holds are not
                    own[name] = _in_place_of(own[name], state[key])
        if isinstance(module, _RESIZABLE):
            _declare_widths(path, module)
    return narrow


def narrow_parts(parts: Mapping[str, nn.Module], weights: Mapping[str, State]) -> frozenset[str]:
    """Names of the parts of which the weights have smaller tensors than the modules."""
    return frozenset(
        name for name, part in parts.items() for key, own in part.state_dict().items()
        if own.shape != weights[name][key].shape
    )  # fmt: skip


def check_narrow(
    name: str, part: nn.Module, state: State, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless tensors are those of a part with fewer inner channels, which takes and gives the same.

    Args:
        name: of the part.
        part: as the backbone has it.
        state: its tensors, smaller here and there.
        in_shape, out_shape: of one image's activations before and behind the part.
    """
    own = part.state_dict()
    fixed = {key for key in own if not isinstance(part.get_submodule(key.rpartition(".")[0]), _RESIZABLE)}
    for key, tensor in own.items():
        wanted, given = tuple(tensor.shape), tuple(state[key].shape)
        shrunk = len(given) == len(wanted) and all(1 <= a <= b for a, b in zip(given, wanted, strict=True))
        if given != wanted and (key in fixed or not shrunk):
            allowed = wanted if key in fixed else f"at most {wanted}"
            raise ValueError(f"tensor {key} of {name}, which is pruned, is {given}; it must be {allowed}")
    if not narrow_parts({name: part}, {name: state}):
        raise ValueError(f"{name} counts as pruned, but none of its tensors is smaller than the backbone's")
    skeleton = copy.deepcopy(part).to("meta").eval()  # where shapes are checked and nothing is computed
    x = torch.empty(1, *in_shape, device="meta", dtype=next(part.parameters()).dtype)
    try:
        with torch.no_grad():
            shape = tuple(narrowed(skeleton, state)(x).shape[1:])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the tensors of {name}, which is pruned, don't fit together: {error}") from error
    if shape != tuple(out_shape):
        raise ValueError(f"{name}, which is pruned, gives activations of {shape}; the next part takes {out_shape}")


def _in_place_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    tensor = new.detach().to(old)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _declare_widths(path: str, module: nn.Module) -> None:
    """Sets what a module says of its widths by its tensors, in place."""
    is_norm = not isinstance(module, nn.Conv2d | nn.Linear)
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dim() > 0]
    widths = {tensor.shape if is_norm else tensor.shape[:1] for tensor in own}
    if len(widths) > 1:  # torch would broadcast a bias of one number
        raise ValueError(f"tensors of {path} have sizes {', '.join(str(tuple(width)) for width in widths)}")
    if not widths:
        return
    (width,) = widths
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels == module.out_channels > 1:  # depthwise
            module.groups = module.in_channels = module.out_channels = width[0]
        else:
            module.out_channels, module.in_channels = width[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(width)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = width[0]
    elif isinstance(module, _BatchNorm):
        module.num_features = width[0]
