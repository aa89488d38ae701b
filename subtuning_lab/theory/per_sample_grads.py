"""Gradient features of a chain: squared norms per image and part, exactly or by random directions.

Parts are traced one by one; modules that have a formula for it give theirs from inputs and output gradients, vmap does
the rest.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, NamedTuple, TypeVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from subtuning_lab.data.arrays import as_images, as_integers, check_labels
from subtuning_lab.engine.memory import bytes_per_candidate, free_bytes
from subtuning_lab.nets.chain import Chain, frozen_copy
from subtuning_lab.nets.inputs import fast_layout, layout_of, network_input
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Is, OneOf, Whole, checked

Result = TypeVar("Result")

METHODS: tuple[str, ...] = ("exact", "random", "loss")
_MOST_ROWS = 320  # images times directions of a chunk: larger chunks fall out of a CPU's caches
_UNFOLDED = 10  # patches of a 3 x 3 convolution, and its input
_NETWORK = threading.Lock()  # hooks, and parameters put in place for a call, are seen by every thread
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class GradientNorms:
    """Squared norms of gradients, by image and part.

    Args:
        parts: names of the chain's parts, and "head".
        squared: float64 (n, parts).
        error: standard error of each estimate, float64 (n, parts); zeros where the norms are exact.
    """

    parts: tuple[str, ...]
    squared: torch.Tensor = field(repr=False)
    error: torch.Tensor = field(repr=False)

    def of(self, blocks: Iterable[str], head: bool = False) -> torch.Tensor:
        """Squared norms (n,) of a subset's gradients, with the readout's or without: the sum over its parts, exactly.

        Estimates of different parts share their random directions: the sum of their errors bounds the sum's error.
        """
        if isinstance(blocks, str):
            raise TypeError(f'blocks is the string "{blocks}"; give a list of names, e.g. ["{blocks}"]')
        names = [*blocks]
        unknown = [str(name) for name in names if name not in self.parts[:-1]]
        if unknown:
            raise ValueError(f"there is no block {', '.join(unknown)}; there are {', '.join(self.parts[:-1])}")
        return self.squared[:, [name in names for name in self.parts[:-1]] + [head]].sum(1)

    def table(self) -> pd.DataFrame:
        """One row a part: `mean` and `std` over images, `standard_error` of that mean as an estimate, `n` images."""
        n = len(self.squared)  # each draws its own directions, so their errors are independent
        columns = {
            "mean": self.squared.mean(0).numpy(),
            "std": self.squared.std(0).numpy() if n > 1 else math.nan,
            "standard_error": self.error.square().sum(0).sqrt().numpy() / n,
        }
        return pd.DataFrame(columns | {"n": n}, index=pd.Index(self.parts, name="part"))


@checked
def gradient_norms(
    backbone: Chain,
    head: Annotated[nn.Linear, Is(nn.Linear)],
    images: torch.Tensor,
    *,
    method: Annotated[str, OneOf(METHODS)] = "exact",
    labels: torch.Tensor | Sequence[int] | None = None,
    directions: Annotated[int, Whole(2)] = 64,
    seed: Annotated[int, Whole()] = 0,
    image_size: Annotated[int | None, Whole(1, none=True)] = None,
    chunk: Annotated[int | None, Whole(1, none=True)] = None,
    direction_chunk: Annotated[int | None, Whole(1, none=True)] = None,
    memory_limit: Annotated[int | None, Whole(1, none=True)] = None,
) -> GradientNorms:
    """Squared Frobenius norms of psi_b(x) = d logits / d theta_b for every part b and image x.

    The network is in eval mode: BatchNorm keeps its statistics, so that no image sees another.

    Args:
        backbone: the chain at the weights in question, on the device to compute on; it is not changed.
        head: the readout, features to logits; its own gradients are the last part, "head".
        images: (n, 3, height, width), uint8 or float in [0, 1], which is rounded to uint8 as in tasks.
        method: "exact"; "random", the mean of ||v^T psi||^2 over random signs v on the class axis, for many classes;
            or "loss", the squared norms of the gradients of the cross-entropy -log p(label | x) instead.
        labels: int64 (n,), for "loss" only.
        directions: how many v "random" draws per image, at least 2.
        seed: of these; they depend on it and on the image's index alone.
        image_size: side in pixels that images are resized to; None takes them as they are.
        chunk, direction_chunk: images, and directions on the class axis, at a time; None: as many as are fast and fit.
        memory_limit: bytes that a chunk may take, by `chunk_sizes`; None: a safe share of what is free.
    Raises:
        ValueError: a readout of another width, labels that are missing or out of range, or a part that mixes the images
            of a batch.
    Source: PAPER "Theorem 1", whose psi it is. Gradients per image come from inputs and output gradients (Goodfellow
        2015, "Efficient per-example gradient computations"); the random signs are Hutchinson's estimator.
    """
    images = as_images(images)
    labels = _check_call(backbone, head, method, labels, len(images))
    network = fast_layout(frozen_copy(backbone), layout_of(backbone))
    head = copy.deepcopy(head).to(network.mean).requires_grad_(False)
    basis = _basis(head.weight)
    count = {"exact": len(basis), "random": directions, "loss": 1}[method]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no batched gradients
        # An image beside its negative shows where one changes the other.
        example = network_input(network, torch.cat([images[:1], 255 - images[:1]]), image_size)
        plans, costs = plans_of(network, example), _bytes(network, example[:1])
        limit = free_bytes(example.device) if memory_limit is None else memory_limit
        threads = 1 if example.is_cuda else max(1, min(torch.get_num_threads(), limit // sum(costs)))
        most = chunk_sizes(*costs, count, limit // threads)

        @torch.enable_grad()
        def norms_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            traces = trace_parts(network, network_input(network, images[rows], image_size))
            features = traces[-1].output.detach()
            reach = features.square().sum(1) + (head.bias is not None)  # the readout's gradient is v (features, 1)^T
            if method == "exact":
                vectors, scale = basis[:, None].expand(-1, len(rows), -1), head.out_features / count
            else:
                v = _class_directions(head(features), rows, labels, directions, seed)
                vectors, scale = v @ head.weight, v.square().sum(-1)
            parts = [_norms_backward(traces, plans, some) for some in vectors.split(direction_chunk or most[1])]
            at_head = (scale * reach).expand(count, -1)[..., None]
            return _summed(torch.cat([torch.cat(parts), at_head], 2), method)

        values = _in_threads(norms_of, torch.arange(len(images)).split(chunk or most[0]), threads)
    squared, error = (torch.cat(rows).cpu() for rows in zip(*values, strict=True))
    return GradientNorms((*backbone.part_names, "head"), squared, error)


def _in_threads(run: Callable[[torch.Tensor], Result], chunks: Sequence[torch.Tensor], threads: int) -> list[Result]:
    """Results in order. Chunks go side by side and share the threads: small operations lose time by splitting up."""
    before, workers = torch.get_num_threads(), min(threads, len(chunks))
    if workers == 1:
        return [run(chunk) for chunk in chunks]
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            return [*pool.map(run, chunks)]
    finally:
        torch.set_num_threads(before)


def chunk_sizes(fixed: int, each: int, directions: int, limit: int) -> tuple[int, int]:
    """Images and directions at a time within a limit, but one of each at least.

    Args:
        fixed: bytes per image.
        each: bytes per image and direction.
        directions: how many there are.
        limit: bytes that a chunk may take.
    """
    at_once = max(1, min(directions, (limit - fixed) // each))
    return max(1, min(_MOST_ROWS // at_once, limit // (fixed + at_once * each))), at_once


def _basis(weight: torch.Tensor) -> torch.Tensor:
    """As few rows (rank, num_features) as have the same sum of squared products as the readout's."""
    _, sizes, rows = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = int((sizes > sizes[0] * max(weight.shape) * torch.finfo(weight.dtype).eps).sum())
    return (sizes[:, None] * rows)[: max(1, rank)].to(weight)


