"""What is trained: of a tuned part all, its biases or norms, or small adapters merged in the end; and the readout."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

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
    uses = {} if recipe.adapter is None else _uses_of(backbone)
    tuned = {
        name: tune(backbone.part(name), recipe, seed, backbone.part_names.index(name), uses.get(name))
        for name in in_order(backbone, blocks)
    }
    if tuned and not recipe.trains_all and not count_trained(tuned.values()):
        what = f"adapter {recipe.adapter}" if recipe.adapter else f"params {recipe.params}"
        what += f" on {recipe.lora_targets}" if recipe.adapter == "lora" else ""
        what += " without BatchNorm (lr_scaling rgn)" if recipe.lr_scaling == "rgn" else ""
        raise ValueError(f"{', '.join(tuned)} of {backbone.name} have nothing that {what} could train")
    return tuned


def tune(part: nn.Module, recipe: Recipe, seed: int = 0, position: int = 0, uses: Uses | None = None) -> nn.Module:
    """As `tune_parts`, of one part, stem, block or tail, at its position in the network."""
    part = copy.deepcopy(part).requires_grad_(False)
    if recipe.init == "random":
        _reset(part, _start_seed(Stream.WEIGHTS, seed, position))
    if recipe.adapter is not None:
        return _with_adapter(part, recipe, seed, position, uses or Uses())
    for parameter in _chosen(part, recipe):
        parameter.requires_grad_()
    return part


def count_trained(parts: Iterable[nn.Module]) -> int:
    """Parameters that want gradients."""
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)


def check_adapters(parts: Mapping[str, nn.Module], recipe: Recipe) -> None:
    """Raises ValueError for adapters of tuned parts, by name, that the first step's backward gave no gradient."""
    if recipe.adapter is None or not parts:
        return
    gradients = {
        f"{i}.{name}": p.grad for i, part in parts.items() for name, p in part.named_parameters() if p.requires_grad
    }
    idle = [name for name, gradient in gradients.items() if gradient is None]
    if idle or not any(gradient.any() for gradient in gradients.values()):
        names = ", ".join(idle[:4]) + " ..." * (len(idle) > 4) if idle else ", ".join(parts)
        raise ValueError(f"adapter {recipe.adapter} gets no gradient in {names}; it would train nothing there")


@torch.no_grad()
def check_merging(backbone: Chain, blocks: Iterable[str], recipe: Recipe, example: torch.Tensor) -> None:
    """Raises ValueError for blocks in which what an adapter trains is not what would be saved of it.

    So it is where a layer's weight is tied to another, read beside the layer's call, or given by a parametrization.
    Found by running each block with adapters far from their start, in both of autograd's modes, and its own copy
    with the merged weights.

    Args:
        backbone: the pretrained chain, in eval mode throughout.
        blocks: names of the tuned parts.
        recipe: with an adapter.
        example: normalized images (batch, 3, height, width).
    """
    uses, apart = _uses_of(backbone), []
    for position, (name, part) in enumerate(zip(backbone.part_names, backbone.parts, strict=True)):
        if name in blocks:
            tuned = tune(part, recipe, 0, position, uses.get(name)).eval()
            _move_away(tuned, recipe)
            weights, served = plain_part(tuned).state_dict(), copy.deepcopy(part).eval()
            outputs = [tuned(example.clone())]
            with torch.enable_grad():
                outputs.append(tuned(example.clone()).detach())
            same = weights.keys() == served.state_dict().keys()
            if same:
                served.load_state_dict(weights)
                output = served(example.clone())
                same = all((one - output).abs().amax() <= 1e-2 * output.abs().amax() for one in outputs)
            if not same:
                apart.append(name)
        example = copy.deepcopy(part).eval()(example.clone())
    if apart:
        raise ValueError(
            f"adapter {recipe.adapter} can't be used on {', '.join(apart)} of {backbone.name}: what it trains there is "
            "not what its merged weights compute, e.g. because layers share a weight, a weight is read beside its "
            "layer's call, or has a parametrization such as weight_norm; tune other blocks, or give adapter=None"
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


def _with_adapter(part: nn.Module, recipe: Recipe, seed: int, position: int, uses: Uses) -> nn.Module:
    """The part with its layers adapted, those in place whose weights it reads without calling them."""
    called, read = _targets(part, recipe, uses)
    adapted = _Adapted(part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_start_seed(Stream.ADAPTER, seed, position))
        if called:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")  # of timm's own kinds of LayerNorm
                adapted = peft().inject_adapter_in_model(_adapter_config(recipe, called), adapted)
        for module, name in read:
            register_parametrization(module, name, _LowRank(getattr(module, name), recipe.rank))
    return adapted if called or read else part


def _targets(part: nn.Module, recipe: Recipe, uses: Uses) -> tuple[list[str], list[tuple[nn.Module, str]]]:
    """What an adapter is for: names of layers that are called, and weights that are read, as (module, name)."""
    kinds = nn.LayerNorm if recipe.adapter == "ln_tuning" else (nn.Linear, nn.Conv2d)
    # Grouped convolutions have no low-rank addition of their own.
    layers = {n: m for n, m in part.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1}
    passed = {  # torch's own layer reads these two past their calls where nothing wants gradients
        f"{n}.{linear}".lstrip(".")
        for n, m in part.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer)
        for linear in ("linear1", "linear2")
    }
    in_place = uses.read | (passed if recipe.adapter == "lora" else set())
    read = [(n, "weight") for n in layers if n in in_place]
    if kinds != nn.LayerNorm:
        fused = {n: m for n, m in part.named_modules() if isinstance(m, nn.MultiheadAttention)}
        read += [
            (n, name) for n, m in fused.items() for name, _ in m.named_parameters(recurse=False) if "weight" in name
        ]
    called = [n for n in layers if n not in in_place | uses.unused]
    if recipe.adapter == "lora" and recipe.lora_targets == "attention":
        inside = _in_attention(part)
        called, read = [n for n in called if n in inside], [target for target in read if target[0] in inside]
    if read and recipe.adapter != "lora":
        kind = type(part.get_submodule(read[0][0])).__name__
        raise ValueError(
            f"adapter {recipe.adapter} can't adapt {read[0][0] or 'the part'} ({kind}), whose weights the network "
            'reads without calling a layer; "lora" can'
        )
    return [f"0.{n}" if n else "0" for n in called], [(part.get_submodule(n), name) for n, name in read]


