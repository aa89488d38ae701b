"""Squared norms of gradients per image: parts traced one by one, formulas where a module has one, vmap elsewhere."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap

from subtuning_lab.nets.chain import Chain
from subtuning_lab.utils.random import Stream, seeded

_NETWORK = threading.Lock()  # hooks, and parameters put in place for a call, are seen by every thread
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class Trace(NamedTuple):
    """One part run on a batch, with its graph."""

    name: str
    part: nn.Module
    x: torch.Tensor
    output: torch.Tensor
    calls: list[tuple[nn.Module, torch.Tensor, GradientEdge]]  # module, input, and where its output gradient arrives


class Plan(NamedTuple):
    """How the gradients of one part are had: modules by formula, other parameters by vmap."""

    modules: set[nn.Module]
    others: dict[str, nn.Parameter]


def trace_parts(network: Chain, x: torch.Tensor) -> list[Trace]:
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
        traces.append(Trace(name, part, x, output, calls))
        x = output
    return traces


def _has_formula(module: nn.Module) -> bool:
    padded_by_name = isinstance(module, nn.Conv2d) and isinstance(module.padding, str)
    return isinstance(module, (nn.Conv2d, nn.Linear, *_NORMS)) and not padded_by_name


def plans_of(network: Chain, example: torch.Tensor) -> list[Plan]:
    """One plan a part, made in double precision, where a formula that is slightly wrong can't pass for rounding."""
    precise, plans = copy.deepcopy(network).double(), []
    twins = dict(zip(precise.modules(), network.modules(), strict=True))
    for trace, part in zip(trace_parts(precise, example.double()), network.parts, strict=True):
        modules, others = _plan(trace)
        plans.append(Plan({twins[m] for m in modules}, {name: part.get_parameter(name) for name in others}))
    return plans


def _plan(trace: Trace) -> Plan:
    """Takes the formula where it agrees with autograd on an example, which subclasses and hooks may upset."""
    if (trace.part(trace.x[:1].clone()) - trace.output[:1]).abs().amax() > 1e-6 * trace.output.abs().amax():
        raise ValueError(f"{trace.name} mixes the images of a batch, e.g. by BatchNorm without running statistics")
    others = dict(trace.part.named_parameters())
    g = [torch.randn(trace.output.shape, generator=seeded(Stream.PROBE, 0)).to(trace.output)]
    expected, names = _norms_by_vmap(trace, others, g), {module: name for name, module in trace.part.named_modules()}
    called, modules = [module for module, *_ in trace.calls], set()
    for (module, x, _), gradient in zip(trace.calls, _gradients(trace, g)[1], strict=True):
        own = [name for name, _ in module.named_parameters(names[module], recurse=False)]
        if gradient is None or called.count(module) > 1 or not own or not {*own} <= others.keys():
            continue
        wanted = sum(expected[name] for name in own)
        if torch.allclose(_norms_by_formula(module, x, gradient), wanted, rtol=1e-6, atol=0):
            modules.add(module)
            others = {name: p for name, p in others.items() if name not in own}
    return Plan(modules, others)


def norms_backward(traces: list[Trace], plans: list[Plan], g: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared norms (directions, batch, parts) for gradients at the features, (batch, num_features) per direction.

    The graphs are kept for further directions.
    """
    columns = []
    for trace, plan in zip(reversed(traces), reversed(plans), strict=True):
        before, gradients = _gradients(trace, g, to_input=trace is not traces[0])
        norms = sum(_norms_by_vmap(trace, plan.others, g).values(), g[0].new_zeros(len(g[0]), len(g)))
        for (module, x, _), gradient in zip(trace.calls, gradients, strict=True):
            if module in plan.modules:
                norms = norms + _norms_by_formula(module, x, gradient)
        columns.append(norms.T)
        g = before
    return torch.stack(columns[::-1], -1)


def _gradients(
    trace: Trace, g: Sequence[torch.Tensor], to_input: bool = True
) -> tuple[Sequence[torch.Tensor], list[torch.Tensor | None]]:
    """What arrives at the part's input, and at the output of each noted module as (batch, directions, ...).

    One backward per direction: batched ones would be loops inside autograd, with copies before and after each step.
    """
    wanted = [trace.x] * to_input + [edge for *_, edge in trace.calls]
    rows = [torch.autograd.grad(trace.output, wanted, one, retain_graph=True, allow_unused=True) for one in g]
    before, *others = [*zip(*rows, strict=True)] if to_input else [(), *zip(*rows, strict=True)]
    return before, [None if some[0] is None else torch.stack(some, 1) for some in others]


def _norms_by_vmap(trace: Trace, params: dict[str, nn.Parameter], g: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Squared norms (batch, directions) of each parameter's gradients, whatever the part does with it."""
    if not params:
        return {}

    def alone(x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
        _, pull = vjp(lambda own: functional_call(trace.part, own, (x[None].clone(),)), params)
        (gradients,) = vmap(pull)(g[:, None])
        return {name: gradient.flatten(1).square().sum(1) for name, gradient in gradients.items()}

    with _NETWORK:
        return vmap(alone)(trace.x.detach(), torch.stack([*g], 1))


def _norms_by_formula(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Squared norms (batch, directions) of the gradients of a module's weight and bias.

    Args:
        module: convolution, linear map or norm.
        x: its input (batch, ...).
        g: gradients at its output (batch, directions, ...).
    """
    a, g = _matrices(module, x, g)
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


def _matrices(module: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
