"""Backbones by name: the bundled ones, CIFAR ResNets, and every network of timm that reads as a chain."""

from __future__ import annotations

import copy
import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn
from torchvision import models as torchvision_models

from subtuning_lab.nets.chain import IMAGENET_MEAN, IMAGENET_STD, Chain, set_trainable
from subtuning_lab.nets.cifar_resnet import LAB_MEAN, LAB_STD, CifarResNet, lab_resnet, lab_vit
from subtuning_lab.nets.families import FAMILIES, as_chain, features_of, readouts_of
from subtuning_lab.nets.packaged import PACKAGED, packaged_weights
from subtuning_lab.utils.files import expanded
from subtuning_lab.utils.validation import SEED, Is, Real, Several, Text, checked, shown

# What constructors of networks raise for arguments that make no sense.
_OPTION_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)
Tensors = Mapping[str, torch.Tensor]
BUNDLED: dict[str, Callable[[], nn.Module]] = {"lab-resnet": lab_resnet, "lab-vit": lab_vit}
CIFAR_PREFIX, TORCHVISION_PREFIX = "cifar_resnet", "torchvision:"
_CLASSIFIERS = ("fc", "classifier", "head", "heads", "linear", "last_linear")  # what networks call theirs
_CLASSIFIERS += ("aux1", "aux2", "AuxLogits")  # which help in pretraining alone
_POSITIONS = ("pos_embed", "relative_position_bias_table")
_LAB_CONFIG = {"input_size": (3, 32, 32), "mean": LAB_MEAN, "std": LAB_STD}
_CIFAR_CONFIG = {"input_size": (3, 32, 32), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@checked(name=Text(), weights=Is((str, os.PathLike)), drop_blocks=Several(Text(), least=0), seed=SEED)
def load_backbone(
    name: str,
    weights: str | os.PathLike = "pretrained",
    *,
    drop_blocks: Sequence[str] = (),
    seed: int = 0,
    **model_options: object,
) -> Chain:
    """A pretrained backbone as a frozen chain, without its classifier.

    Args:
        name: "lab-resnet" or "lab-vit" (bundled), "cifar_resnet20" (depth 6n + 2), any timm name, or torchvision's
            with its prefix, e.g. "torchvision:resnet50".
        weights: "pretrained" (bundled, or downloaded by timm from its hub, or by torchvision), "random", "package" (of
            a package that the extra [imagenet] installs, for "tf_efficientnet_lite0"), torchvision's name of weights,
            e.g. "IMAGENET1K_V2", or the path of a .safetensors file with the model's own key names; its classifier may
            have any number of classes, or be absent.
        drop_blocks: blocks to leave out of the chain, for weights that lack them.
        seed: of the weights when they are random.
        model_options: passed to the model's constructor, e.g. `img_size=96` for a vision transformer, whose position
            embeddings are then resampled as timm does.

    Returns:
        The chain, on the CPU, with every part frozen; `source_head` is the pretrained classifier where there is one.

    Raises:
        ValueError: unknown name, weights or options that don't fit, or an unknown block in drop_blocks.
        TypeError: a timm model of a family that has no chain view; the message says what to do. Options that aren't
            the model's.
        FileNotFoundError: no file at `weights`.
        ImportError: "package" without the extra; the message names it.
        ConnectionError: "pretrained" where the hub can't be reached; the message names the alternatives.
    """
    _check_options(model_options)
    if name in BUNDLED and weights == "pretrained":
        with as_file(files("subtuning_lab.nets") / "weights" / f"{name}.safetensors") as path:
            return load_backbone(name, path, drop_blocks=drop_blocks, seed=seed, **model_options)
    by_name = isinstance(weights, str) and name.startswith(TORCHVISION_PREFIX) and "." not in weights
    pretrained = weights if by_name and weights != "random" else weights == "pretrained"
    model, config = _create(name, pretrained, seed, model_options)
    has_readout = weights != "random"
    if not pretrained and has_readout:
        path = expanded(weights)
        tensors = packaged_weights(name, model) if weights == "package" else _read(path)
        has_readout = _load_weights(model, name, path, tensors, drop_blocks, "img_size" in model_options)
    chain = as_chain(model, name=name, drop_blocks=drop_blocks, config=config)
    if not has_readout:
        chain.source_head = None
    return chain


@checked(name=Text(), seed=SEED)
def check_backbone(name: str, seed: int = 0, **model_options: object) -> dict[str, object]:
    """Proves for random weights that a backbone's chain computes what its model does, alone and on fresh images.

    Args:
        name, seed, model_options: of `load_backbone`.

    Returns:
        "class" of the model, "blocks" by name, "num_features", "sizes" of images on which the features are equal bit
        for bit, two where the model takes two, and "gradient": how far those of all parameters of the chain in float64
        are from the model's, relative to the largest of each.

    Raises:
        TypeError: no chain, see `load_backbone`; or one that computes something else.
    """
    _check_options(model_options)
    model, config = _create(name, False, seed, model_options)
    twin = copy.deepcopy(model.eval())
    names, call = {id(p): key for key, p in twin.named_parameters()}, features_of(model)
    chain = as_chain(twin, name=name, config=config)
    generator, sizes = torch.Generator().manual_seed(seed + 1), []
    for more in (0, 32):
        images = torch.randn(2, 3, *(side + more for side in chain.input_size[1:]), generator=generator)
        try:
            with torch.no_grad():
                expected = call(model, images)
                features = chain(images)
        except (RuntimeError, AssertionError, ValueError):
            if not more:
                raise
            continue
        if not torch.equal(features, expected):
            raise TypeError(f"the chain of {name} computes something else on images of {tuple(images.shape[2:])}")
        sizes.append(tuple(images.shape[2:]))
    images, apart = torch.randn(2, *chain.input_size, generator=generator).double(), []
    call(model.double(), images).square().sum().backward()
    set_trainable(chain.double().eval(), "all")(images).square().sum().backward()
    for parameter in (parameter for part in chain.parts for parameter in part.parameters()):
        own, wanted = parameter.grad, model.get_parameter(names[id(parameter)]).grad
        if own is not None and wanted is not None:
            apart.append(float((own - wanted).abs().max() / wanted.abs().max().clamp(1e-30)))
        elif own is not wanted:
            raise TypeError(f"only one of {name} and its chain has a gradient of {names[id(parameter)]}")
    apart = float(torch.tensor(apart).max())
    if not apart < 1e-9:
        raise TypeError(f"the gradients of {name}'s chain are {apart:.1g} from the model's, relative to the largest")
    facts = {"class": type(model).__name__, "blocks": chain.block_names, "num_features": chain.num_features}
    return facts | {"sizes": sizes, "gradient": apart}


def backbone_names() -> dict[str, str]:
    """What `load_backbone` knows offline and how to name the rest, each with one line about it."""
    timm_families = ", ".join(sorted(kind.__name__ for kind in FAMILIES if kind is not CifarResNet))
    return {
        "lab-resnet": "bundled: CIFAR-style ResNet, 9 blocks, 32 x 32, pretrained on procedural images",
        "lab-vit": "bundled: vision transformer, 6 blocks, 32 x 32, pretrained on procedural images",
        "cifar_resnet20": "ResNet of He et al. for CIFAR, depth 6n + 2 (20, 32, 44, 56, ...); weights from a file",
        PACKAGED: 'EfficientNet-Lite0, 224 x 224, ImageNet; weights="package" reads those of the extra [imagenet]',
        "<timm name>": f"any timm model that reads as a chain, e.g. resnet50.tv2_in1k; families known: {timm_families}",
        f"{TORCHVISION_PREFIX}<name>": "torchvision's classifiers, e.g. torchvision:resnet50 with IMAGENET1K_V2",
    }


_WORDS = {"none": None} | dict.fromkeys(("true", "yes", "on", "y", "t"), True)
_WORDS |= dict.fromkeys(("false", "no", "off", "n", "f"), False)


def _check_options(options: dict[str, object]) -> None:
    """Raises for options that would do something else than they say; warns of those that trainings here override.

    Numbers of numpy's become Python's, in place.
    """
    for taken in {"pretrained", "checkpoint_path", "features_only"} & set(options):
        raise TypeError(f"{taken} is no option here: weights= says what is loaded, and a chain gives the last features")
    if options.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans is {options['in_chans']!r}; it must be 3: images are RGB here, grey ones as well")
    for name, value in options.items():
        if isinstance(value, str) and value.lower() in _WORDS:
            raise TypeError(f'{name} is the text "{value}", which counts as True; give {_WORDS[value.lower()]} itself')
        options[name] = value.item() if isinstance(value, np.generic) else value
        if "drop" not in name or not name.endswith("rate"):
            continue
        Real(0, 1, none=True).check(name, value)
        if value:
            warnings.warn(
                f"{name}={value} has no effect in trainings of this package: dropout and stochastic depth are off "
                "there, because what they draw would depend on which candidates share a pass",
                stacklevel=4,
            )


def _create(name: str, pretrained: bool | str, seed: int, options: dict) -> tuple[nn.Module, dict | None]:
    create, config = _create_timm, None
    if name.startswith(TORCHVISION_PREFIX):
        create, config = _create_torchvision, _torchvision_config(name, pretrained)
    elif name in BUNDLED:
        create, config = _create_bundled, _LAB_CONFIG
    elif name.startswith(CIFAR_PREFIX):
        create, config = _create_cifar_resnet, _CIFAR_CONFIG
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return create(name, pretrained, options), config
        except _OPTION_ERRORS as error:
            if not options:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name} can't be made with {shown(options)}: {str(error) or type(error).__name__}") from error


