"""One network for many tasks: the frozen trunk once, forks where tasks differ, one batch axis where they share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import nn

from subtuning_lab.inference.preparation import Images, NetworkInput, Preparation, Size
from subtuning_lab.inference.schedule import TRUNK, plan_rows
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain
from subtuning_lab.nets.cut import examine_parts
from subtuning_lab.nets.narrow import narrowed
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Is, Text, checked

ORIGINAL = "original"
_TASKS = Mapped(Is("TunedTask"))


class MergedNetwork(nn.Module):
    """Images to the logits of every task, all in eval mode for good.

    Frozen weights are the backbone's own tensors, tuned ones those of the tasks: nothing is copied until the network
    is moved or converted. Don't train the backbone in place while it is in use.

    Args:
        backbone, tasks, keep_original: of `merge_tasks`.
    """

    @checked(tasks=_TASKS)
    def __init__(self, backbone: Chain, tasks: Mapping[str, TunedTask], keep_original: bool = True):
        super().__init__()
        _check_tasks(backbone, tasks, keep_original)
        siamese = frozenset(name for name, task in tasks.items() if task.siamese)
        subsets = {name: task.blocks for name, task in tasks.items()}
        self.schedule = plan_rows(backbone.part_names, subsets, keep_original, siamese)
        self.classes = {name: task.classes for name, task in tasks.items()}
        self.input = NetworkInput(_preparation(tasks), backbone.mean, backbone.std)
        self.image_size = self.input.preparation.image_size
        self.input_size, self.num_features = backbone.input_size, backbone.num_features
        parts = [shell(part) for part in backbone.parts]
        self._in_place = _examine(backbone, parts, self.image_size)
        #: position of a part -> the frozen part, where anybody goes through it
        self.frozen = nn.ModuleDict({str(i): parts[i] for i, step in enumerate(self.schedule.steps) if step.shared})
        #: position of a part -> the tuned parts of the tasks in `schedule.steps[position].tuned`
        self.tuned = nn.ModuleDict()
        for i, step in enumerate(self.schedule.steps):
            if step.tuned:
                self.tuned[str(i)] = nn.ModuleList(
                    narrowed(parts[i], tasks[name].weights[step.part]) for name in step.tuned
                )
        heads = {name: task.empty_head().to(backbone.mean).requires_grad_(False) for name, task in tasks.items()}
        self.heads = nn.ModuleList(narrowed(head, tasks[name].weights["head"]) for name, head in heads.items())
        if keep_original:
            self.original = nn.Identity() if backbone.source_head is None else shell(backbone.source_head)
        self.train()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The keys of what `forward` returns, in this order."""
        return (ORIGINAL,) * self.schedule.keep_original + tuple(self.schedule.subsets)

    def rows_table(self) -> pd.DataFrame:
        """The schedule as a table, see `Schedule.table`."""
        return self.schedule.table()

    @property
    def preparation(self) -> Preparation:
        """How images are made what the network sees; all tasks have it in common."""
        return self.input.preparation

    def prepare(self, images: Images, size: Size | None = None) -> torch.Tensor:
        """Any images as the network takes them, (n, 3, height, width); see `Preparation.prepared`.

        All tasks see the same ones. Tasks of one `image_size` whose images had several sizes before are given the
        largest, which blurs otherwise than their own would: the smaller ones' answers then differ from those of
        `TunedTask.predict`, and a warning says so.
        """
        return self.preparation.prepared(images, size)[:]

    @checked
    def train(self, mode: bool = True) -> MergedNetwork:
        """Stays in eval mode whatever is asked, so that no statistics can drift and no dropout draws."""
        self._all = tuple(self.modules())
        return super().train(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (batch, classes) by task name, and "original", of images (batch, 3, height, width).

        Images are uint8 or float in [0, 1]; normalization and resizing are inside.
        """
        if not torch.compiler.is_compiling():
            for module in self._all:  # somebody may have called train() of a part
                if module.training:
                    module.training = False
        tensors, batch = [self.input(images)], images.shape[0]
        for i, step in enumerate(self.schedule.steps):
            outputs = []
            if step.shared:
                pieces = [rows.of(tensors, batch) for rows in step.inputs]
                x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                outputs.append(self.frozen[str(i)](self._input_of(i, x)))
            if step.tuned:
                for part, rows in zip(self.tuned[str(i)], step.own_inputs, strict=True):
                    outputs.append(part(self._input_of(i, rows.of(tensors, batch))))
            tensors = outputs
        return self._logits(tensors, batch)

    def _input_of(self, position: int, x: torch.Tensor) -> torch.Tensor:
        """The input of a part, copied where the part would change it."""
        return x.clone() if position in self._in_place else x

    def _logits(self, tensors: list[torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
        features = {member: rows.of(tensors, batch) for member, rows in self.schedule.features.items()}
        logits = {ORIGINAL: self.original(features[TRUNK])} if self.schedule.keep_original else {}
        for task, head in zip(self.schedule.subsets, self.heads, strict=True):
            h = features[task] if task in features else features[TRUNK]
            logits[task] = head(torch.cat([features[TRUNK], h], dim=1) if task in self.schedule.siamese else h)
        return logits


@checked(tasks=_TASKS)
def merge_tasks(backbone: Chain, tasks: Mapping[str, TunedTask], keep_original: bool = True) -> MergedNetwork:
    """One network that gives what the separate networks `TunedTask.network()` of many tasks give.

    The trunk runs once, and ends where nobody needs it. A task forks at its first tuned part; from then on all rows
    that use the same frozen part go through it together on the batch axis: at most one row a task and one more.

    Args:
        backbone: the chain that all tasks were tuned from.
        tasks: name -> tuned task, any subsets of parts; those that tune nothing share the frozen features.
        keep_original: adds "original": the logits of the backbone's `source_head`, or, where it has none, the frozen
            features themselves.
    Raises:
        ValueError: a task of another backbone, or of images of another size, or named "original"; a part
            that mixes the images of a batch.
    Source: PAPER "Efficient Multi-Task Inference", here for any number of tasks and any subsets.
    """
    return MergedNetwork(backbone, tasks, keep_original)


def shell(module: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights, frozen and in eval mode; it takes next to no memory."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo | {id(buffer): buffer for buffer in module.buffers()}).eval()


def _examine(backbone: Chain, parts: list[nn.Module], image_size: int | None) -> frozenset[int]:
    """Positions of parts that write into their input; raises where an image's output depends on its neighbours."""
    size = backbone.input_size[1:] if image_size is None else (image_size, image_size)
    example = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(backbone.mean)
    in_place, mixing = examine_parts(dict(zip(backbone.part_names, parts, strict=True)), example)
    if mixing:
        raise ValueError(f"{mixing[0]} of {backbone.name} mixes the images of a batch; its rows can't be merged")
    return in_place


def _preparation(tasks: Mapping[str, TunedTask]) -> Preparation:
    """What all tasks' images go through: of the largest ones, where a squash makes them equal in size."""
    steps = [task.preparation for task in tasks.values()]
    chosen = max(steps, key=lambda each: each.crop_size or (0, 0))
    return replace(chosen, other_sizes=tuple(sorted({each.size for each in steps} - {chosen.size})))


def _check_tasks(backbone: Chain, tasks: Mapping[str, TunedTask], keep_original: bool) -> None:
    if keep_original and ORIGINAL in tasks:
        raise ValueError('a task is named "original", which is the pretrained output; rename it or keep_original=False')
    prints: dict[int, str] = {id(backbone): ""}  # most tasks hold the very same chain
    for name, task in tasks.items():
        Text().check("a task's name", name)
        if id(task.backbone) not in prints:
            prints[id(backbone)] = prints[id(backbone)] or backbone.fingerprint
            prints[id(task.backbone)] = task.backbone.fingerprint
        if prints[id(task.backbone)] != prints[id(backbone)]:
            raise ValueError(
                f'task "{name}" was tuned from {task.backbone.name} with fingerprint '
                f"{prints[id(task.backbone)][:12]}; this backbone is {backbone.name} with {prints[id(backbone)][:12]}"
            )
    advice = "merged tasks see the same images, so tune them with one image_size in their recipes"
    sizes = {
        "image_size": {name: task.image_size for name, task in tasks.items()},
        "images of": {name: task.pixels for name, task in tasks.items() if task.pixels},
        "images of height / width": {name: task.aspect for name, task in tasks.items() if task.aspect},
    }
    for what, of_tasks in sizes.items():
        names: dict[object, str] = {}  # the first task of each size
        for name, size in of_tasks.items():
            names.setdefault(size, name)
        if len(names) > 1:
            words = (f'task "{name}" has {what} {_size(size)}' for size, name in names.items())
            raise ValueError(f"{', '.join(words)}; {advice}")


def _size(size: object) -> str:
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)
