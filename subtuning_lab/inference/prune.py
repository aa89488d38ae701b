"""Channel pruning of tuned blocks: fewer inner channels, the same input and output, the frozen parts untouched."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import nn

from subtuning_lab.data.decode import LARGEST_SIZE
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, copy_weights, in_order, put_parts, set_trainable
from subtuning_lab.utils.containers import Blocks
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import OneOf, Real, Whole, checked

SCOPES: tuple[str, ...] = ("local", "global")
IMPORTANCES: dict[str, int | None] = {"l1": 1, "l2": 2, "random": None}  # name -> the norm's exponent


@checked
@dataclass(frozen=True)
class Pruning:
    """How inner channels are chosen.

    Args:
        ratio: share of the inner channels that are removed, above 0 and below 1; each layer keeps at least one.
        scope: "local" removes this share of every layer, "global" of all layers of all pruned blocks together, where
            a channel's importance counts relative to the mean of its layer.
        importance: "l1" or "l2" for the norm of all weights that make or read a channel, or "random".
        seed: of random importance.
    """

    ratio: Annotated[float, Real(0, 1, above=True, below=True)]
    scope: Annotated[str, OneOf(SCOPES)] = "local"
    importance: Annotated[str, OneOf(tuple(IMPORTANCES))] = "l1"
    seed: Annotated[int, Whole()] = 0


@checked(**Pruning.rules)
def prune_blocks(
    tuned: TunedTask, ratio: float, scope: str = "local", importance: str = "l1", seed: int = 0
) -> TunedTask:
    """Prunes the inner channels of a task's tuned blocks; nothing is trained.

    What frozen parts read stays: a block's input and output keep their width, and so do attention's heads. Pruned are
    channels between a residual block's convolutions, hidden units of MLPs and of squeeze-and-excitation.

    Args:
        tuned: stays as it is.
        ratio, scope, importance, seed: of `Pruning`. Grouped convolutions lose the same channel in each group.
    Returns:
        A task of the same backbone with smaller blocks; tuned blocks that have no inner channels stay whole. It has no
        scores, since those of `tuned` aren't its own.
    Raises:
        ImportError: without the extra `pruning`.
        ValueError: a value out of its range, or tuned blocks of which none has inner channels.
    Source: PAPER, ablations (channel pruning of the tuned blocks), which prunes by Torch-Pruning (Fang et al. 2023,
        "DepGraph"), as here; the paper's setting is layer4 of ResNet-50, ratio 0.5, local, L1.
    """
    pruning, chain = Pruning(ratio, scope, importance, seed), tuned.network().backbone
    narrow = _narrow(chain, tuned.blocks, pruning, tuned.image_size)
    return replace(
        tuned,
        weights={**tuned.weights, **copy_weights(narrow)},
        pruned=tuned.pruned | narrow.keys(),
        provenance={**tuned.provenance, "pruning": asdict(pruning)},
        scores={},
    )


@checked(**Pruning.rules)
def prune_backbone(
    backbone: Chain,
    blocks: Annotated[Iterable[str], Blocks()],
    ratio: float,
    scope: str = "local",
    importance: str = "l1",
    seed: int = 0,
    image_size: Annotated[int | None, Whole(1, LARGEST_SIZE).or_none()] = None,
) -> Chain:
    """A copy of a backbone with fewer inner channels in some pretrained blocks, to tune what is left of them.

    Args:
        backbone: stays as it is.
        blocks: names of the parts to prune.
        ratio, scope, importance, seed: of `Pruning`, see `prune_blocks`.
        image_size: side in pixels that the network will see; by default the one of its pretraining.
    """
    pruning, pruned = Pruning(ratio, scope, importance, seed), set_trainable(copy.deepcopy(backbone), [])
    put_parts(pruned, _narrow(pruned, blocks, pruning, image_size))
    pruned.name = f"{backbone.name}, pruned"
    return set_trainable(pruned, [])


class _Layer(NamedTuple):
    """Channels between two layers of a part, which are removed from all that make or read them.

    `units` holds the channels that go together: (units, channels each), one channel each except in grouped
    convolutions. `scores` (units,) is their importance.
    """

    graph: object
    module: nn.Module
    units: torch.Tensor
    scores: torch.Tensor


def _narrow(chain: Chain, blocks: Iterable[str], pruning: Pruning, image_size: int | None) -> dict[str, nn.Module]:
    """New modules for those of the blocks that have inner channels."""
    names, inputs = in_order(chain, blocks), _inputs(chain, image_size)
    parts = {name: copy.deepcopy(chain.part(name)).requires_grad_() for name in names}  # tracing goes by gradients
    layers = {name: _inner_layers(part, inputs[name], pruning) for name, part in parts.items()}
    if not any(layers.values()):
        raise ValueError(
            f"{', '.join(names) or 'no block'} of {chain.name}: nothing to prune; a block must have channels that no "
            "frozen part reads, outside attention"
        )
    chosen = [layer for name in names for layer in layers[name]]
    if pruning.importance == "random":
        draws = seeded(Stream.PRUNING, pruning.seed)
        chosen = [layer._replace(scores=torch.rand(len(layer.units), generator=draws)) for layer in chosen]
    for layer, units in zip(chosen, _least_important([layer.scores for layer in chosen], pruning), strict=True):
        _remove(layer, units)
    narrow = {name: parts[name].requires_grad_(False).eval() for name in names if layers[name]}
    return {name: part for name, part in narrow.items() if _size(part) < _size(chain.part(name))}


def _inputs(chain: Chain, image_size: int | None) -> dict[str, torch.Tensor]:
    """What each part takes in when the network sees two random images."""
    size = chain.input_size[1:] if image_size is None else (image_size, image_size)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(chain.mean)
    inputs = {}
    with torch.no_grad():
        for name, part in zip(chain.part_names, chain.parts, strict=True):
            inputs[name] = x
            x = part(x.clone())  # a part may write into its input
    return inputs


def _inner_layers(part: nn.Module, x: torch.Tensor, pruning: Pruning) -> list[_Layer]:
    """The layers of a part whose channels can go without a change of its input and output."""
    library = torch_pruning()
    importance = library.importance.GroupMagnitudeImportance(p=IMPORTANCES[pruning.importance] or 1)
    graph, layers = _traced(part, x), []
    paths = {module: path for path, module in part.named_modules()}
    for group in graph.get_all_groups(ignored_layers=_attention(part)):
        module, units = group[0].dep.target.module, _units(group)
        # With 2 channels, a layer of the output could lose one and be broadcast.
        if units.numel() >= 3 and len(units) > 1 and _keeps_shapes(part, x, paths[module], units[0]):
            scores = importance(group).cpu().double()  # Apple's GPUs have no float64
            layers.append(_Layer(graph, module, units, scores[units].mean(1)))
    return layers


def _units(group: object) -> torch.Tensor:
    """Channels of a group that must go together, (units, channels each)."""
    members = [dependency.target.module for dependency, _ in group]
    counts = [m.groups for m in members if isinstance(m, nn.Conv2d) and m.groups < m.out_channels]
    counts += [m.num_groups for m in members if isinstance(m, nn.GroupNorm)]
    return torch.arange(len(group[0].idxs)).view(max(counts, default=1), -1).T


def _keeps_shapes(part: nn.Module, x: torch.Tensor, path: str, unit: torch.Tensor) -> bool:
    """Whether a part still takes the same input and gives the same shape without some channels: tried on a copy."""
    trial = copy.deepcopy(part)
    graph, module = _traced(trial, x), trial.get_submodule(path)
    with torch.no_grad():
        before = trial(x.clone()).shape
        _remove(_Layer(graph, module, unit[None], torch.zeros(1)), torch.tensor([0]))
        try:
            return trial(x.clone()).shape == before
        except RuntimeError:  # tensors that don't fit together any more
            return False


def _least_important(scores: list[torch.Tensor], pruning: Pruning) -> list[torch.Tensor]:
    """Which units of each layer go; the best of each stays."""
    if pruning.scope == "local":
        return [s.argsort(stable=True)[: min(len(s) - 1, round(pruning.ratio * len(s)))] for s in scores]
    kept = [s.index_fill(0, s.argmax(), torch.inf) for s in scores]
    ranked = torch.cat(kept).argsort(stable=True)
    gone = ranked[: min(len(ranked) - len(scores), round(pruning.ratio * len(ranked)))]
    starts = itertools.accumulate(map(len, scores), initial=0)
    return [gone[(gone >= start) & (gone < start + len(s))] - start for start, s in zip(starts, scores, strict=False)]


def _remove(layer: _Layer, units: torch.Tensor) -> None:
    """Takes units out of the part that the layer is in, in place."""
    channels = layer.units[units].flatten().sort().values.tolist()
    if channels:
        pruner = layer.graph.get_pruner_of_module(layer.module)
        layer.graph.get_pruning_group(layer.module, pruner.prune_out_channels, channels).prune()


def _traced(part: nn.Module, x: torch.Tensor) -> object:
    """The dependency graph of a part: which channels of which modules belong together."""
    with torch.enable_grad():
        return torch_pruning().DependencyGraph().build_dependency(part, x.clone(), verbose=False)


def _attention(part: nn.Module) -> list[nn.Module]:
    """All modules inside of attention, whose heads and products need the widths that they have."""
    attention = [module for module in part.modules() if "Attention" in type(module).__name__]
    return [inner for module in attention for inner in module.modules()]


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def torch_pruning() -> object:
    """The library `torch_pruning`. Raises ImportError that names the extra where it is missing."""
    try:
        import torch_pruning as library
    except ImportError as error:
        raise ImportError('pruning needs the extra "pruning": pip install "subtuning-lab[pruning]"') from error
    return library
