"""A backbone as a chain, `features = tail(block_L(... block_1(stem(x))))`, and which of its parts are trained.

Everything else in the package reads off this one view: finetuning profiles, one-pass training, merged inference,
the generalization bound.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from subtuning_lab.nets.cut import cut_module
from subtuning_lab.utils.containers import Blocks
from subtuning_lab.utils.hashing import fingerprint_of
from subtuning_lab.utils.validation import Flag, Is, OneOf, Real, Rule, Several, Text, Whole, checked, shown

BatchNormMode = Literal["batch", "frozen"]
BN_MODES: tuple[str, ...] = ("batch", "frozen")
# Attributes that rates of dropout have in modules of torch, torchvision, timm and transformers; those of the second
# line in modules that are dropout.
_RATES = """
    drop drop_prob drop_rate drop_path drop_path_rate dropout dropout_p dropout_prob dropout_rate attn_drop attn_dropout
    attention_dropout proj_drop hidden_dropout activation_dropout layerdrop
"""
_DROP_RATES = " p prob"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class _Part(Rule):
    """A module, which has weights to tune and a mode to train in."""

    allowed = "a torch.nn.Module in Python; put a function into the forward of one, and a TorchScript's code as well"

    def error_of(self, value: object) -> type[Exception] | None:
        scripted = isinstance(value, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in value.modules())
        return TypeError if scripted or not isinstance(value, nn.Module) else None

    def wrong(self) -> Iterator[object]:
        yield from (None, torch.relu, "layer", [])


class Chain(nn.Module):
    """A pretrained network as stem -> blocks -> tail, which knows what is frozen.

    A new chain is frozen throughout, which is the state of linear probing; `set_trainable` declares another one.

    Args:
        stem: maps normalized images (batch, 3, height, width) to the first block's input.
        blocks: the L blocks in order; a mapping gives them names, a list names them "block1", "block2", ...
            Every activation must be one tensor whose first axis is the batch.
        tail: maps the last block's output to features (batch, num_features).
        num_features: width of the features.
        mean, std: per-channel normalization that the backbone was pretrained with, for images in [0, 1].
        input_size: (channels, height, width) that the backbone was pretrained with.
        name: what messages, tables and records call it.
        source_head: the pretrained readout on the features, kept beside the chain; no part of it.

    Raises:
        TypeError: parts that are no modules.
        ValueError: no blocks, reserved block names, numbers out of range, or parameters that two parts share.

    Source: PAPER "SubTuning", where a residual block or a transformer layer is the unit of choice.
    """

    @checked(
        stem=_Part(),
        tail=_Part(),
        num_features=Whole(1),
        mean=Several(Real(), least=3, most=3),
        std=Several(Real(0, above=True), least=3, most=3),
        input_size=Several(Whole(1), least=3, most=3),
        name=Text(),
        source_head=Is(nn.Linear, none=True),
    )
    def __init__(
        self,
        stem: nn.Module,
        blocks: Mapping[str, nn.Module] | Iterable[nn.Module],
        tail: nn.Module,
        num_features: int,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        input_size: tuple[int, int, int] = (3, 224, 224),
        name: str = "custom",
        source_head: nn.Linear | None = None,
    ):
        super().__init__()
        if input_size[0] != 3:
            raise ValueError(f"input_size is {tuple(input_size)}; it must be (3, height, width), for RGB images")
        named = _named_blocks(blocks)
        self.stem, self.blocks, self.tail = stem, nn.ModuleList(named.values()), tail
        self.block_names = tuple(named)
        self.num_features, self.input_size, self.name = int(num_features), tuple(map(int, input_size)), name
        self.source_head = source_head
        #: what `without_dropout` set to 0, by module and attribute
        self._rates: dict[tuple[str, str], float] = {}
        for which, values in (("mean", mean), ("std", std)):
            self.register_buffer(which, torch.tensor([*map(float, values)]).view(3, 1, 1), persistent=False)
        _check_parameters(self)
        set_trainable(self, [])

    @classmethod
    @checked(
        model=_Part(),
        features=Text(none=True),
        num_features=Whole(1, none=True),
        input_size=Several(Whole(1), least=3, most=3),
    )
    def from_module(
        cls,
        model: nn.Module,
        blocks: str | Sequence[str],
        *,
        features: str | None = None,
        num_features: int | None = None,
        input_size: tuple[int, int, int] = (3, 224, 224),
        **settings: object,
    ) -> Chain:
        """The chain of any module, by the names that its blocks have in it; takes the module over, in eval mode.

        It is run on two images, cut, and compared: the chain gives the same features, bit for bit, and the same
        gradient of a block. What is computed between two blocks goes with the later one.

        Args:
            model: maps normalized images (batch, 3, height, width) to features, or to what is made of them.
            blocks: name of a container whose children are the blocks, e.g. "encoder.layer", or names of the blocks;
                norms, activations and pooling that follow one in an nn.Sequential go with it.
            features: name of the module that takes in the features (batch, num_features), such as the classifier,
                which is left out; None where they are what the model gives.
            num_features: what the width of the features must be.
            input_size: of images that the model can take.
            settings: mean, std, name and source_head, as of `Chain`.

        Raises:
            TypeError: no module, or blocks that are no names.
            ValueError: unknown names, or the first thing that breaks the chain: an activation that is no single
                tensor, a skip over blocks, parameters that two parts share, images that the model can't take.
        """
        (Text() if isinstance(blocks, str) else Several(Text(), unique=True)).check("blocks", blocks)
        chain = cut_module(cls, model, blocks, features=features, input_size=input_size, **settings)
        if num_features not in (None, chain.num_features):
            raise ValueError(f"num_features is {num_features}; those of {chain.name} are {chain.num_features}")
        return chain

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of everything that can be tuned, in order: "stem", the blocks, "tail"."""
        return ("stem", *self.block_names, "tail")

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of `part_names`, in the same order."""
        return [self.stem, *self.blocks, self.tail]

    @checked(name=Text())
    def part(self, name: str) -> nn.Module:
        """The module of one part. Raises ValueError for an unknown name."""
        return self.parts[_position(self, name)]

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parts that `set_trainable` declared trainable."""
        return self._trainable

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, buffers, normalization and settings: equal networks, equal fingerprint."""
        parts = dict(zip(self.part_names, self.parts, strict=True))
        return fingerprint_of(parts, self.mean.flatten().tolist(), self.std.flatten().tolist())

    @checked(images=Is(torch.Tensor))
    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, 3, height, width), uint8 or float in [0, 1], as the backbone wants them."""
        scaled = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (batch, num_features) of normalized images (batch, 3, height, width)."""
        self._declare_modes()
        for part in self.parts:
            x = part(x)
        return x

    @checked(mode=Flag())
    def train(self, mode: bool = True) -> Chain:
        """Sets train mode where it is allowed: frozen parts stay in eval mode, so their statistics cannot drift."""
        super().train(mode)
        self._declare_modes()
        return self

    def _declare_modes(self) -> None:
        """Puts every frozen part, and every norm whose statistics are frozen, back into eval mode."""
        for name, part in zip(self.part_names, self.parts, strict=True):
            if name not in self._trainable:
                part.eval()
            elif self._bn == "frozen":
                freeze_statistics(part)


@checked(backbone=Is(Chain), blocks=Blocks(), bn=OneOf(BN_MODES))
def set_trainable(backbone: Chain, blocks: Iterable[str] | Literal["all"], bn: BatchNormMode = "batch") -> Chain:
    """Declares the WHOLE trainable state of the backbone, in place: `blocks` are trained, all else is frozen.

    Args:
        blocks: names out of `backbone.part_names` ("stem" and "tail" count); [] is linear probing; "all" is full
            finetuning, stem and tail included. `backbone.block_names` is every block WITHOUT stem and tail.
        bn: "batch" lets the BatchNorm of tuned blocks use and update batch statistics in train mode; "frozen" keeps
            their pretrained statistics (their weight and bias are trained all the same), and those of other norms.

    Returns:
        The same backbone.

    Raises:
        ValueError: an unknown name or BatchNorm mode; the message lists the allowed ones.
    """
    backbone._trainable, backbone._bn = subset_of(backbone, blocks), bn
    for name, part in zip(backbone.part_names, backbone.parts, strict=True):
        part.requires_grad_(name in backbone._trainable)
        if name not in backbone._trainable:
            part.zero_grad(set_to_none=True)  # an optimizer that still holds the part would apply what is left there
    if backbone.source_head is not None:
        backbone.source_head.requires_grad_(False)
    return backbone.train(backbone.training)


def subset_of(backbone: Chain, blocks: Iterable[str] | Literal["all"]) -> frozenset[str]:
    """The subset as a frozenset of part names; "all" is every part. Raises as `set_trainable` does."""
    Blocks().check("blocks", blocks)
    subset = frozenset(backbone.part_names if blocks == "all" else blocks)
    unknown = sorted(str(name) for name in subset - set(backbone.part_names))
    if unknown:
        raise ValueError(f"{backbone.name} has no block {', '.join(unknown)}; it has {', '.join(backbone.part_names)}")
    return subset


def in_order(backbone: Chain, blocks: Iterable[str]) -> tuple[str, ...]:
    """The subset's names from the input to the output of the network."""
    subset = subset_of(backbone, blocks)
    return tuple(name for name in backbone.part_names if name in subset)