def _class_directions(
    logits: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor | None, directions: int, seed: int
) -> torch.Tensor:
    """Vectors (directions, batch, classes): the loss's gradient at the logits if there are labels, else signs."""
    if labels is not None:
        return (logits.softmax(1) - F.one_hot(labels[rows], logits.shape[1]).to(logits))[None]
    shape = (directions, logits.shape[1])
    signs = [torch.randint(2, shape, generator=seeded(Stream.SIGNS, seed, row)) for row in rows.tolist()]
    return (2 * torch.stack(signs, 1) - 1).to(logits)


def _summed(values: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms and their standard errors, (batch, parts) each, of values (directions, batch, parts)."""
    values = values.double()
    if method == "random":
        return values.mean(0), values.std(0) / len(values) ** 0.5
    return values.sum(0), torch.zeros_like(values[0])


def _bytes(network: Chain, image: torch.Tensor) -> tuple[int, int]:
    """Bytes per image, and per image and direction, that gradients take at most at a time; rather too many."""
    alone = [frozenset({name}) for name in network.part_names]
    one, two = (bytes_per_candidate(network, image, alone, n) for n in (1, 2))
    behind = [b - a for a, b in zip(one, two, strict=True)]  # activations of a part and all that follow, per image
    largest = max(a - b for a, b in pairwise([*behind, 0]))
    weights = max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in network.parts)
    return behind[0] + _UNFOLDED * largest, max(1, 3 * largest + 2 * weights)


def _check_call(
    backbone: Chain, head: nn.Linear, method: str, labels: torch.Tensor | Sequence[int] | None, n: int
) -> torch.Tensor | None:
    """The labels, if the method wants them; or an error that names the wrong argument."""
    if head.in_features != backbone.num_features:
        raise ValueError(f"head takes {head.in_features} features, but {backbone.name} has {backbone.num_features}")
    if (labels is None) == (method == "loss"):
        raise ValueError(f'labels are {"missing for" if labels is None else "of no use to"} method "{method}"')
    if labels is None:
        return None
    labels = as_integers(labels, "labels")
    if len(labels) != n:
        raise ValueError(f"{n} images but {len(labels)} labels")
    check_labels(labels, range(head.out_features), "image")
    return labels.to(backbone.mean.device)


class _Trace(NamedTuple):
    """One part run on a batch, with its graph."""

    name: str
    part: nn.Module
    x: torch.Tensor
    output: torch.Tensor
    calls: list[tuple[nn.Module, torch.Tensor, GradientEdge]]  # module, input, and where its output gradient arrives


class _Plan(NamedTuple):
    """How the gradients of one part are had: modules by formula, other parameters by vmap."""

    modules: set[nn.Module]
    others: dict[str, nn.Parameter]


def trace_parts(network: Chain, x: torch.Tensor) -> list[_Trace]:
    """Runs the parts; each has a graph of its own, so that only one part's output gradients are held at a time."""
    traces = []
    for name, part in zip(network.part_names, network.parts, strict=True):
        x, calls = x.detach().requires_grad_(), []

        def note(module: nn.Module, args: tuple, output: torch.Tensor, x=x, calls=calls) -> None:
            if len(args) == 1 and len(args[0]) == len(x) and output.requires_grad:
                # The edge, unlike the tensor, stays the module's own when a later module writes into its output.
                calls.append((module, args[0].detach(), get_gradient_edge(output)))

        with _NETWORK:
            hooks = [module.register_forward_hook(note) for module in part.modules() if _has_formula(module)]
            output = part(x.clone())  # a part may write into its input
            for hook in hooks:
                hook.remove()
        traces.append(_Trace(name, part, x, output, calls))
        x = output
    return traces


def _has_formula(module: nn.Module) -> bool:
    padded_by_name = isinstance(module, nn.Conv2d) and isinstance(module.padding, str)
    return isinstance(module, (nn.Conv2d, nn.Linear, *_NORMS)) and not padded_by_name


def plans_of(network: Chain, example: torch.Tensor) -> list[_Plan]:
    """One plan a part, made in double precision, where a formula that is slightly wrong can't pass for rounding."""
    precise, plans = copy.deepcopy(network).double(), []
    twins = dict(zip(precise.modules(), network.modules(), strict=True))
    for trace, part in zip(trace_parts(precise, example.double()), network.parts, strict=True):
        modules, others = _plan(trace)
        plans.append(_Plan({twins[m] for m in modules}, {name: part.get_parameter(name) for name in others}))
    return plans


def _plan(trace: _Trace) -> _Plan:
    """Takes the formula where it agrees with autograd on an example, which subclasses and hooks may upset."""
    if (trace.part(trace.x[:1].clone()) - trace.output[:1]).abs().amax() > 1e-6 * trace.output.abs().amax():
        raise ValueError(f"{trace.name} mixes the images of a batch, e.g. by BatchNorm without running statistics")
    others = dict(trace.part.named_parameters())
    g = [torch.randn(trace.output.shape, generator=seeded(Stream.PROBE, 0)).to(trace.output)]
    expected, names = _norms_by_vmap(trace, others, g), {module: name for name, module in trace.part.named_modules()}
    called, modules = [module for module, *_ in trace.calls], set()
    for (module, x, _), gradient in zip(trace.calls, gradients_in(trace, g)[1], strict=True):
        names_here = [name for name, _ in module.named_parameters(names[module], recurse=False)]
        if gradient is None or called.count(module) > 1 or not names_here or not {*names_here} <= others.keys():
            continue
        wanted = sum(expected[name] for name in names_here)
        if torch.allclose(_norms_by_formula(module, x, gradient), wanted, rtol=1e-6, atol=0):
            modules.add(module)
            others = {name: p for name, p in others.items() if name not in names_here}
    return _Plan(modules, others)


def _norms_backward(traces: list[_Trace], plans: list[_Plan], g: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared norms (directions, batch, parts) for gradients at the features, (batch, num_features) per direction.

    The graphs are kept for further directions.
    """
    columns = []
    for trace, plan in zip(reversed(traces), reversed(plans), strict=True):
        before, gradients = gradients_in(trace, g, to_input=trace is not traces[0])
        norms = sum(_norms_by_vmap(trace, plan.others, g).values(), g[0].new_zeros(len(g[0]), len(g)))
        for (module, x, _), gradient in zip(trace.calls, gradients, strict=True):
            if module in plan.modules:
                norms = norms + _norms_by_formula(module, x, gradient)
        columns.append(norms.T)
        g = before
    return torch.stack(columns[::-1], -1)


def gradients_in(
    trace: _Trace, g: Sequence[torch.Tensor], to_input: bool = True
) -> tuple[Sequence[torch.Tensor], list[torch.Tensor | None]]:
    """What arrives at the part's input, and at the output of each noted module as (batch, directions, ...).

    One backward per direction: batched ones would be loops inside autograd, with copies before and after each step.
    """
    wanted = [trace.x] * to_input + [edge for *_, edge in trace.calls]
    rows = [torch.autograd.grad(trace.output, wanted, one, retain_graph=True, allow_unused=True) for one in g]
    before, *others = [*zip(*rows, strict=True)] if to_input else [(), *zip(*rows, strict=True)]
    return before, [None if some[0] is None else torch.stack(some, 1) for some in others]


def _norms_by_vmap(
    trace: _Trace, params: dict[str, nn.Parameter], g: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Squared norms (batch, directions) of each parameter's gradients, whatever the part does with it."""
    return by_vmap(trace, params, g, lambda gradient: gradient.flatten(1).square().sum(1))


def by_vmap(
    trace: _Trace,
    params: dict[str, nn.Parameter],
    g: Sequence[torch.Tensor],
    of_gradient: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What a function makes of each parameter's gradients (directions, ...) of an image, for all images."""
    if not params:
        return {}

    def alone(x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
        _, pull = vjp(lambda weights: functional_call(trace.part, weights, (x[None].clone(),)), params)
        (gradients,) = vmap(pull)(g[:, None])
        return {name: of_gradient(gradient) for name, gradient in gradients.items()}

    with _NETWORK:
        return vmap(alone)(trace.x.detach(), torch.stack([*g], 1))


def _norms_by_formula(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Squared norms (batch, directions) of the gradients of a module's weight and bias.

    Args:
        module: convolution, linear map or norm.
        x: its input (batch, ...).
        g: gradients at its output (batch, directions, ...).
    """
    a, g = matrices(module, x, g)
    (b, k, groups, wide, places), narrow = g.shape, a.shape[2]
    norms = g.sum(-1).square().sum((2, 3)) if module.bias is not None else 0
    if module.weight is None:
        return norms
    if wide == narrow == 1:
        return norms + torch.stack([(one * a).sum(-1).square().sum((1, 2)) for one in g.unbind(1)], 1)
    # ||g a^T||^2 = <g, g a^T a> is less work where places are few
    rows = g.transpose(1, 2).reshape(b, groups, k * wide, places)
    few = places * (narrow + k * wide) < narrow * k * wide
    products = rows @ (a.mT @ a) * rows if few else (rows @ a.mT).square()
    return norms + products.view(b, groups, k, -1).sum((1, 3))


def matrices(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs a (batch, groups, I, places) and output gradients g (batch, directions, groups, O, places).

    The weight's gradient is g a^T, group by group; a norm's scale is a 1 x 1 weight per channel.
    """
    if isinstance(module, nn.Conv2d):
        a = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return a.unflatten(1, (module.groups, -1)), g.flatten(3).unflatten(2, (module.groups, -1))
    if isinstance(module, nn.Linear):
        a, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(*g.shape[:2], -1, g.shape[-1])
        return a.mT[:, None], g.mT[:, :, None]
    if isinstance(module, nn.LayerNorm):
        width = math.prod(module.normalized_shape)
        a = F.layer_norm(x, module.normalized_shape, eps=module.eps).reshape(len(x), -1, width)
        return a.mT[:, :, None], g.reshape(*g.shape[:2], -1, width).mT[:, :, :, None]
    a = F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)
    return a.flatten(2)[:, :, None] if a.dim() > 2 else a[:, :, None, None], g.reshape(*g.shape[:3], 1, -1)
