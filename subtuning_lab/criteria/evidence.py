"""What criteria look at: activations, gradients per image, short trainings; each gathered once, with what it cost."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from subtuning_lab.criteria.formulas import ntk_eigenvalue
from subtuning_lab.data.task import Split
from subtuning_lab.engine.fit import fit_together
from subtuning_lab.nets.chain import frozen_copy
from subtuning_lab.nets.flops import training_flops
from subtuning_lab.nets.inputs import BATCH, fast_layout, layout_of, network_input
from subtuning_lab.search.statistics import spearman
from subtuning_lab.study.study import Study
from subtuning_lab.theory.sample_gradients import sample_gradients
from subtuning_lab.utils.random import Stream, seeded

_DECAY = 1e-2  # of the readout's weights, for features of mean square 1: without it, few images leave no loss to lower
_NTK_IMAGES, _NTK_STEPS = 64, 6
_MOST_EPOCHS, _AGREEMENT = 4, 0.8  # of short trainings, and of their ranks
_CHUNK_BYTES = 2**26  # gradients of one part that are held at a time
_PLAIN = {"patience": None, "siamese": False, "head_depth": 1, "adapter": None, "params": "all", "init": "pretrained"}
_PLAIN |= {"head_start": "random", "lr_scaling": "none"}  # what a short full finetuning takes of no recipe
Array = np.ndarray


@dataclass
class Spent:
    """What a piece of evidence took: images sent forward and backward, labels read, FLOPs, seconds."""

    forwards: int = 0
    backwards: int = 0
    labels: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return Spent(**sums | {"labels": max(self.labels, other.labels)})  # the same labels


@dataclass
class Gradients:
    """Gradients of the loss at the readout's fit, over n images.

    Args:
        squared: squared norms of each block's gradient, (n, blocks), with the images' labels.
        drawn: the same with labels drawn from the network's own distribution.
        gates: derivative by a factor on what a block adds to its input (or on its output, where that has another
            shape), (n, blocks).
        tensors: per block and parameter: mean gradient, mean of its square, weights, whether BatchNorm's; all (numel,).
        energy: mean square of each block's input, (blocks,).
    """

    squared: Array
    drawn: Array
    gates: Array
    tensors: list[list[tuple[Array, Array, Array, bool]]]
    energy: Array


@dataclass
class Evidence:
    """Gathers what is asked for, once; `spent` says what each piece took beyond those that it is made of.

    Args:
        study: backbone, recipe (the first) and image size.
        split: the labelled images.
        seed: of drawn labels, of random blocks and of short trainings.
        chunk: images at a time; None takes what is fast.
    """

    study: Study
    split: Split
    seed: int = 0
    chunk: int | None = None
    spent: dict[str, Spent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network = fast_layout(frozen_copy(self.study.backbone), layout_of(self.study.backbone))
        self.blocks = list(self.network.blocks)
        self.names = self.study.block_names
        self.size, self.parts = self.study.recipes[0].image_size, self.study.parts

    @contextmanager
    def _noting(self, piece: str, forwards: int, backwards: int, flops: float) -> Iterator[None]:
        start = time.perf_counter()
        yield
        labels = 0 if piece == "activations" else len(self.split)
        self.spent[piece] = Spent(forwards, backwards, labels, flops, time.perf_counter() - start)

    @property
    def forward_flops(self) -> int:
        """Of one image."""
        return int(self.parts["flops"].sum())

    @property
    def backward_flops(self) -> int:
        """Of one image, with the gradients of all weights."""
        return int(self.parts[["backward", "backward_weights"]].to_numpy().sum())

    def labels(self, rows: torch.Tensor) -> torch.Tensor:
        """Of some images, on the device."""
        return self.split.labels[rows].to(self.network.mean.device)

    @cached_property
    @torch.no_grad()
    def activations(self) -> list[Array]:
        """Means over places of what the stem and every block give, float64 (n, width) each, and the features."""
        n, found = len(self.split), []
        with self._noting("activations", n, 0, n * self.forward_flops):
            for rows in torch.arange(n).split(self.chunk or BATCH):
                x, values = network_input(self.network, self.split.images[rows], self.size), []
                for part in self.network.parts:
                    x = part(x)
                    values.append(_pooled(x).double().cpu().numpy())
                found.append(values)
        return [np.concatenate(values) for values in zip(*found, strict=True)]

    @cached_property
    def readout(self) -> nn.Linear:
        """The readout that fits the frozen features best, with a little weight decay."""
        features = torch.from_numpy(self.activations[-1])
        with self._noting("readout", 0, 0, 0.0):
            head = fitted_readout(features, self.split.labels.cpu(), self.study.task.num_classes)
        return head.to(self.network.mean.device, self.network.mean.dtype)

    @cached_property
    def gradients(self) -> Gradients:
        """One pass over the images serves every criterion that looks at gradients."""
        head, n = self.readout, len(self.split)
        with self._noting("gradients", n, 2 * n, n * (self.forward_flops + 2 * self.backward_flops)):
            return self._gathered(head)

    def _gathered(self, head: nn.Linear) -> Gradients:
        n, blocks = len(self.split), len(self.names)
        squared, gates, energy = np.zeros((2, n, blocks)), np.zeros((n, blocks)), np.zeros(blocks)
        sums: list[dict[str, list[torch.Tensor]]] = [{} for _ in self.names]
        largest = max(1, *(sum(p.numel() for p in block.parameters()) for block in self.blocks))
        chunk = self.chunk or max(1, min(32, _CHUNK_BYTES // (8 * largest)))
        for own in sample_gradients(self.network, head, self.split.images, self._at_logits, self.size, chunk):
            if own.part not in self.names:
                continue
            b, rows = self.names.index(own.part), own.rows.numpy()
            change = own.output - own.x if own.output.shape == own.x.shape else own.output
            gates[rows, b] = (own.at_output[0] * change).flatten(1).sum(1).double().cpu().numpy()
            energy[b] += float(own.x.double().square().flatten(1).mean(1).sum()) / n
            for name, gradient in own.tensors.items():  # (batch, 2, numel)
                squared[:, rows, b] += gradient.double().square().sum(2).T.cpu().numpy()
                first = gradient[:, 0].double()
                found = sums[b].setdefault(name, [torch.zeros_like(first[0]), torch.zeros_like(first[0])])
                found[0] += first.sum(0) / n
                found[1] += first.square().sum(0) / n
        tensors = [_tensors(*pair) for pair in zip(self.blocks, sums, strict=True)]
        return Gradients(*squared, gates, tensors, energy)

    def _at_logits(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Gradients of the loss at the logits, for the images' labels and for labels drawn of the network's own."""
        probabilities, classes = logits.softmax(1), logits.shape[1]
        pixels = [zlib.crc32(image.cpu().numpy().tobytes()) for image in self.split.images[rows]]
        chances = [torch.rand((), generator=seeded(Stream.CRITERION, self.seed, own)) for own in pixels]  # in any order
        steps = probabilities.double().cumsum(1) < torch.stack(chances).double()[:, None].to(logits.device)
        drawn = steps.sum(1).clamp(max=classes - 1)
        return torch.stack([probabilities - F.one_hot(y, classes).to(logits) for y in (self.labels(rows), drawn)])

    @cached_property
    def ntk(self) -> Array:
        """Largest eigenvalue of J J^T, J each block's Jacobian of the logits on the first images; (blocks,)."""
        head, n = self.readout, min(_NTK_IMAGES, len(self.split))
        behind = self.parts["flops"].to_numpy()[::-1].cumsum()[::-1][1:-1].sum()  # forward from each block on
        with self._noting("ntk", 3 * _NTK_STEPS * n, _NTK_STEPS * n, 5 * _NTK_STEPS * n * float(behind)):
            x = network_input(self.network, self.split.images[torch.arange(n)], self.size)
            return ntk_eigenvalue(self.network, head, x, _NTK_STEPS)

    @cached_property
    def drift(self) -> tuple[dict[str, dict[str, torch.Tensor]], Split]:
        """Weights after a short full finetuning, and images that it has not seen.

        One epoch, then two, ... until the blocks' ranks by relative displacement agree with those before.
        """
        task = replace(self.study.task, train=self.split, validation=None)
        seen, held = (self.split.take(rows) for rows in task.folds(1)[0])
        before, epochs = None, 0
        with self._noting("drift", 0, 0, 0.0):
            while epochs < _MOST_EPOCHS:
                epochs += 1
                recipe = replace(self.study.recipes[0], epochs=epochs, **_PLAIN)
                (fit,) = fit_together(
                    self.study.backbone, ["all"], seen, recipe, num_classes=task.num_classes, seed=self.seed
                )
                moved = self.displacement(fit.weights)
                if before is not None and float(spearman(np.stack([before, moved], 1))) >= _AGREEMENT:
                    break
                before = moved
        images, cost = len(seen) * epochs * (epochs + 1) // 2, sum(training_flops(self.parts, "all").values())
        self.spent["drift"] = replace(self.spent["drift"], forwards=images, backwards=images, flops=images * cost)
        return fit.weights, held

    def displacement(self, weights: dict[str, dict[str, torch.Tensor]]) -> Array:
        """How far each block has moved, relative to where it was; (blocks,)."""
        moved = []
        for name in self.names:
            pairs = [(weights[name][key].double(), p.double().cpu()) for key, p in self._parameters(name)]
            far, size = (sum(float(t.square().sum()) for t in tensors) for tensors in (
                [a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
            moved.append((far / size) ** 0.5 if size else 0.0)
        return np.array(moved)

    def _parameters(self, name: str) -> list[tuple[str, torch.Tensor]]:
        return [(key, p.detach()) for key, p in self.study.backbone.part(name).named_parameters()]

    @cached_property
    def held_out_loss(self) -> Callable[[Array], float]:
        """Loss of the drifted network on unseen images, as a function of shares (blocks,) of each block's way."""
        weights, held = self.drift
        network, head = frozen_copy(self.study.backbone), None
        for name, part in zip(network.part_names, network.parts, strict=True):
            part.load_state_dict({key: tensor.to(network.mean.device) for key, tensor in weights[name].items()})
        head = nn.Linear(network.num_features, self.study.task.num_classes).to(network.mean)
        head.load_state_dict(weights["head"])
        x, labels = network_input(network, held.images[torch.arange(len(held))], self.size), held.labels
        self.spent["suppression"] = Spent(labels=len(self.split))

        @torch.no_grad()
        def loss(shares: Array) -> float:
            start = time.perf_counter()
            for name, share in zip(self.names, shares, strict=True):
                for (key, before), p in zip(self._parameters(name), network.part(name).parameters(), strict=True):
                    p.copy_(before + share * (weights[name][key].to(before) - before))
            value = float(F.cross_entropy(head(network(x)), labels.to(x.device)))
            spent = Spent(len(x), 0, 0, len(x) * self.forward_flops, time.perf_counter() - start)
            self.spent["suppression"] = self.spent["suppression"] + spent
            return value

        return loss


def _tensors(block: nn.Module, sums: dict[str, list[torch.Tensor]]) -> list[tuple[Array, Array, Array, bool]]:
    """Of each parameter: mean gradient, mean square, weights, whether it is BatchNorm's."""
    norms = [p for own in block.modules() if isinstance(own, _BatchNorm) for p in own.parameters(recurse=False)]
    found = []
    for name, weights in block.named_parameters():
        if name in sums:
            values = (one.flatten().double().cpu().numpy() for one in (*sums[name], weights.detach()))
            found.append((*values, any(weights is p for p in norms)))
    return found


def fitted_readout(features: torch.Tensor, labels: torch.Tensor, classes: int) -> nn.Linear:
    """Logistic regression on features (n, width), float64: the minimum of mean loss + decay / 2 |weight|^2.

    Nothing in it depends on the order of the images, on batches, or on how often all of them are repeated.
    """
    scale = features.square().mean().sqrt().clamp(min=1e-12)
    with torch.random.fork_rng([]):
        head = nn.Linear(features.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    settings = {"max_iter": 500, "tolerance_grad": 1e-8, "tolerance_change": 1e-12, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(head.parameters(), **settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features / scale), labels) + _DECAY / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    head.weight.data /= scale
    return head.requires_grad_(False)


def _pooled(x: torch.Tensor) -> torch.Tensor:
    """Mean over places of activations (batch, channels, h, w), (batch, h, w, channels) or (batch, tokens, width)."""
    if x.dim() == 4:
        return x.mean((1, 2)) if x.shape[1] == x.shape[2] != x.shape[3] else x.mean((2, 3))
    return x.mean(1) if x.dim() == 3 else x.flatten(1)
