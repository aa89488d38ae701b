"""How the networks of timm, of torchvision, and our own, read as a chain."""

from __future__ import annotations

import copy
import re
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
from torchvision import models as tv

from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.cifar_resnet import CifarResNet
from subtuning_lab.nets.cut import Trace, cut, cut_module, has_weights, units_of, whole_units
from subtuning_lab.nets.ghosts import Call


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

# torchvision's: what its blocks are called, and its readout, whose input is the features. SqueezeNet's is a
# convolution before the pooling, so that what it gives are the features.
TORCHVISION: dict[type[nn.Module], tuple[str, str | None]] = {
    tv.AlexNet: (r"features\.\d+", "classifier.6"),
    tv.ConvNeXt: (r"features\.[1357]\.\d+", "classifier.2"),
    tv.DenseNet: (r"features\.denseblock\d+", "classifier"),
    tv.EfficientNet: (r"features\.[1-7]\.\d+", "classifier.1"),
    tv.GoogLeNet: (r"inception\w+", "fc"),
    tv.Inception3: (r"Mixed_\w+", "fc"),
    tv.MaxVit: (r"blocks\.\d+\.layers\.\d+", "classifier.5"),
    tv.MNASNet: (r"layers\.(8|9|10|11|12|13)\.\d+", "classifier.1"),
    tv.MobileNetV2: (r"features\.([1-9]|1[0-7])", "classifier.1"),
    tv.MobileNetV3: (r"features\.[1-9]\d*", "classifier.3"),
    tv.RegNet: (r"trunk_output\.block\d\.block\d-\d+", "fc"),
    tv.ResNet: (r"layer\d\.\d+", "fc"),
    tv.ShuffleNetV2: (r"stage\d\.\d+", "fc"),
    tv.SqueezeNet: (r"features\.\d+", None),
    tv.SwinTransformer: (r"features\.[1357]\.\d+", "head"),
    tv.VGG: (r"features\.\d+", "classifier.6"),
    tv.VisionTransformer: (r"encoder\.layers\.encoder_layer_\d+", "heads.head"),
}
# Containers that hold blocks, whether timm says so of them or not.
_CONTAINERS = ("blocks", "layers", "stages", "levels", "block_list")