def _create_bundled(name: str, pretrained: bool, options: dict) -> nn.Module:
    return BUNDLED[name](**options)


def _create_cifar_resnet(name: str, pretrained: bool, options: dict) -> nn.Module:
    depth = name.removeprefix(CIFAR_PREFIX)
    if not depth.isdecimal():
        raise ValueError(f"backbone {name!r}: write {CIFAR_PREFIX} and a depth of 6n + 2, e.g. {CIFAR_PREFIX}20")
    if pretrained:
        raise ValueError(f'{name} has no published weights here; give weights="random" or the path of a .safetensors')
    return CifarResNet(int(depth), **options)


def _create_timm(name: str, pretrained: bool, options: dict) -> nn.Module:
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        known = [*BUNDLED, f"{CIFAR_PREFIX}20", *timm.list_models()]
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        raise ValueError(
            f"no backbone is called {name!r}; did you mean {', '.join(close) or 'lab-resnet'}? "
            "Bundled: " + ", ".join(BUNDLED) + "; others: timm.list_models()"
        )
    if "." in name and ":" not in name and not timm.is_model_pretrained(name):
        tags = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True))
        raise ValueError(f"{architecture} has no weights called {name!r}; timm has {tags or 'none'}")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained or "loading state_dict" in str(error):  # there they are, but they don't fit the options
            raise
        raise ConnectionError(
            f"no pretrained weights for {name} could be had from its hub ({type(error).__name__}). Offline, use "
            f'{" or ".join(BUNDLED)} (bundled), weights="path/to/{architecture}.safetensors", or weights="random"'
        ) from error


