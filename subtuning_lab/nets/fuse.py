"""Frozen BatchNorm folded into the convolution before it: the same function with fewer passes over memory."""

from __future__ import annotations

import copy
from itertools import zip_longest

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(part: nn.Module, example: torch.Tensor) -> nn.Module:
    """A frozen copy of the part with BatchNorm folded away where that leaves its output the same.

    Args:
        part: module in eval mode.
        example: an input of the part (batch, ...); the copy is compared with the part on it.

    Returns:
        The folded copy, or the part itself if it has nothing to fold or the outputs differ.
    """
    folded = copy.deepcopy(part).eval().requires_grad_(False)
    if not _fold_children(folded):
        return part
    return folded if _agree(part, folded, example) else part


def _agree(part: nn.Module, folded: nn.Module, example: torch.Tensor) -> bool:
    """Whether both give the same output, up to the rounding of the example's precision."""
    # Rounding grows with the sums inside a convolution; a wrong fold is off by the size of the output.
    tolerance = 1e3 * torch.finfo(example.dtype).eps
    if example.is_cuda:  # where float32 products are rounded more coarsely by default (TF32)
        part, folded, example = copy.deepcopy(part).double(), copy.deepcopy(folded).double(), example.double()
    with torch.no_grad():
        expected, output = part(example.clone()), folded(example.clone())  # either may write into its input
    return bool((output - expected).abs().amax() <= tolerance * expected.abs().amax())


def _fold_children(module: nn.Module) -> bool:
    """Folds every convolution whose next sibling is its BatchNorm; returns whether there was one."""
    children, found = list(module.named_children()), False
    for (name, child), (next_name, following) in zip_longest(children, children[1:], fillvalue=("", None)):
        if _is_pair(child, following):
            setattr(module, name, fuse_conv_bn_eval(child, following))
            # timm's BatchNormAct2d carries the activation that comes next.
            activation = nn.Sequential(following.drop, following.act) if hasattr(following, "act") else nn.Identity()
            setattr(module, next_name, activation)
            found = True
        else:
            found = _fold_children(child) or found
    return found


def _is_pair(child: nn.Module, following: nn.Module | None) -> bool:
    return (
        isinstance(child, nn.Conv2d)
        and isinstance(following, nn.BatchNorm2d)
        and following.num_features == child.out_channels
        and following.running_mean is not None
    )
