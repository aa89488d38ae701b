"""What of a tuned block is trained: all of it, its biases or norms, or small adapters that are merged in the end."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.nets.chain import Chain, subset_of
from subtuning_lab.utils.random import Stream, seeded

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def tune(part: nn.Module, recipe: Recipe, seed: int = 0, position: int = 0) -> nn.Module:
    """A copy of a part in which what the recipe names, and nothing else, wants gradients.

    Args:
        part: stem, block or tail of a chain.
        recipe: `params`, `adapter`, `rank` and `init` matter here.
        seed, position: of an adapter's and of new weights' random start.

    Raises:
        ImportError: an adapter without the extra `peft`.
        ValueError: weights that can't be made anew.
    """
    part = copy.deepcopy(part).requires_grad_(False)
    if recipe.init == "random":
        _reset(part, _start_seed(Stream.WEIGHTS, seed, position))
    if recipe.adapter is not None:
        return _with_adapter(part, recipe, seed, position)
    for parameter in _chosen(part, recipe.params):
        parameter.requires_grad_()
    return part


def tune_parts(backbone: Chain, blocks: Iterable[str], recipe: Recipe, seed: int = 0) -> dict[str, nn.Module]:
    """The tuned parts of a subset by name, in the network's order.

    Raises:
        ValueError: a subset in which the recipe finds nothing to train.
    """
    subset = subset_of(backbone, blocks)
    tuned = {
        name: tune(backbone.part(name), recipe, seed, position)
        for position, name in enumerate(backbone.part_names)
        if name in subset
    }
    narrowed = recipe.adapter is not None or recipe.params != "all"
    if tuned and narrowed and not count_trained(tuned.values()):
        what = f"adapter {recipe.adapter}" if recipe.adapter else f"params {recipe.params}"
        raise ValueError(f"{', '.join(tuned)} of {backbone.name} have nothing that {what} could train")
    return tuned


def count_trained(parts: Iterable[nn.Module]) -> int:
    """Parameters that want gradients."""
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def plain_part(part: nn.Module) -> nn.Module:
    """A tuned part as its backbone has it: adapters are merged into the parameters that they stand beside."""
    return _unloaded(copy.deepcopy(part)) if isinstance(part, _Adapted) else part


class _Adapted(nn.Sequential):
    """A part with adapters in it; the one child lets the part itself be what is adapted."""


def _chosen(part: nn.Module, params: str) -> list[nn.Parameter]:
    if params == "bias":
        return [p for name, p in part.named_parameters() if name.rpartition(".")[-1] == "bias"]
    if params == "norm":
        return [p for module in part.modules() if isinstance(module, _NORMS) for p in module.parameters()]
    return list(part.parameters())


def _start_seed(stream: Stream, seed: int, position: int) -> int:
    return int(torch.randint(2**62, (), generator=seeded(stream, seed, position)))


def _reset(part: nn.Module, seed: int) -> None:
    """Makes a part's weights and statistics anew, in place, as its modules do when they are built."""
    first = next(part.parameters(), None)
    if first is None:
        return
    device = first.device
    part.cpu()  # where the random numbers are the same for every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in part.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif [*module.parameters(recurse=False)]:
                kind = type(module).__name__
                raise ValueError(f'init is "random", but {name or "the part"} ({kind}) has no way to start anew')
    part.to(device)


def _with_adapter(part: nn.Module, recipe: Recipe, seed: int, position: int) -> nn.Module:
    config = _adapter_config(recipe, _Adapted(part))
    if config is None:
        return part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_start_seed(Stream.ADAPTER, seed, position))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # of timm's own kinds of LayerNorm
            return peft().inject_adapter_in_model(config, _Adapted(part))


def _adapter_config(recipe: Recipe, adapted: nn.Module) -> object | None:
    """What `peft` is to do with a part; None where it has nothing to adapt."""
    library = peft()
    kinds = nn.LayerNorm if recipe.adapter == "ln_tuning" else (nn.Linear, nn.Conv2d)
    # Grouped convolutions have no low-rank addition of their own.
    targets = [n for n, m in adapted.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1]
    if not targets:
        return None
    if recipe.adapter == "lora":
        return library.LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=0.0, target_modules=targets)
    if recipe.adapter == "ia3":
        inner = [name for name in targets if name.endswith("fc2")]  # IA3 scales what enters an MLP's second product
        return library.IA3Config(target_modules=targets, feedforward_modules=inner)
    return library.LNTuningConfig(target_modules=targets)


def peft() -> object:
    """The library `peft`. Raises ImportError that names the extra where it is missing."""
    try:
        import peft as library
    except ImportError as error:
        raise ImportError('adapters need the extra "peft": pip install "subtuning-lab[peft]"') from error
    return library


def _unloaded(part: nn.Module) -> nn.Module:
    """The part itself, its adapters merged, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    return part[0]
