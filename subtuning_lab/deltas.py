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
from subtuning_lab.tasks import Split

_FORMAT = "subtuning-lab tuned task 1"
_JSON_TYPES = {"blocks": list, "classes": list, "image_size": int | None, "provenance": dict}
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
        head = nn.utils.skip_init(nn.Linear, chain.num_features, len(self.classes))
        head.load_state_dict(self.weights["head"])
        return _TaskNetwork(chain, head.to(chain.mean).requires_grad_(False), self.image_size).eval()

    def predict(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """Class probabilities (n, classes) of images (n, 3, height, width), uint8 or float in [0, 1]."""
        network = self.network()
        device = self.backbone.mean.device
        with torch.no_grad():
            return torch.cat([network(rows.to(device)).softmax(-1).cpu() for rows in images.split(batch_size)])

    def accuracy(self, split: Split, batch_size: int = 256) -> float:
        """Share of a split's images, in [0, 1], that are classified right."""
        network, device, hits = self.network(), self.backbone.mean.device, 0
        with torch.no_grad():
            for rows in torch.arange(len(split)).split(batch_size):
                predictions = network(split.images[rows].to(device)).argmax(-1).cpu()
                hits += int((predictions == split.labels[rows]).sum())
        return hits / len(split)

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
    if not isinstance(backbone, Chain):
        raise TypeError(f"backbone is a {type(backbone).__name__}; it must be a Chain")
    header, weights = _read(Path(path))
    if header["base"] != backbone.fingerprint:
        raise ValueError(
            f"{path} was tuned from {header['base_name']} with fingerprint {header['base'][:12]}; "
            f"this backbone is {backbone.name} with {backbone.fingerprint[:12]}"
        )
    values = {name: _value(Path(path), name, header[name]) for name in _JSON_TYPES}
    blocks, classes = frozenset(values["blocks"]), tuple(values["classes"])
    _check_complete(Path(path), weights, backbone, blocks, len(classes))
    return TunedTask(backbone, blocks, weights, classes, values["image_size"], values["provenance"])


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
    lacking = {"base", "base_name", *_JSON_TYPES} - set(header)
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))} in its header")
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition(_SEPARATOR)
        weights.setdefault(part, {})[key] = tensor
    return header, weights


def _value(path: Path, name: str, text: str) -> object:
    """One value of the header, of the type that it must have."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {name} in its header is {text!r}, which is no JSON") from error
    if not isinstance(value, _JSON_TYPES[name]):
        raise ValueError(f"{path}: {name} in its header is {text!r}, which is of the wrong type")
    return value


def _check_complete(path: Path, weights: dict, backbone: Chain, blocks: frozenset[str], n_classes: int) -> None:
    """Raises ValueError unless the file holds every tensor of the tuned parts and the readout, in its shape."""
    expected = {name: _shapes(backbone.part(name).state_dict()) for name in blocks}
    expected["head"] = {"weight": (n_classes, backbone.num_features), "bias": (n_classes,)}
    for name in expected.keys() | weights.keys():
        wanted, given = expected.get(name, {}), _shapes(weights.get(name, {}))
        wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        if wrong:
            shapes = f"{given.get(wrong[0], 'missing')}, expected {wanted.get(wrong[0], 'none')}"
            raise ValueError(f"{path} doesn't fit: tensor {wrong[0]} of {name} is {shapes}")


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
