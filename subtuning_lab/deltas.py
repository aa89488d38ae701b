"""The saved difference: what a task changed in its backbone, as one small file."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from subtuning_lab.augmentation import resize_to
from subtuning_lab.chain import Chain, set_trainable

_FORMAT = "subtuning-lab tuned task 1"
_SEPARATOR = "|"  # between the part and the tensor's own name; not allowed in either


@dataclass(frozen=True)
class TunedTask:
    """A backbone's tuned blocks and readout for one task.

    Args:
        backbone: the chain that they belong to, unchanged.
        blocks: names of the tuned parts.
        weights: part name -> tensors, buffers too, and "head" -> weight (classes, num_features) and bias (classes,).
        classes: class names; logit i means classes[i].
        image_size: side in pixels that images are resized to; None takes them as they are.
        provenance: task, recipe, scores and library versions, as plain values.
    """

    backbone: Chain = field(repr=False)
    blocks: frozenset[str]
    weights: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    classes: tuple[str, ...]
    image_size: int | None = None
    provenance: dict[str, object] = field(default_factory=dict, repr=False)

    def network(self) -> nn.Module:
        """The separate network of this task, in eval mode: images (batch, 3, height, width) to logits (batch, classes).

        Images are uint8 or float in [0, 1]; normalization and resizing are inside.
        """
        chain = set_trainable(copy.deepcopy(self.backbone), []).eval()
        for name in self.blocks:
            chain.part(name).load_state_dict(self.weights[name])
        head = nn.Linear(chain.num_features, len(self.classes))
        head.load_state_dict(self.weights["head"])
        return _TaskNetwork(chain, head.to(chain.mean).requires_grad_(False), self.image_size).eval()

    def predict(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Class probabilities (n, classes) of images (n, 3, height, width), uint8 or float in [0, 1]."""
        network = self.network()
        device = self.backbone.mean.device
        with torch.no_grad():
            return torch.cat([network(rows.to(device)).softmax(-1).cpu() for rows in images.split(batch_size)])

    def save(self, path: str | Path) -> Path:
        """Writes a .safetensors file of the tuned part only, whole or not at all. Raises ValueError for other names."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f'path is "{path}"; a tuned task is a .safetensors file')
        tensors = {
            f"{part}{_SEPARATOR}{key}": tensor.contiguous()
            for part, state in self.weights.items()
            for key, tensor in state.items()
        }
        header = {
            "format": _FORMAT,
            "base": self.backbone.fingerprint,
            "base_name": self.backbone.name,
            "blocks": json.dumps(sorted(self.blocks)),
            "classes": json.dumps(self.classes),
            "image_size": json.dumps(self.image_size),
            "provenance": json.dumps(self.provenance),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(tensors, unfinished, metadata=header)
        os.replace(unfinished, path)
        return path


def load_tuned(path: str | Path, backbone: Chain) -> TunedTask:
    """A tuned task from its file.

    Args:
        path: of a file that `TunedTask.save` wrote.
        backbone: the same pretrained chain that it was tuned from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, damaged, or of another backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tuned task at {path}")
    header, weights = _read(Path(path))
    if header["base"] != backbone.fingerprint:
        raise ValueError(
            f"{path} was tuned from {header['base_name']} with fingerprint {header['base'][:12]}; "
            f"this backbone is {backbone.name} with {backbone.fingerprint[:12]}"
        )
    blocks = frozenset(json.loads(header["blocks"]))
    _check_complete(Path(path), weights, backbone, blocks)
    return TunedTask(
        backbone=backbone,
        blocks=blocks,
        weights=weights,
        classes=tuple(json.loads(header["classes"])),
        image_size=json.loads(header["image_size"]),
        provenance=json.loads(header["provenance"]),
    )


class _TaskNetwork(nn.Module):
    """Images in [0, 1] or uint8 to logits."""

    def __init__(self, backbone: Chain, head: nn.Linear, image_size: int | None):
        super().__init__()
        self.backbone, self.head, self.image_size = backbone, head, image_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.backbone.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return self.head(self.backbone(self.backbone.normalize(resize_to(images, self.image_size))))


def _read(path: Path) -> tuple[dict[str, str], dict[str, dict[str, torch.Tensor]]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no tuned task: its header says {header.get('format')!r}, not {_FORMAT!r}")
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(_SEPARATOR)
        weights.setdefault(part, {})[key] = tensor
    return header, weights


def _check_complete(path: Path, weights: dict, backbone: Chain, blocks: frozenset[str]) -> None:
    expected = {name: set(backbone.part(name).state_dict()) for name in blocks} | {"head": {"weight", "bias"}}
    for name, keys in expected.items():
        if keys != set(weights.get(name, {})):
            raise ValueError(f"{path} lacks tensors of {name}: {sorted(keys ^ set(weights.get(name, {})))}")
