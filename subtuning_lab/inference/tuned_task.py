"""The saved difference: what a task changed in its backbone, as one small file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from subtuning_lab.data.arrays import check_number
from subtuning_lab.data.task import Split
from subtuning_lab.inference.checkpoint import STORED_DTYPES, Weights, read_task, stored, write_task
from subtuning_lab.inference.task_networks import SiameseNetwork, TaskNetwork
from subtuning_lab.nets.chain import Chain, fork_of, frozen_copy, in_order, put_parts, subset_of
from subtuning_lab.nets.flops import part_table
from subtuning_lab.nets.heads import empty_readout
from subtuning_lab.nets.narrow import check_narrow, narrowed


@dataclass(frozen=True)
class TunedTask:
    """A backbone's tuned blocks and readout for one task.

    Args:
        backbone: the chain that they belong to, unchanged.
        blocks: names of the tuned parts.
        weights: part name -> tensors, buffers too, and "head" -> weight (classes, num_features) and bias (classes,); a
            deeper readout's are those of its layers, "0.weight" and so on.
        classes: class names; logit i means classes[i].
        image_size: side in pixels that images are resized to; None takes them as they are.
        provenance: task, recipe and library versions, as plain values.
        siamese: the readout sees the frozen features, then the tuned ones; its weight is (classes, 2 num_features).
        scores: name -> finite number, e.g. {"test accuracy": 0.91, "n": 500}; accuracies in [0, 1].
        head_depth: linear layers of the readout.
        pruned: names of the tuned parts that have fewer inner channels than the backbone's, see `prune_blocks`.

    Raises:
        TypeError: a backbone that is no Chain, or scores that are no numbers.
        ValueError: an unknown block, or tensors that are not those of the tuned parts and the readout.
    """

    backbone: Chain = field(repr=False)
    blocks: frozenset[str]
    weights: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    classes: tuple[str, ...]
    image_size: int | None = None
    provenance: dict[str, object] = field(default_factory=dict, repr=False)
    siamese: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    head_depth: int = 1
    pruned: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, Chain):
            raise TypeError(f"backbone is a {type(self.backbone).__name__}; it must be a Chain")
        check_number("head_depth", self.head_depth, 1)
        check_number("image_size", self.image_size, 1)
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes is {self.classes!r}; class names are strings")
        _check_scores(self.scores)
        _check_complete(self)
        _check_pruned(self)

    def __str__(self) -> str:
        """What it is and how good, in one line."""
        names, kind = in_order(self.backbone, self.blocks), "Siamese " if self.siamese else ""
        tuned = f"{', '.join(names) or 'no block'} tuned{' and pruned' if self.pruned else ''}"
        kind += f"{self.head_depth}-layer " if self.head_depth > 1 else ""
        scores = ", ".join(f"{name} {show_score(value)}" for name, value in self.scores.items())
        return (
            f"{self.provenance.get('task', 'a task')} on {self.backbone.name}: {tuned}, "
            f"{kind}readout of {len(self.classes)} classes; {scores or 'no scores'}"
        )

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Height and width of the images that its network works on; None where training didn't record them."""
        recorded = self.provenance.get("pixels") if self.image_size is None else [self.image_size] * 2
        return None if recorded is None else tuple(recorded)

    def network(self) -> nn.Module:
        """The separate network of this task, in eval mode: images (batch, 3, height, width) to logits (batch, classes).

        Images are uint8 or float in [0, 1]; normalization and resizing are inside. It stays frozen and in eval mode,
        whatever is called on it. A Siamese one holds frozen parts once and computes what comes before the first tuned
        part once.
        """
        chain = frozen_copy(self.backbone)
        for name in self.blocks:
            own = {key: t.clone(memory_format=torch.contiguous_format) for key, t in self.weights[name].items()}
            put_parts(chain, {name: narrowed(chain.part(name), own)})
        head = self.empty_head().to(chain.mean).requires_grad_(False)  # first, or float64 weights would be rounded
        head.load_state_dict(self.weights["head"])
        if not self.siamese:
            return TaskNetwork(chain, head, self.image_size).eval()
        frozen = frozen_copy(self.backbone)
        put_parts(chain, {name: frozen.part(name) for name in chain.part_names if name not in self.blocks})
        return SiameseNetwork(chain, head, self.image_size, frozen, fork_of(chain, self.blocks)).eval()

    def empty_head(self, device: str = "cpu") -> nn.Module:
        """A readout like this task's, features to logits, whose weights are not set yet."""
        return empty_readout(self.backbone.num_features, len(self.classes), self.head_depth, self.siamese, device)

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
                hits += int((predictions == split.labels[rows].cpu()).sum())
        return hits / len(split)

    def size_table(self, dtype: str | None = None) -> pd.DataFrame:
        """What the file holds of each part, and what the whole backbone would take.

        Args:
            dtype: as for `save`.

        Returns:
            Table with index `part` (the backbone's parts and "head") and columns `tuned`, `values` (numbers in the
            file), `saved_bytes` (0 for frozen parts) and `backbone_bytes` (0 for the readout).
        """
        saved, rows = stored(self.weights, dtype), []
        for name in (*self.backbone.part_names, "head"):
            own = saved.get(name, {}).values()
            whole = () if name == "head" else self.backbone.part(name).state_dict().values()
            rows.append((name, name in saved, sum(t.numel() for t in own), _bytes(own), _bytes(whole)))
        return pd.DataFrame(rows, columns=["part", "tuned", "values", "saved_bytes", "backbone_bytes"]).set_index(
            "part"
        )

    def save(self, path: str | Path, dtype: str | None = None) -> Path:
        """Writes a .safetensors file of the tuned part only, whole or not at all.

        Args:
            path: ends in .safetensors.
            dtype: None keeps every bit; "float16" stores floating tensors in half precision, which halves the file.

        Raises:
            ValueError: another ending, an unknown dtype, a number that half precision can't hold, or provenance that
                is no plain values.
        """
        base = self.backbone
        header = {
            "base": base.fingerprint,
            "base_name": base.name,
            "mean": base.mean.flatten().tolist(),
            "std": base.std.flatten().tolist(),
            "input_size": list(base.input_size),
            "blocks": list(in_order(base, self.blocks)),
            "classes": list(self.classes),
            "image_size": self.image_size,
            "siamese": self.siamese,
            "head_depth": self.head_depth,
            "pruned": list(in_order(base, self.pruned)),
            "dtype": dtype,
            "scores": self.scores,
            "provenance": self.provenance,
        }
        return write_task(path, stored(self.weights, dtype), header)