def _in_attention(part: nn.Module) -> set[str]:
    """Names of all modules in the innermost ones that are called attention and hold weights, these themselves too."""
    named = {n: type(m).__name__ for n, m in part.named_modules() if any(True for _ in m.parameters())}
    attention = {n for n, kind in named.items() if re.search("attn|attention", f"{n.split('.')[-1]} {kind}", re.I)}
    below = {n: {other for other in named if n in ("", other) or other.startswith(f"{n}.")} for n in attention}
    return {name for n, names in below.items() if names & attention == {n} for name in names}


def _adapter_config(recipe: Recipe, targets: list[str]) -> object:
    """What `peft` is to do with layers of those names."""
    library = peft()
    if recipe.adapter == "lora":
        return library.LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=0.0, target_modules=targets)
    if recipe.adapter == "ia3":
        inner = [name for name in targets if name.endswith("fc2")]  # IA3 scales what enters an MLP's second product
        return library.IA3Config(target_modules=targets, feedforward_modules=inner)
    return library.LNTuningConfig(target_modules=targets)


def _move_away(tuned: nn.Module, recipe: Recipe) -> None:
    """Moves adapters far from their start, in place, such that a weight changes by about half of its size."""
    generator = torch.Generator().manual_seed(0)
    size = 0.3 / recipe.rank**0.5 if recipe.adapter == "lora" else 0.3
    for parameter in (p for p in tuned.parameters() if p.requires_grad):
        step = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(step * size * (float(parameter.square().mean().sqrt()) or 1.0))


class _LowRank(nn.Module):
    """A weight's low-rank addition, as `peft` starts and scales it, wherever the weight is read."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        rows = weight.new_empty(rank, weight[0].numel(), device="cpu")
        self.a = nn.Parameter(nn.init.kaiming_uniform_(rows, a=5**0.5).to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 2 * (self.b @ self.a).to(weight.dtype).view_as(weight)


@dataclass(frozen=True)
class Uses:
    """Layers of a part, by name, whose weights are read while they themselves are not called, and unused ones."""

    read: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()


_USES: WeakKeyDictionary[Chain, dict[str, Uses]] = WeakKeyDictionary()


@torch.enable_grad()
def _uses_of(backbone: Chain) -> dict[str, Uses]:
    """How every part uses its layers, told by a forward and a backward on the meta device, where nothing is computed.

    Of a network that can't run there, or not at its `input_size`, nothing is known; `check_adapters` is left then.
    """
    if backbone not in _USES:
        skeleton = copy.deepcopy(backbone).to("meta").eval().requires_grad_()
        called: set[nn.Module] = set()
        for module in skeleton.modules():
            module.register_forward_hook(lambda module, *_: called.add(module))
        image = torch.empty(2, *backbone.input_size, dtype=backbone.mean.dtype, device="meta")
        try:
            for part in skeleton.parts:
                image = part(image)
            image.sum().backward()
        except (RuntimeError, NotImplementedError, AssertionError, ValueError):
            _USES[backbone] = dict.fromkeys(backbone.part_names, Uses())
            return _USES[backbone]
        _USES[backbone] = {
            name: _uses_in(part, called) for name, part in zip(backbone.part_names, skeleton.parts, strict=True)
        }
    return _USES[backbone]


def _uses_in(part: nn.Module, called: set[nn.Module]) -> Uses:
    idle = {n: m for n, m in part.named_modules() if m not in called and any(True for _ in m.parameters(False))}
    read = {n for n, m in idle.items() if any(p.grad is not None for p in m.parameters(False))}
    return Uses(frozenset(read), frozenset(idle) - read)


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
        lists = parent.parametrizations.values() if is_parametrized(parent) else ()
        if lists and all(isinstance(one, _LowRank) for some in lists for one in some):  # others are the network's own
            weights = {name: nn.Parameter(getattr(parent, name).detach()) for name in parent.parametrizations}
            del parent.parametrizations
            parent.__class__ = type(parent).__mro__[1]  # torch's own way changes the class, which copies share
            for name, weight in weights.items():
                parent.register_parameter(name, weight)
    return part[0]