def _torchvision_weights(name: str, weights: bool | str) -> object:
    """An entry of the enumeration of a network's published weights; the default one for True or False."""
    architecture = name.removeprefix(TORCHVISION_PREFIX)
    known = torchvision_models.list_models(torchvision_models)
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        raise ValueError(
            f"torchvision has no classifier {architecture!r}; did you mean {', '.join(close) or 'resnet50'}?"
        )
    entries = torchvision_models.get_model_weights(architecture)
    if isinstance(weights, str) and weights != "pretrained" and weights not in entries.__members__:
        allowed = ", ".join(entries.__members__)
        raise ValueError(f'weights is "{weights}"; for {name} it must be "pretrained", "random", a path, or {allowed}')
    return entries[weights] if isinstance(weights, str) and weights != "pretrained" else entries.DEFAULT


def _torchvision_config(name: str, pretrained: bool | str) -> dict[str, object]:
    """Size and normalization of the images that the weights were made for."""
    images = _torchvision_weights(name, pretrained).transforms()
    return {"input_size": (3, *images.crop_size * 2)[:3], "mean": images.mean, "std": images.std}


def _create_torchvision(name: str, pretrained: bool | str, options: dict) -> nn.Module:
    architecture = name.removeprefix(TORCHVISION_PREFIX)
    if architecture in ("googlenet", "inception_v3"):  # what published weights were made with, but for the helpers
        options = {"transform_input": True, "aux_logits": False, "init_weights": True} | options
    weights = _torchvision_weights(name, pretrained) if pretrained else None
    try:
        return torchvision_models.get_model(architecture, weights=weights, **options)
    except OSError as error:
        raise ConnectionError(
            f"no pretrained weights for {name} could be downloaded ({type(error).__name__}). Offline, use "
            f'weights="path/to/{architecture}.safetensors" or weights="random"'
        ) from error


