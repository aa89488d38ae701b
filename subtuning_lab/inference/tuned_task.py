"""The saved difference: what a task changed in its backbone, as one small file, and the network that it makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from torch import nn

from subtuning_lab.data.arrays import check_labels
from subtuning_lab.data.decode import LARGEST_SIZE
from subtuning_lab.data.task import Split
from subtuning_lab.inference.checkpoint import STORED_DTYPES, Header, Weights, read_task, stored, write_task
from subtuning_lab.inference.preparation import Images, NetworkInput, Preparation, Size
from subtuning_lab.nets.chain import Chain, fork_of, frozen_copy, in_order, put_parts, subset_of
from subtuning_lab.nets.flops import part_table
from subtuning_lab.nets.heads import empty_readout
from subtuning_lab.nets.inputs import BATCH, accuracy_of, logits_of
from subtuning_lab.nets.narrow import check_narrow, narrowed
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Is, OneOf, Real, Several, Sides, Text, Whole, checked

MOST_LAYERS, MOST_PIXELS = 100, 2**15  # a forged file could ask for any number


class TaskNetwork(nn.Module):
    """Images (batch, 3, height, width), uint8 or float in [0, 1], to logits (batch, classes)."""

    def __init__(self, backbone: Chain, head: nn.Module, preparation: Preparation):
        super().__init__()
        self.backbone, self.head, self.image_size = backbone, head, preparation.image_size
        self.input = NetworkInput(preparation, backbone.mean, backbone.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(self.input(images)))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)


class SiameseNetwork(TaskNetwork):
    """The frozen features beside the tuned ones; parts before the first tuned one run once for both."""

    def __init__(self, backbone: Chain, head: nn.Module, preparation: Preparation, frozen: Chain, fork: int):
        super().__init__(backbone, head, preparation)
        self.frozen, self.fork = frozen, fork

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.eval()  # what the two chains' own forward would see to
        for part in self.frozen.parts[: self.fork]:
            x = part(x)
        sides = [x.clone(), x]  # a part may write into its input
        for side, chain in enumerate((self.frozen, self.backbone)):
            for part in chain.parts[self.fork :]:
                sides[side] = part(sides[side])
        return torch.cat(sides, dim=1)


@checked
@dataclass(frozen=True)
class TunedTask:
    """A backbone's tuned blocks and readout for one task.

    Args:
        backbone: the chain that they belong to, unchanged.
        blocks: names of the tuned parts.
        weights: part name -> tensors, buffers too, and "head" -> weight (classes, num_features) and bias (classes,); a
            deeper readout's are those of its layers, "0.weight" and so on.
        classes: class names; logit i means classes[i].
        image_size: side in pixels that images are squashed to; None takes them as they are.
        provenance: task, recipe and library versions, as plain values.
        siamese: the readout sees the frozen features, then the tuned ones; its weight is (classes, 2 num_features).
        scores: name -> finite number, e.g. {"test accuracy": 0.91, "n": 500}; accuracies in [0, 1].
        head_depth: linear layers of the readout.
        pruned: names of the tuned parts that have fewer inner channels than the backbone's, see `prune_blocks`.
        crop_size: (height, width) in pixels of the task's images, before `image_size`; see `Preparation`.
    Raises:
        ValueError: tensors that are not those of the tuned parts and the readout, or that hold NaN or infinity, as
            those of a diverged training do.
    """

    backbone: Chain = field(repr=False)
    blocks: Annotated[frozenset[str], Several(Text(), least=0)]
    weights: Annotated[Weights, Mapped(Mapped(Is(torch.Tensor), least=0))] = field(repr=False)
    classes: Annotated[tuple[str, ...], Several(Text(), unique=True)]
    image_size: Annotated[int | None, Whole(1, LARGEST_SIZE).or_none()] = None
    provenance: Annotated[dict[str, object], Is(Mapping)] = field(default_factory=dict, repr=False)
    siamese: bool = False
    scores: Annotated[dict[str, float], Mapped(Real(), least=0)] = field(default_factory=dict)
    head_depth: Annotated[int, Whole(1, MOST_LAYERS)] = 1
    pruned: Annotated[frozenset[str], Several(Text(), least=0)] = frozenset()
    crop_size: Annotated[Size | None, Sides(1, MOST_PIXELS, pairs_only=True).or_none()] = None

    def __post_init__(self) -> None:
        plain = {
            "blocks": frozenset(self.blocks),
            "pruned": frozenset(self.pruned),
            "classes": tuple(self.classes),
            "scores": {name: _plain(value) for name, value in self.scores.items()},
            "crop_size": None if self.crop_size is None else tuple(map(_plain, self.crop_size)),
            **{name: _plain(getattr(self, name)) for name in ("image_size", "head_depth")},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        _check_complete(self)
        _check_pruned(self)
        _check_finite(self)

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
    def pixels(self) -> Size | None:
        """Height and width of the images that its network works on; None where training didn't record them."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        recorded = self.crop_size or self.provenance.get("pixels")
        return None if recorded is None else tuple(recorded)

    @property
    def aspect(self) -> float | None:
        """Height over width of its images before `image_size` squashes them; None where nothing tells it."""
        crop = self.preparation.crop_size
        return None if crop is None else crop[0] / crop[1]

    @property
    def preparation(self) -> Preparation:
        """How images are made what its network sees."""
        crop = self.crop_size or (self.pixels if self.image_size is None else None)
        mean, std = (tuple(values.flatten().tolist()) for values in (self.backbone.mean, self.backbone.std))
        return Preparation(crop, self.image_size, mean, std, self.pixels or self.backbone.input_size[1:])

    def network(self) -> nn.Module:
        """The separate network of this task, in eval mode: images (batch, 3, height, width) to logits (batch, classes).

        Images are uint8 or float in [0, 1]; normalization and squashing are inside. It stays frozen and in eval mode,
        whatever is called on it. A Siamese one holds frozen parts once and computes what comes before the first tuned
        part once.
        """
        chain = frozen_copy(self.backbone)
        for name in self.blocks:
            state = {key: t.clone(memory_format=torch.contiguous_format) for key, t in self.weights[name].items()}
            put_parts(chain, {name: narrowed(chain.part(name), state)})
        head = self.empty_head().to(chain.mean).requires_grad_(False)  # first, or float64 weights would be rounded
        head.load_state_dict(self.weights["head"])
        if not self.siamese:
            return TaskNetwork(chain, head, self.preparation).eval()
        frozen = frozen_copy(self.backbone)
        put_parts(chain, {name: frozen.part(name) for name in chain.part_names if name not in self.blocks})
        return SiameseNetwork(chain, head, self.preparation, frozen, fork_of(chain, self.blocks)).eval()

    @checked(device=Is((str, torch.device)))
    def empty_head(self, device: str | torch.device = "cpu") -> nn.Module:
        """A readout like this task's, features to logits, whose weights are not set yet."""
        return empty_readout(self.backbone.num_features, len(self.classes), self.head_depth, self.siamese, device)

    def prepare(self, images: Images) -> torch.Tensor:
        """Any images as the network takes them, (n, 3, height, width); see `Preparation.prepared`."""
        return self.preparation.prepared(images)[:]

    @checked(batch_size=Whole(1))
    def predict(self, images: Images, batch_size: int = BATCH) -> torch.Tensor:
        """Class probabilities (n, classes) of images: whatever `Preparation.prepared` takes, brought to their size."""
        return logits_of(self.network(), self.preparation.prepared(images), batch_size).softmax(-1)

    @checked(batch_size=Whole(1))
    def accuracy(self, split: Split, batch_size: int = BATCH) -> float:
        """Share of a split's images, in [0, 1], that are classified right; NaN where a logit is not finite."""
        check_labels(split.labels, self.classes, "split")
        return accuracy_of(logits_of(self.network(), self.preparation.prepared(split.images), batch_size), split.labels)

    @checked(dtype=OneOf(tuple(STORED_DTYPES)))
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
            tuned = saved.get(name, {}).values()
            whole = () if name == "head" else self.backbone.part(name).state_dict().values()
            rows.append((name, name in saved, sum(t.numel() for t in tuned), _bytes(tuned), _bytes(whole)))
        columns = ["part", "tuned", "values", "saved_bytes", "backbone_bytes"]
        return pd.DataFrame(rows, columns=columns).set_index("part")

    @checked(path=Is((str, Path)), dtype=OneOf(tuple(STORED_DTYPES)))
    def save(self, path: str | Path, dtype: str | None = None) -> Path:
        """Writes a .safetensors file of the tuned part only, whole or not at all.

        Args:
            path: ends in .safetensors.
            dtype: None keeps every bit; "float16" stores floating tensors in half precision, which halves the file.
        Raises:
            ValueError: another ending, an unknown dtype, a number that half precision can't hold, or provenance that
                is no plain values.
            OSError: it can't be written there.
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
            "crop_size": self.crop_size and list(self.crop_size),
            "siamese": self.siamese,
            "head_depth": self.head_depth,
            "pruned": list(in_order(base, self.pruned)),
            "dtype": dtype,
            "scores": self.scores,
            "provenance": self.provenance,
        }
        return write_task(path, stored(self.weights, dtype), header)


@checked(path=Is((str, Path)))
def load_tuned(path: str | Path, backbone: Chain) -> TunedTask:
    """A tuned task from its file.

    Args:
        path: of a file that `TunedTask.save` wrote, in half precision too: tensors come back in the backbone's dtype.
        backbone: the same pretrained chain that it was tuned from.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, changed since it was written, or of another backbone.
    """

    def task_of(header: Header, weights: Weights) -> TunedTask:
        _check_base(path, header, backbone)
        try:
            return TunedTask(
                backbone,
                header["blocks"],
                {part: {} for part in header["blocks"]} | _widened(weights, header["dtype"], backbone),
                header["classes"],
                **{name: header[name] for name in _IN_HEADER},
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} doesn't fit: {error}") from error

    return task_of(*read_task(path, examine=task_of))


_IN_HEADER = ("image_size", "provenance", "siamese", "scores", "head_depth", "pruned", "crop_size")


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's, which files can hold; None as it is."""
    if value is None:
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def show_score(value: float) -> str:
    """A score as text: counts as they are, shares with three decimals."""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _widened(weights: Weights, dtype: str | None, backbone: Chain) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a half-precision file in the dtype that the backbone has them in."""
    narrow, wide = STORED_DTYPES[dtype], backbone.mean.dtype
    return {
        part: {key: t.to(wide) if t.dtype == narrow else t for key, t in state.items()}
        for part, state in weights.items()
    }


def _check_base(path: str | Path, header: Header, backbone: Chain) -> None:
    """Raises ValueError unless the file's header describes this backbone."""
    here = {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}
    other = [f"its {name} is {header[name]}, this backbone's {here[name]}" for name in here]
    other = [text for name, text in zip(here, other, strict=True) if header[name] != here[name]]
    if header["base"] != backbone.fingerprint or other:
        if backbone.mean.dtype != torch.float32:
            other.append(f"in {_dtype_name(backbone.mean.dtype)}: convert networks, not the backbone")
        raise ValueError(
            f"{path} was tuned from {header['base_name']} with fingerprint {header['base'][:12]}; "
            f"this backbone is {backbone.name} with {'; '.join([backbone.fingerprint[:12], *other])}"
        )


