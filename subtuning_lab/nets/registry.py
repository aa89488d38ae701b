"""Backbones by name: the bundled ones, CIFAR ResNets, and every network of timm that reads as a chain."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import as_file, files
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from subtuning_lab.nets.chain import IMAGENET_MEAN, IMAGENET_STD, Chain
from subtuning_lab.nets.cifar_resnet import LAB_MEAN, LAB_STD, CifarResNet, lab_resnet, lab_vit
from subtuning_lab.nets.from_timm import FAMILIES, as_chain

BUNDLED: dict[str, Callable[[], nn.Module]] = {"lab-resnet": lab_resnet, "lab-vit": lab_vit}
CIFAR_PREFIX = "cifar_resnet"
_LAB_CONFIG = {"input_size": (3, 32, 32), "mean": LAB_MEAN, "std": LAB_STD}
_CIFAR_CONFIG = {"input_size": (3, 32, 32), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def load_backbone(
    name: str,
    weights: str | Path = "pretrained",
    *,
    drop_blocks: Sequence[str] = (),
    seed: int = 0,
    **model_options: object,
) -> Chain:
    """A pretrained backbone as a frozen chain, without its classifier.

    Args:
        name: "lab-resnet" or "lab-vit" (bundled), "cifar_resnet20" (depth 6n + 2), or any timm name.
        weights: "pretrained" (bundled, or downloaded by timm from its hub), "random", or the path of a .safetensors
            file with the model's own key names; the classifier's keys may be absent.
        drop_blocks: blocks to leave out of the chain, for weights that lack them.
        seed: of the weights when they are random.
        model_options: passed to the model's constructor, e.g. `img_size=96` for a vision transformer.

    Returns:
        The chain, on the CPU, with every part frozen; `source_head` is the pretrained classifier where there is one.

    Raises:
        ValueError: unknown name, weights that don't fit, or an unknown block in drop_blocks.
        TypeError: a timm model of a family that has no chain view; the message says what to do.
        FileNotFoundError: no file at `weights`.
        ConnectionError: "pretrained" where the hub can't be reached; the message names the alternatives.
    """
    if not isinstance(name, str):
        raise TypeError(f'name is {name!r}; it must be a string, e.g. "lab-resnet"')
    _check_drop_blocks(drop_blocks)
    if name in BUNDLED and weights == "pretrained":
        with as_file(files("subtuning_lab.nets") / "weights" / f"{name}.safetensors") as path:
            return load_backbone(name, path, drop_blocks=drop_blocks, seed=seed, **model_options)
    model, config = _create(name, weights == "pretrained", seed, model_options)
    has_readout = weights != "random"
    if weights not in ("pretrained", "random"):
        has_readout = _load_weights(model, name, Path(weights), drop_blocks)
    chain = as_chain(model, name=name, drop_blocks=drop_blocks, config=config)
    if not has_readout:
        chain.source_head = None
    return chain


def backbone_names() -> dict[str, str]:
    """What `load_backbone` knows offline and how to name the rest, each with one line about it."""
    timm_families = ", ".join(sorted(kind.__name__ for kind in FAMILIES if kind is not CifarResNet))
    return {
        "lab-resnet": "bundled: CIFAR-style ResNet, 9 blocks, 32 x 32, pretrained on procedural images",
        "lab-vit": "bundled: vision transformer, 6 blocks, 32 x 32, pretrained on procedural images",
        "cifar_resnet20": "ResNet of He et al. for CIFAR, depth 6n + 2 (20, 32, 44, 56, ...); weights from a file",
        "<timm name>": f"any timm model of these families, e.g. resnet50.tv2_in1k: {timm_families}",
    }


def _create(name: str, pretrained: bool, seed: int, options: dict) -> tuple[nn.Module, dict | None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in BUNDLED:
            return BUNDLED[name](**options), _LAB_CONFIG
        if name.startswith(CIFAR_PREFIX):
            return _create_cifar_resnet(name, pretrained, options), _CIFAR_CONFIG
        return _create_timm(name, pretrained, options), None


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
        if not pretrained:
            raise
        raise ConnectionError(
            f"no pretrained weights for {name} could be had from its hub ({type(error).__name__}). Offline, use "
            f'{" or ".join(BUNDLED)} (bundled), weights="path/to/{architecture}.safetensors", or weights="random"'
        ) from error


def _load_weights(model: nn.Module, name: str, path: Path, drop_blocks: Sequence[str]) -> bool:
    """Loads a safetensors file into the model, strictly; returns whether the classifier was in it."""
    if path.suffix != ".safetensors":
        raise ValueError(f'weights is "{path}"; it must be "pretrained", "random", or the path of a .safetensors file')
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    family = next((family for kind, family in FAMILIES.items() if isinstance(model, kind)), None)
    readout = family.readout if family else ()
    expected = model.state_dict()
    absent = [part for part in readout if not any(key.startswith(f"{part}.") for key in tensors)]
    _check_keys(name, path, set(expected), set(tensors), (*drop_blocks, *absent))
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{tuple(tensor.shape)}, {name} wants {tuple(expected[key].shape)}"
            raise ValueError(f"{path}: {key} has shape {shapes}")
    model.load_state_dict(tensors, strict=False)
    return not absent


def _check_keys(name: str, path: Path, expected: set[str], given: set[str], optional: Iterable[str]) -> None:
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


def _check_drop_blocks(drop_blocks: Sequence[str]) -> None:
    if isinstance(drop_blocks, str):
        raise TypeError(f'drop_blocks is the string "{drop_blocks}"; give a list of block names')
