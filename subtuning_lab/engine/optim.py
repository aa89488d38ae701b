"""The optimizer: AdamW, whose groups have learning rates of their own, and the course that these take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from subtuning_lab.engine.recipe import Recipe

Group = dict[str, object]
RGN_BATCHES = 5  # at the start of an epoch, whose gradients say how fast each tensor learns


def parameter_groups(parts: Mapping[int, nn.Module], depth: int, head: nn.Module, recipe: Recipe) -> list[Group]:
    """The optimizer's groups for one candidate: its readout, and what it trains of its parts.

    Args:
        parts: the tuned parts by position in the network, stem 0.
        depth: position of the network's last part.
        head: the readout; one that linear probing has trained before goes on at the blocks' learning rate.
        recipe: learning rates, their decay from part to part, and their scaling.
    """
    probed = recipe.head_start == "probe" and parts
    head_lr = recipe.lr if probed or recipe.head_lr is None else recipe.head_lr
    trained = [([*head.parameters()], head_lr, recipe.weight_decay)]
    decay = 0.0 if recipe.adapter == "ia3" else recipe.weight_decay  # factors around 1 would decay to 0
    for position, part in parts.items():
        lr = recipe.lr * recipe.lr_decay ** (depth - position)
        trained.append(([p for p in part.parameters() if p.requires_grad], lr, decay))
    if recipe.lr_scaling == "rgn" and parts:
        family = object()  # marks the tensors of one candidate, each of which is a group
        trained = [([p], lr, decay) for parameters, lr, decay in trained for p in parameters]
        return [_group(*settings) | {"family": family} for settings in trained]
    return [_group(*settings) for settings in trained if settings[0]]


def _group(params: list[nn.Parameter], lr: float, weight_decay: float) -> Group:
    return {"params": params, "peak_lr": lr, "lr": lr, "weight_decay": weight_decay}


def adamw(groups: Iterable[Group]) -> torch.optim.AdamW:
    """AdamW over parameter groups, whose learning rates are the peaks of the schedule."""
    together: dict[object, Group] = {}  # one group for all with equal settings makes one fused update
    for group in groups:
        key = id(group) if "family" in group else (group["lr"], group["weight_decay"])
        together.setdefault(key, group | {"params": []})["params"] += group["params"]
    return torch.optim.AdamW(list(together.values()), fused=True)


def set_lr(optimizer: torch.optim.AdamW, step: int, total: int, warmup: float) -> None:
    """Declares the learning rates of one step, counted from 0, out of all."""
    # Torch's schedulers and their optimizer hold each other, and with them the weights of finished passes.
    factor = lr_factor(step, total, warmup)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"] * group.get("share", 1.0)


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Learning rate of one step as a share of its peak: linear warm-up, then a half cosine to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def scale_by_relative_gradients(optimizer: torch.optim.Optimizer, losses: Iterable[torch.Tensor]) -> None:
    """Declares each tensor's share of its learning rate: its relative gradient norm, a candidate's largest being 1.

    The norm is ||gradient|| / ||weights||, a mean over batches. A tensor of zeros has none, and stays.

    Args:
        optimizer: groups with a `family` are scaled, each family by itself.
        losses: of a few batches at the start of an epoch, each summed over the candidates.
    Source: surgical finetuning's Auto-RGN: per tensor, over 5 batches, anew in every epoch, BatchNorm left out and the
        readout included. There is no word on tensors of zeros there. The batches are the epoch's first.
    """
    groups = [group for group in optimizer.param_groups if "family" in group]
    if not groups:
        return
    weights = [group["params"][0] for group in groups]
    ratios = torch.zeros(len(groups), dtype=torch.float64)
    for loss in losses:
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        norms, sizes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (gradients, weights))
        ratios += torch.where(sizes > 0, norms / sizes, 0).detach().cpu().double()
    families: dict[object, float] = {}
    for group, ratio in zip(groups, ratios.tolist(), strict=True):
        families[group["family"]] = max(ratio, families.get(group["family"], 0.0))
    for group, ratio in zip(groups, ratios.tolist(), strict=True):
        group["share"] = ratio / (families[group["family"]] or 1.0)
