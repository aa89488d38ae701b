"""What is trained: of a tuned part all, its biases or norms, or small adapters merged in the end; and the readout."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.engine.recipe import Recipe
from subtuning_lab.nets.chain import Chain, in_order
from subtuning_lab.nets.heads import Start, empty_readout, fill_readout
from subtuning_lab.utils.random import Stream, seeded

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def new_head(
    backbone: Chain,
    num_classes: int,
    seed: int,
    *,
    depth: int = 1,
    siamese: bool = False,
    start: Start | None = None,
) -> nn.Module:
    """A readout that starts at the same random weights for every candidate of a seed, or at given ones.

    Args:
        backbone: says the features' width, device and dtype.
        num_classes: number of logits.
        seed: of the random weights.
        depth: number of its linear layers.
        siamese: whether it sees the frozen features beside the tuned ones.
        start: weights by tensor name, of a readout as deep that saw the features once.
    """
    head = empty_readout(backbone.num_features, num_classes, depth, siamese)
    fill_readout(head, seeded(Stream.HEAD, seed), start)
    return head.to(backbone.mean.device, backbone.mean.dtype)


def tune_parts(backbone: Chain, blocks: Iterable[str], recipe: Recipe, seed: int = 0) -> dict[str, nn.Module]:
    """Copies of a subset's parts in which what the recipe names, and nothing else, wants gradients.

    Args:
        backbone: the pretrained chain.
        blocks: names of the tuned parts.
        recipe: what of them is trained, and where it starts.
        seed: of an adapter's and of new weights' random start.

    Returns:
        The parts by name, in the network's order.

    Raises:
        ValueError: a subset in which the recipe finds nothing to train, or what it can't train.
        ImportError: an adapter without the extra `peft`.
    """
    tuned = {
        name: tune(backbone.part(name), recipe, seed, backbone.part_names.index(name))
        for name in in_order(backbone, blocks)
    }
    if tuned and not recipe.trains_all and not count_trained(tuned.values()):
        what = f"adapter {recipe.adapter}" if recipe.adapter else f"params {recipe.params}"
        what += f" on {recipe.lora_targets}" if recipe.adapter == "lora" else ""
        what += " without BatchNorm (lr_scaling rgn)" if recipe.lr_scaling == "rgn" else ""
        raise ValueError(f"{', '.join(tuned)} of {backbone.name} have nothing that {what} could train")
    return tuned


def tune(part: nn.Module, recipe: Recipe, seed: int = 0, position: int = 0) -> nn.Module:
    """As `tune_parts`, of one part, stem, block or tail, at its position in the network."""
    part = copy.deepcopy(part).requires_grad_(False)
    if recipe.init == "random":
        _reset(part, _start_seed(Stream.WEIGHTS, seed, position))
    if recipe.adapter is not None:
        return _with_adapter(part, recipe, seed, position)
    for parameter in _chosen(part, recipe):
        parameter.requires_grad_()
    return part


def count_trained(parts: Iterable[nn.Module]) -> int:
    """Parameters that want gradients."""
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def check_adapters(parts: Mapping[str, nn.Module], recipe: Recipe) -> None:
    """Raises ValueError for adapters in tuned parts, by name, to which the first step's backward gave no gradient.

    Weights that a block reads without calling their layer are such a case: nothing in them would ever be trained.
    """
    if recipe.adapter is None:
        return
    idle = [
        f"{name}.{layer}"
        for name, part in parts.items()
        for layer, module in part.named_modules()
        if (trained := [p for p in module.parameters(recurse=True) if p.requires_grad])
        and hasattr(module, "base_layer")
        and all(p.grad is None or not p.grad.any() for p in trained)
    ]
    if idle:
        raise ValueError(
            f"adapter {recipe.adapter!r} gets no gradient in {', '.join(idle[:5])}{' ...' * (len(idle) > 5)}: "
            "the network doesn't call these layers, or nothing depends on them"
        )


def plain_part(part: nn.Module) -> nn.Module:
    """A tuned part as its backbone has it: adapters are merged into the parameters that they stand beside."""
    return _unloaded(copy.deepcopy(part)) if isinstance(part, _Adapted) else part


class _Adapted(nn.Sequential):
    """A part with adapters in it; the one child lets the part itself be what is adapted."""


def _chosen(part: nn.Module, recipe: Recipe) -> Iterator[nn.Parameter]:
    """The part's parameters that a recipe without adapter trains."""
    for module in part.modules():
        if recipe.lr_scaling == "rgn" and isinstance(module, _BatchNorm):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if recipe.params == "all" or (isinstance(module, _NORMS) if recipe.params == "norm" else name == "bias"):
                yield parameter


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