def readouts_of(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's classifiers, as far as they are known."""
    for kind, (_, readout) in TORCHVISION.items():
        if isinstance(model, kind):
            return () if readout is None else (readout,)
    if family := family_of(model):
        return family.readout
    readout = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (readout,) if isinstance(readout, str) else tuple(readout)


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
    settings, family = _config(model) | dict(config or {}), family_of(model)
    if family is None:
        return _drop(_cut_free(model, name, settings), drop_blocks)
    blocks = OrderedDict(pair for stage in family.stages for pair in _blocks(stage, getattr(model, stage)))
    return _drop(_cut(model.eval(), family, blocks, name, settings), drop_blocks)


def _cut_free(model: nn.Module, name: str, config: Mapping[str, object]) -> Chain:
    """The chain of a model without a family, cut where timm declares blocks or the table of torchvision's does."""
    settings = {key: config[key] for key in ("mean", "std", "input_size")} | {"name": name}
    row = next((row for kind, row in TORCHVISION.items() if isinstance(model, kind)), None)
    readouts = [model.get_submodule(path) for path in readouts_of(model)]
    try:
        if row is not None:
            blocks = [path for path, m in model.named_modules() if re.fullmatch(row[0], path) and has_weights(m)]
            chain = cut_module(Chain, model, blocks, features=row[1], **settings)
        else:
            chain = _proposed(model, settings)
    except (ValueError, AttributeError) as error:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise TypeError(
            f"{name} is a {type(model).__name__}, which has no chain view here: {str(error).rstrip('.')}. "
            f"Families known: {known}. "
            "Build one yourself: Chain(stem, blocks, tail, num_features), where tail(block_L(...block_1(stem(x)))) "
            "gives the features, or Chain.from_module by the names of its blocks"
        ) from error
    if len(readouts) == 1 and isinstance(readouts[0], nn.Linear) and readouts[0].in_features == chain.num_features:
        chain.source_head = readouts[0].requires_grad_(False)
    return chain


def _proposed(model: nn.Module, settings: Mapping[str, object]) -> Chain:
    """Cuts a timm model behind the finest of its declared blocks that can be cut; all of them in one shape or other."""
    units = units_of(model, _declared(model))
    if not units:
        raise ValueError("no blocks are declared of it")
    trace = Trace(model, _features, [*units, *(m for unit in units.values() for m in unit)], settings["input_size"][1:])
    units = whole_units(trace, units)
    faults = {name: trace.fault(unit[-1]) for name, unit in units.items()}
    outermost = [name for name in units if not any(name.startswith(f"{other}.") for other in units)]
    chosen = [block for name in outermost for block in _finest(name, faults)]
    while chosen and trace.fault(chosen[0], before=True):
        chosen = chosen[1:]
    sizes = [
        sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
        for names in (chosen, outermost)
    ]
    if not chosen or 2 * sizes[0] < sizes[1]:
        fault = next(filter(None, faults.values()), "timm declares no blocks of it")
        raise ValueError(f"it is no chain, {fault}")
    return cut(Chain, trace, {name: units[name] for name in chosen}, **settings)


def _declared(model: nn.Module) -> list[str]:
    """Names of what timm declares to be blocks or stages, or what lies in a container that is called so."""
    modules, names, specs = dict(model.named_modules()), set(), []
    for coarse in (False, True):
        try:
            groups = model.group_matcher(coarse=coarse)
        except (AttributeError, AssertionError):  # there is none, or not of this kind
            continue
        specs.append([])
        for group in groups.values() if isinstance(groups, Mapping) else ():
            specs[-1] += [(group, None)] if isinstance(group, str) else group or ()
    for name in modules:
        owner, _, child = name.rpartition(".")
        first = [next(((p, suffix) for p, suffix in each if re.match(p, name)), (r"(?!)", None)) for each in specs]
        declared = any(re.compile(p).groups and re.fullmatch(p, name) and suffix is None for p, suffix in first)
        if declared or (child.isdigit() and owner.rpartition(".")[2] in _CONTAINERS):
            names.add(name)
    names = names or {info["module"] for info in getattr(model, "feature_info", ())}
    return [name for name, module in modules.items() if name in names and has_weights(module)]


def _finest(name: str, faults: Mapping[str, str | None]) -> list[str]:
    """The blocks inside a stage if all can be cut, else itself, else those that can be."""
    inner = [other for other in faults if other.startswith(f"{name}.")]
    inner = [one for one in inner if not any(one.startswith(f"{other}.") for other in inner)]
    found = [_finest(other, faults) for other in inner]
    if faults[name] is None and not (found and all(found)):
        return [name]
    return [block for blocks in found for block in blocks]


def features_of(model: nn.Module) -> Call:
    """How to get features from a model: in a way of its own, of which chains know nothing, from torchvision's."""
    if hasattr(model, "forward_features"):
        return _features
    for path in readouts_of(model):
        model.set_submodule(path, nn.Identity())
    return nn.Module.__call__


def _features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a timm model's classifier takes in."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


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
    built_for = getattr(getattr(model, "patch_embed", getattr(model, "stem", None)), "img_size", None)
    return config | {"input_size": (config["input_size"][0], *built_for)} if built_for else config


def _drop(chain: Chain, names: Sequence[str]) -> Chain:
    if not names:
        return chain
    if unknown := sorted(set(names) - set(chain.block_names)):
        known = ", ".join(chain.block_names)
        raise ValueError(f"drop_blocks: {chain.name} has no block {', '.join(unknown)}; it has {known}")
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