@checked(backbone=Is(Chain), blocks=Blocks())
def count_parameters(backbone: Chain, blocks: Iterable[str] | Literal["all"]) -> int:
    """Parameters of a subset, the new readout not counted."""
    return sum(p.numel() for name in subset_of(backbone, blocks) for p in backbone.part(name).parameters())


def frozen_copy(backbone: Chain) -> Chain:
    """A copy of the chain that is frozen throughout and in eval mode."""
    return set_trainable(copy.deepcopy(backbone), []).eval()


def fork_of(backbone: Chain, blocks: Iterable[str]) -> int:
    """Position of a subset's first part, stem 0: where it leaves the trunk; behind the last part for the empty one."""
    subset = subset_of(backbone, blocks)
    return min((i for i, name in enumerate(backbone.part_names) if name in subset), default=len(backbone.part_names))


def copy_weights(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all weights and buffers of some modules on the CPU: module name -> tensor name -> tensor."""
    return {
        name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
    }


def without_dropout(backbone: Chain) -> Chain:
    """A frozen copy whose dropout and stochastic depth are off; they would draw from chance that candidates share."""
    still = set_trainable(copy.deepcopy(backbone), [])
    for path, module in still.named_modules():
        kind = type(module).__name__.lower()
        for name in (_RATES + _DROP_RATES * ("drop" in kind or "stochastic" in kind)).split():
            if isinstance(vars(module).get(name), float):
                if rate := getattr(module, name):
                    still._rates[path, name] = rate
                setattr(module, name, 0.0)
        for name, child in module.named_children():
            if isinstance(child, nn.RReLU):  # draws slopes in train mode; this is what it does in eval mode
                setattr(module, name, nn.LeakyReLU((child.lower + child.upper) / 2))
    return still


def check_still(backbone: Chain, example: torch.Tensor) -> None:
    """Raises ValueError for parts that draw from chance in train mode, found by running each twice.

    And for those that change buffers in eval mode, too, so that they are never frozen, or in which an attribute called
    like a rate of dropout acts in eval mode, where dropout does nothing.

    Args:
        backbone: of `without_dropout`; as it stands afterwards.
        example: two or more normalized images (batch, 3, height, width).
    """
    device, drawing, acting, moving = example.device, [], [], []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name, part in zip(backbone.part_names, backbone.parts, strict=True):
            twin = copy.deepcopy(part).eval()
            output = twin(example.clone())
            if not all(map(torch.equal, twin.buffers(), part.buffers())):
                moving.append(name)
            twin.train()
            buffers, chance, outputs = [buffer.clone() for buffer in twin.buffers()], _chance(device), []
            for _ in range(2):
                for buffer, value in zip(twin.buffers(), buffers, strict=True):
                    buffer.copy_(value)
                outputs.append(twin(example.clone()))
            apart = (outputs[1] - outputs[0]).abs().amax() > 1e-2 * outputs[0].abs().amax()
            if apart or chance != _chance(device):
                drawing.append(name)
            loud = _with_rates(backbone, part)
            if loud and (loud.eval()(example.clone()) - output).abs().amax() > 1e-4 * output.abs().amax():
                acting.append(name)
            example = output
    if moving:
        raise ValueError(
            f"{', '.join(moving)} of {backbone.name} changes its buffers in eval mode, too, and so is never frozen; "
            "update them only where self.training is True"
        )
    if acting:
        names = ", ".join(sorted({attribute for _, attribute in backbone._rates}))
        raise ValueError(
            f"{', '.join(acting)} of {backbone.name} computes something else in eval mode when its rates of dropout "
            f"are set to 0, as trainings do; give {names} another name where it is no such rate, or set it to 0"
        )
    if drawing:
        raise ValueError(
            f"{', '.join(drawing)} of {backbone.name} draws random numbers in train mode, e.g. for a kind of dropout "
            "that is not known here; candidates that share a pass would share them: set its rate to 0"
        )


def _with_rates(backbone: Chain, part: nn.Module) -> nn.Module | None:
    """A copy of a part with the rates that `without_dropout` set to 0; None where there are none."""
    paths = {module: path for path, module in backbone.named_modules()}
    rates = [(path, module) for path, module in part.named_modules()]
    given = [(p, key[1], rate) for p, m in rates for key, rate in backbone._rates.items() if key[0] == paths[m]]
    loud = copy.deepcopy(part) if given else None
    for path, attribute, rate in given:
        setattr(loud.get_submodule(path), attribute, rate)
    return loud


def _chance(device: torch.device) -> tuple[object, ...]:
    """Where the generators stand that a module might draw from."""
    own = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    of_numpy = [np.asarray(value).tobytes() for value in np.random.get_state()]
    return own, torch.get_rng_state().numpy().tobytes(), random.getstate(), of_numpy


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it may gather statistics in train mode: BatchNorm, InstanceNorm, and what has such a buffer to save.

    Buffers of numbers, that is, such as a moving average or the vectors of a spectral norm.
    """
    saved = (b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set)
    numbers = any(buffer is not None and buffer.is_floating_point() for buffer in saved)
    return numbers or isinstance(module, _NormBase) or any(name.startswith("running_") for name in module._buffers)


def freeze_statistics(module: nn.Module) -> None:
    """Puts all that gathers statistics into eval mode, in place."""
    for gathering in filter(keeps_statistics, module.modules()):
        gathering.eval()


def check_tensors(backbone: Chain) -> None:
    """Raises ValueError for weights and buffers of another precision or device than the chain's, or not finite."""
    for name, part in zip(backbone.part_names, backbone.parts, strict=True):
        for key, tensor in part.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            for trait in ("dtype", "device"):
                given, wanted = getattr(tensor, trait), getattr(backbone.mean, trait)
                if given != wanted:
                    raise ValueError(
                        f"{key} of {name} is {given}, the normalization of {backbone.name} is {wanted}; "
                        "convert the chain as a whole, e.g. chain.float() or chain.to(device)"
                    )
            if not tensor.isfinite().all():
                raise ValueError(f"{key} of {name} of {backbone.name} holds numbers that are not finite")


def _position(backbone: Chain, name: str) -> int:
    (name,) = subset_of(backbone, [name])
    return backbone.part_names.index(name)


def _named_blocks(blocks: Mapping[str, nn.Module] | Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Blocks by name. Raises for names that mean something else, and for what is no module."""
    if isinstance(blocks, Mapping | nn.ModuleDict):
        named = dict(blocks.items())
    elif isinstance(blocks, Iterable) and not isinstance(blocks, str):
        named = {f"block{i}": block for i, block in enumerate(blocks, start=1)}
    else:
        raise TypeError(f"blocks is {shown(blocks)}; it must be a list of modules, or modules by name")
    if not named:
        raise ValueError("blocks is empty; a chain has at least 1 block")
    for name, block in named.items():
        if not isinstance(name, str) or not name or "|" in name:
            raise ValueError(f"blocks has the name {name!r}; names are strings, not empty, without |")
        if name in ("stem", "tail", "all", "head"):
            raise ValueError(f"block name {name} is reserved for the chain's own parts")
        _Part().check(name, block)
    return named


def _check_parameters(backbone: Chain) -> None:
    """A parameter that two parts share could not be frozen in one of them only; a computed one not be copied."""
    owner: dict[int, str] = {}
    for name, part in zip(backbone.part_names, backbone.parts, strict=True):
        computed = (k for m in part.modules() for k, v in vars(m).items() if isinstance(v, torch.Tensor) and v.grad_fn)
        for key in computed:
            raise ValueError(
                f"{key} of {name} is computed from other weights, as by torch.nn.utils.weight_norm, and can't be "
                "copied; torch.nn.utils.parametrizations has its successor"
            )
        for parameter in part.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters; each part must have its own")


def put_parts(network: Chain, parts: Mapping[str, nn.Module]) -> Chain:
    """Puts modules in the place of the chain's own parts of those names, in place; returns the chain."""
    for name, module in parts.items():
        if name in ("stem", "tail"):
            setattr(network, name, module)
        else:
            network.blocks[network.block_names.index(name)] = module
    return network