def _check_complete(task: TunedTask) -> None:
    """Raises ValueError unless there is every tensor of the tuned parts and the readout, in its shape and dtype."""
    base = task.backbone
    expected = {name: _kinds(base.part(name).state_dict()) for name in subset_of(base, task.blocks)}
    expected["head"] = _kinds(task.empty_head("meta").to(base.mean.dtype).state_dict())
    given = {name: _kinds(state) for name, state in task.weights.items()}
    for name in task.pruned & expected.keys() & given.keys():  # whose sizes `_check_pruned` looks at
        expected[name] = {key: (given[name].get(key, kind)[0], kind[1]) for key, kind in expected[name].items()}
    for name in sorted(expected.keys() | given.keys()):
        wanted, there = expected.get(name, {}), given.get(name, {})
        wrong = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        if wrong:
            words = [" ".join(map(str, kinds[wrong[0]])) if wrong[0] in kinds else None for kinds in (there, wanted)]
            raise ValueError(f"tensor {wrong[0]} of {name} is {words[0] or 'missing'}, expected {words[1] or 'none'}")


def _kinds(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor."""
    return {key: (tuple(tensor.shape), _dtype_name(tensor.dtype)) for key, tensor in state.items()}


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


def _check_finite(task: TunedTask) -> None:
    """Raises ValueError where a tensor holds NaN or infinity and the backbone's doesn't."""
    for name, state in task.weights.items():
        for key, tensor in state.items():
            if tensor.is_meta or not tensor.is_floating_point() or tensor.isfinite().all():
                continue
            if name == "head" or task.backbone.part(name).state_dict()[key].isfinite().all():
                raise ValueError(f"tensor {key} of {name} holds NaN or infinity, as a diverged training leaves it")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
