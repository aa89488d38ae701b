"""How the networks of timm, and our own, read as a chain."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from timm.data import resolve_model_data_config
from timm.models.convnext import ConvNeXt, ConvNeXtStage
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet, RegStage
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer, SwinTransformerStage
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.cifar_resnet import CifarResNet


@dataclass(frozen=True)
class Family:
    """Where a model class keeps its blocks.

    Args:
        stages: attributes that hold the blocks, in order. Attributes before them make the stem, those behind the tail.
        after: attributes that `forward_features` applies behind the blocks, in order.
        readout: the classifiers, which the chain leaves out.
    """

    stages: tuple[str, ...]
    readout: tuple[str, ...]
    after: tuple[str, ...] = ()


FAMILIES: dict[type[nn.Module], Family] = {
    ResNet: Family(("layer1", "layer2", "layer3", "layer4"), readout=("fc",)),
    CifarResNet: Family(("layer1", "layer2", "layer3"), readout=("linear",)),
    VisionTransformerDistilled: Family(("blocks",), readout=("head", "head_dist"), after=("norm",)),
    VisionTransformer: Family(("blocks",), readout=("head",), after=("norm",)),
    ConvNeXt: Family(("stages",), readout=("head.fc",), after=("norm_pre",)),
    SwinTransformer: Family(("layers",), readout=("head.fc",), after=("norm",)),
    EfficientNet: Family(("blocks",), readout=("classifier",), after=("conv_head", "bn2")),
    MobileNetV3: Family(("blocks",), readout=("classifier",)),
    RegNet: Family(("s1", "s2", "s3", "s4"), readout=("head.fc",), after=("final_conv",)),
}


def family_of(model: nn.Module) -> Family | None:
    """Where the model keeps its blocks, or None for a class that isn't known."""
    return next((family for kind, family in FAMILIES.items() if isinstance(model, kind)), None)


class _Stem(nn.Module):
    """All that the model computes before its first block: its own `forward_features` with the blocks taken out."""

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        names = [name for name, _ in model.named_children()]
        later = set(names[names.index(family.stages[0]) :])
        self.model = _without(model, later)
        for name in later & {*family.stages, *family.after}:
            setattr(self.model, name, nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


class _Tail(nn.Module):
    """All that the model computes behind its last block, up to the features."""

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        names = [name for name, _ in model.named_children()]
        earlier = set(names[: names.index(family.stages[-1]) + 1])
        self.model = _without(model, earlier)
        self.model._parameters = {}  # class token and position embedding belong to the stem
        self.after = family.after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.after:
            x = getattr(self.model, name)(x)
        return self.model.forward_head(x, pre_logits=True)


def as_chain(
    model: nn.Module, *, name: str, drop_blocks: Sequence[str] = (), config: Mapping[str, object] | None = None
) -> Chain:
    """The chain of a timm model or a CIFAR ResNet; takes the model's modules over, so don't use the model afterwards.

    Args:
        model: an instance of one of `FAMILIES`.
        name: what to call it.
        drop_blocks: names of blocks to leave out, for weights that lack them.
        config: `input_size`, `mean` and `std` where they differ from what timm knows of the model.

    Raises:
        TypeError: another class of model; the message says how to pass a chain of one's own.
        ValueError: drop_blocks names a block that isn't there, or the chain doesn't compute what the model does.
    """
    family = family_of(model)
    if family is None:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise TypeError(
            f"{name} is a {type(model).__name__}, which has no chain view here (known: {known}). Build one yourself: "
            "Chain(stem, blocks, tail, num_features), where tail(block_L(...block_1(stem(x)))) gives the features"
        )
    blocks = OrderedDict(pair for stage in family.stages for pair in _blocks(stage, getattr(model, stage)))
    missing = set(drop_blocks) - set(blocks)
    if missing:
        raise ValueError(f"drop_blocks: {name} has no block {', '.join(sorted(missing))}; it has {', '.join(blocks)}")
    chain = _cut(model.eval(), family, blocks, name, _config(model) | dict(config or {}))
    return _drop(chain, drop_blocks) if drop_blocks else chain


def _cut(
    model: nn.Module, family: Family, blocks: Mapping[str, nn.Module], name: str, config: Mapping[str, object]
) -> Chain:
    """Cuts the model into a chain and compares the two on one random image before the model is given up."""
    image = torch.randn(1, *config["input_size"], generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(image), pre_logits=True)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} can't take images of {tuple(image.shape[1:])}: {error}") from error
    if expected.dim() != 2:
        raise ValueError(
            f"{name} gives features of {tuple(expected.shape)}; they must be (batch, num_features), so leave "
            "global_pool as it is"
        )
    readouts = [model.get_submodule(path) for path in family.readout]
    for path in family.readout:
        model.set_submodule(path, nn.Identity())
    chain = Chain(
        _Stem(model, family),
        blocks,
        _Tail(model, family),
        expected.shape[-1],
        mean=config["mean"],
        std=config["std"],
        input_size=config["input_size"],
        name=name,
        source_head=readouts[0] if len(readouts) == 1 and isinstance(readouts[0], nn.Linear) else None,
    )
    with torch.no_grad():
        if not torch.equal(chain(image), expected):
            raise ValueError(f"the chain view of {name} does not compute what the model does; build a Chain yourself")
    return chain


def _config(model: nn.Module) -> dict[str, object]:
    """Input size, mean and std from timm; a patch embedding that was built for another size has the last word."""
    config = resolve_model_data_config(model)
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return config | {"input_size": (config["input_size"][0], *built_for)} if built_for else config


def _drop(chain: Chain, names: Sequence[str]) -> Chain:
    kept = {name: block for name, block in zip(chain.block_names, chain.blocks, strict=True) if name not in names}
    shorter = Chain(
        chain.stem,
        kept,
        chain.tail,
        chain.num_features,
        mean=chain.mean.flatten().tolist(),
        std=chain.std.flatten().tolist(),
        input_size=chain.input_size,
        name=chain.name,
        source_head=chain.source_head,
    )
    try:
        with torch.no_grad():
            shorter(torch.zeros(1, *chain.input_size))
    except RuntimeError as error:
        raise ValueError(f"drop_blocks: {chain.name} doesn't work without {', '.join(names)}: {error}") from error
    return shorter


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks inside a stage, by their full names; a stage's downsampling goes with its first block."""
    if isinstance(module, ConvNeXtStage | SwinTransformerStage):
        (first_name, first), *rest = _blocks(f"{name}.blocks", module.blocks)
        if not isinstance(module.downsample, nn.Identity):
            first = nn.Sequential(OrderedDict(downsample=module.downsample, block=first))
        yield from [(first_name, first), *rest]
    elif isinstance(module, nn.Sequential | RegStage):
        for child_name, child in module.named_children():
            yield from _blocks(f"{name}.{child_name}", child)
    else:
        yield name, module


def _without(model: nn.Module, names: set[str]) -> nn.Module:
    """A shallow copy of the model that lacks some children; the others are shared."""
    shell = copy.copy(model)
    shell._modules = {name: child for name, child in model._modules.items() if name not in names}
    shell._parameters = dict(model._parameters)
    return shell