def _read(path: Path) -> Tensors:
    """The tensors of a .safetensors file, all finite."""
    if path.suffix != ".safetensors":
        allowed = '"pretrained", "random", "package", or the path of a .safetensors file'
        raise ValueError(f'weights is "{path}"; it must be {allowed}')
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite")
    return tensors


def _load_weights(
    model: nn.Module, name: str, path: Path, tensors: Tensors, drop_blocks: Sequence[str], resample: bool
) -> bool:
    """Loads tensors into the model, strictly but for the classifier; returns whether that was among them."""
    tensors, has_readout = _with_readout(model, tensors)
    tensors = _resampled(model, tensors) if resample else tensors
    expected = model.state_dict()
    _check_keys(name, path, set(expected), set(tensors), (*drop_blocks, *readouts_of(model)))
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            at_size = "; give img_size= for weights of another image size" if key.endswith(_POSITIONS) else ""
            shapes = f"{tuple(tensor.shape)}, {name} wants {tuple(expected[key].shape)}"
            raise ValueError(f"{path}: {key} has shape {shapes}{at_size}")
        if tensor.is_floating_point() != expected[key].is_floating_point():  # quantized, for instance
            raise ValueError(f"{path}: {key} is {tensor.dtype}, {name} wants {expected[key].dtype}")
    model.load_state_dict(tensors, strict=False)
    return has_readout


def _with_readout(model: nn.Module, tensors: Tensors) -> tuple[Tensors, bool]:
    """Takes over the file's classifier, of however many classes, if it is one linear layer on the model's features.

    Returns:
        The tensors without any other classifier, which a chain has no use for, and whether there is one.
    """
    readout = readouts_of(model)
    inner = {name for name, _ in model.named_children()} - set(readout)
    unused = tuple(f"{name}." for name in (*readout, *(name for name in _CLASSIFIERS if name not in inner)))
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(unused)}
    if len(readout) != 1:
        return rest, False
    own, prefix = model.get_submodule(readout[0]), f"{readout[0]}."
    layer = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    weight = layer.get("weight")
    if not isinstance(own, nn.Linear) or weight is None or not set(layer) <= {"weight", "bias"}:
        return rest, False
    if weight.dim() != 2 or weight.shape[1] != own.in_features:
        return rest, False
    linear = nn.Linear(own.in_features, len(weight), bias="bias" in layer)
    linear.load_state_dict(layer)
    model.set_submodule(readout[0], linear)
    return rest, True


def _resampled(model: nn.Module, tensors: Tensors) -> Tensors:
    """Position embeddings brought to the model's image size as timm does with downloaded ones."""
    own, resampled = model.state_dict(), dict(tensors)
    for key, tensor in tensors.items():
        if key not in own or tensor.dim() != own[key].dim() or tensor.shape == own[key].shape:
            continue
        if key == "pos_embed" and tensor.shape[-1] == own[key].shape[-1]:
            prefix = 0 if model.no_embed_class else model.num_prefix_tokens
            resampled[key] = resample_abs_pos_embed(tensor, model.patch_embed.grid_size, num_prefix_tokens=prefix)
        elif key.endswith("relative_position_bias_table"):
            window = model.get_submodule(key.rpartition(".")[0]).window_size
            resampled[key] = resize_rel_pos_bias_table(tensor, window, own[key].shape)
    return resampled


def _check_keys(name: str, path: Path, expected: set[str], given: set[str], optional: Sequence[str]) -> None:
    unexpected = sorted(given - expected)
    if unexpected:
        raise ValueError(f"{path} has {len(unexpected)} tensors that {name} lacks, e.g. {', '.join(unexpected[:3])}")
    prefixes = tuple(f"{prefix}." for prefix in optional)
    # num_batches_tracked only matters to BatchNorm without momentum, and converted weights often lack it.
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(key for key in expected - given - counters if not key.startswith(prefixes))
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of {name}, e.g. {', '.join(missing[:3])}. If a whole block is "
            'absent, leave it out by name, e.g. drop_blocks=["blocks.4.1"]'
        )


def pretraining_images(backbone: Chain) -> str | None:
    """The published images that a backbone's weights come from, where its name tells, as `Task.source` names them."""
    if backbone.source_head is None:  # random weights, or ones that no one knows
        return None
    if backbone.name.startswith("cifar_resnet"):
        return {10: "cifar10/train", 100: "cifar100/train"}.get(backbone.source_head.out_features)
    return "imagenet/train" if backbone.name.endswith(("_in1k", "_in21k", "_in22k")) else None
