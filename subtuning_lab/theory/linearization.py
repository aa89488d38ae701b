"""How far a tuned task moved from its backbone, and how linear the network is on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from subtuning_lab.data.arrays import as_images
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import in_order
from subtuning_lab.nets.heads import Start
from subtuning_lab.nets.inputs import logits_of
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Is, Real, Several, Whole, checked

_START = Mapped(Is(torch.Tensor), none=True)


@checked(head_start=_START)
def tuned_distance(tuned: TunedTask, head_start: Start | None = None) -> pd.DataFrame:
    """Delta of a tuned task: the Euclidean distance of its parameters from the pretrained ones.

    Args:
        tuned: the tuned task.
        head_start: weight and bias that the readout started from. It has no pretrained value: None measures from zero.
    Returns:
        Index `part`: the tuned parts in order, "all" (these together: the Delta of the subset) and "head". Columns
        `distance`, and `statistics`: the distance of BatchNorm's running statistics, which are no parameters.
    Raises:
        ValueError: a start whose tensors differ from the readout's in name or shape, or a pruned task.
    Source: PAPER "Theorem 1", ||theta~ - theta||_2 <= Delta.
    """
    _check_whole(tuned)
    rows = {}
    for name in in_order(tuned.backbone, tuned.blocks):
        part, weights = tuned.backbone.part(name), tuned.weights[name]
        rows[name] = [_apart(tensors, weights) for tensors in (part.named_parameters(), part.named_buffers())]
    rows["all"] = [math.hypot(*column) for column in zip(*rows.values(), strict=True)] or [0.0, 0.0]
    start = _head_start(tuned, head_start)
    rows["head"] = [_apart(start.items(), tuned.weights["head"]), 0.0]
    return pd.DataFrame.from_dict(rows, "index", columns=["distance", "statistics"]).rename_axis("part")


@checked(steps=Several(Real(0, above=True)), head_start=_START, batch_size=Whole(1))
def linearization_gap(
    tuned: TunedTask,
    images: torch.Tensor,
    steps: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 1.0),
    *,
    head_start: Start | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Logits on the way theta + t (theta~ - theta) by the network, and by its first-order Taylor polynomial in t.

    BatchNorm keeps the tuned network's running statistics all the way, so that t = 1 is the network that was tuned.

    Args:
        tuned: the tuned task.
        images: (n, 3, height, width), uint8 or float in [0, 1], which is rounded to uint8 as in tasks.
        steps: values of t, above 0. How small one may be depends on rounding.
        head_start: weight and bias that the readout moves from, as part of w; None keeps the tuned readout all the way.
        batch_size: images at a time.
    Returns:
        One row a step: `t`; `error`, the norm of the difference over the norm of the network's change since t = 0, over
        all images; `change`, root mean square of the latter per image; `agreement`, share of images with the same
        predicted class; `n`, images.
    Raises:
        ValueError: a start that doesn't fit the readout, a Siamese task, or one in which nothing moves.
    Source: PAPER "Theorem 1", f~(x) = f(x) + <psi(x), w>.
    """
    first, slope = taylor_logits(tuned, images, head_start=head_start, batch_size=batch_size)
    images, (network, starts, ways) = as_images(images), _way(tuned, head_start)
    rows = []
    for t in steps:
        point = {name: starts[name] + t * way for name, way in ways.items()}
        straight, logits = first + t * slope, _logits_at(network, point, images, batch_size)
        off, change = float((straight - logits).norm()), float((logits - first).norm())
        same = float((straight.argmax(1) == logits.argmax(1)).double().mean())
        rows.append((t, off / change if off else 0.0, change / math.sqrt(len(images)), same, len(images)))
    return pd.DataFrame(rows, columns=["t", "error", "change", "agreement", "n"])


@checked(head_start=_START, batch_size=Whole(1))
def taylor_logits(
    tuned: TunedTask, images: torch.Tensor, *, head_start: Start | None = None, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the start and their change by the first-order Taylor polynomial, float64 (n, classes) each.

    Their sum is the logits f(x) + <psi(x), w> of the linearized network where the task was tuned to.

    Args:
        tuned, images, head_start, batch_size: as for `linearization_gap`, also in what is refused.
    """
    images = as_images(images)
    if tuned.siamese:
        raise ValueError("the task is Siamese; a way from one network to another is there for plain tasks only")
    _check_whole(tuned)
    network, starts, ways = _way(tuned, head_start)
    if not starts:
        raise ValueError("nothing moves: the task has no tuned blocks; give head_start to move the readout")
    both = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # Fused attention has no forward-mode derivatives, and torch warns of itself when it loads its own.
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        for rows in images.split(batch_size):
            rows = rows.to(tuned.backbone.mean.device)
            both.append(jvp(lambda p: functional_call(network, p, (rows,)), (starts,), (ways,)))  # noqa: B023 - at once
    first, slope = (torch.cat(column).cpu().double() for column in zip(*both, strict=True))
    return first, slope


def _way(tuned: TunedTask, head_start: Start | None) -> tuple[nn.Module, dict, dict]:
    """The tuned network; and of each parameter that moved, by name, where it started and how far it went."""
    network = tuned.network()
    starts = {f"backbone.{name}": p.detach() for name, p in tuned.backbone.named_parameters()}
    if head_start is not None:
        starts |= {f"head.{key}": tensor for key, tensor in _head_start(tuned, head_start).items()}
    ends = {name: p for name, p in network.named_parameters() if name in starts}
    starts = {name: starts[name].to(p) for name, p in ends.items() if not torch.equal(starts[name].to(p), p)}
    return network, starts, {name: ends[name] - start for name, start in starts.items()}


def _check_whole(tuned: TunedTask) -> None:
    if tuned.pruned:
        raise ValueError(
            f"{', '.join(in_order(tuned.backbone, tuned.pruned))} is pruned; no way leads there from the backbone"
        )


def _logits_at(network: nn.Module, point: dict, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Logits, float64 (n, classes), with other parameters."""
    device = next(iter(point.values())).device
    return logits_of(lambda rows: functional_call(network, point, (rows,)), images, batch_size, device).double()


def _head_start(tuned: TunedTask, start: Start | None) -> Start:
    """The readout's start, or zeros; raises ValueError for one that doesn't fit."""
    head = tuned.weights["head"]
    if start is None:
        return {key: torch.zeros_like(tensor) for key, tensor in head.items()}
    given, wanted = ({key: tuple(tensor.shape) for key, tensor in state.items()} for state in (start, head))
    if given != wanted:
        raise ValueError(f"head_start has {given}; the readout has {wanted}")
    return start


def _apart(start: Iterable[tuple[str, torch.Tensor]], end: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of named tensors; counters are left out."""
    pairs = [(tensor.detach().cpu().double(), end[key].double()) for key, tensor in start if tensor.is_floating_point()]
    return math.hypot(*(float((b - a).norm()) for a, b in pairs))