def load_tuned(path: str | Path, backbone: Chain) -> TunedTask:
    """A tuned task from its file.

    Args:
        path: of a file that `TunedTask.save` wrote, in half precision too: tensors come back in the backbone's dtype.
        backbone: the same pretrained chain that it was tuned from.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a backbone that is no Chain.
        ValueError: not such a file, changed since it was written, or of another backbone.
    """
    header, weights = read_task(path)
    if not isinstance(backbone, Chain):
        raise TypeError(f"backbone is a {type(backbone).__name__}; it must be a Chain")
    _check_base(path, header, backbone)
    try:
        return TunedTask(
            backbone,
            frozenset(header["blocks"]),
            _widened(weights, header["dtype"], backbone),
            tuple(header["classes"]),
            header["image_size"],
            header["provenance"],
            header["siamese"],
            header["scores"],
            header["head_depth"],
            frozenset(header["pruned"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} doesn't fit: {error}") from error


def show_score(value: float) -> str:
    """A score as text: counts as they are, shares with three decimals."""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _widened(weights: Weights, dtype: str | None, backbone: Chain) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a half-precision file in the dtype that the backbone has them in."""
    if dtype is None:
        return {part: dict(state) for part, state in weights.items()}
    wide = backbone.mean.dtype
    return {
        part: {
            key: tensor.to(wide) if tensor.dtype == STORED_DTYPES[dtype] else tensor for key, tensor in state.items()
        }
        for part, state in weights.items()
    }


def _check_base(path: str | Path, header: Mapping[str, object], backbone: Chain) -> None:
    """Raises ValueError unless the file's header describes this backbone."""
    own = {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}
    other = [f"its {name} is {header[name]}, this backbone's {own[name]}" for name in own if header[name] != own[name]]
    if header["base"] != backbone.fingerprint or other:
        raise ValueError(
            f"{path} was tuned from {header['base_name']} with fingerprint {header['base'][:12]}; "
            f"this backbone is {backbone.name} with {'; '.join([backbone.fingerprint[:12], *other])}"
        )


def _check_scores(scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"scores has {name!r}: {value!r}; it maps names to numbers")
        if not math.isfinite(value):
            raise ValueError(f"scores has {name}: {value}; a score is finite")


def _check_complete(task: TunedTask) -> None:
    """Raises ValueError unless there is every tensor of the tuned parts and the readout, in its shape and dtype."""
    base = task.backbone
    expected = {name: _kinds(base.part(name).state_dict()) for name in subset_of(base, task.blocks)}
    expected["head"] = _kinds(task.empty_head("meta").to(base.mean.dtype).state_dict())
    for name in task.pruned & expected.keys() & task.weights.keys():  # whose sizes `_check_pruned` looks at
        given = task.weights[name]
        expected[name] = {
            key: f"{tuple(given[key].shape)} {kind.split(') ')[1]}" if key in given else kind
            for key, kind in expected[name].items()
        }
    for name in sorted(expected.keys() | task.weights.keys()):
        wanted, given = expected.get(name, {}), _kinds(task.weights.get(name, {}))
        wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        if wrong:
            kinds = f"{given.get(wrong[0], 'missing')}, expected {wanted.get(wrong[0], 'none')}"
            raise ValueError(f"tensor {wrong[0]} of {name} is {kinds}")


def _check_pruned(task: TunedTask) -> None:
    """Raises ValueError unless the parts that count as pruned are tuned ones with fewer inner channels."""
    base = task.backbone
    if not task.pruned <= task.blocks:
        raise ValueError(f"pruned has {', '.join(sorted(task.pruned - task.blocks))}, which is not tuned")
    behind = part_table(base, task.image_size)["output_shape"].to_dict() if task.pruned else {}
    sides = base.input_size[1:] if task.image_size is None else (task.image_size, task.image_size)
    shapes = [(3, *sides), *behind.values()]
    for name in in_order(base, task.pruned):
        taken = shapes[base.part_names.index(name)]
        check_narrow(name, base.part(name), task.weights[name], taken, behind[name])


def _kinds(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {key: f"{tuple(tensor.shape)} {_dtype_name(tensor.dtype)}" for key, tensor in state.items()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
