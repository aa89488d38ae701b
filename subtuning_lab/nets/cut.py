"""Any module as a chain: cut where one tensor carries everything on, which a single run of it tells."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from subtuning_lab.nets.ghosts import ABOUT, Call, Plan, Segment, input_of, shell


@dataclass
class _Passed:
    """A value at the time on the clock when it passed, with its place in autograd's graph, which writes change."""

    value: object
    time: int
    alone: bool = True

    def __post_init__(self) -> None:
        is_tensor = isinstance(self.value, torch.Tensor)
        self.place = (self.value.grad_fn, self.value.output_nr) if is_tensor else None


class _Watch(TorchFunctionMode):
    """Notes what modules take and give in a run, by name, and when each parameter and buffer is used, by id."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        super().__init__()
        self.clock, self.used = 0, defaultdict(set)
        self.taken, self.given = defaultdict(list), defaultdict(list)
        self.owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.hooks = [hook for name in names for hook in self._hooks(name, model.get_submodule(name))]

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func not in ABOUT:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.owned:
                    self.used[id(leaf)].add(self.clock)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _hooks(self, name: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.clock += 1
            alone = len(args) == 1 and not kwargs
            self.taken[name].append(_Passed(input_of(args, kwargs), self.clock, alone))

        def behind(_: nn.Module, args: tuple, output: object) -> None:
            self.clock += 1
            self.given[name].append(_Passed(output, self.clock))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(behind)


class Trace:
    """One run of a model on two random images, which tells where it can be cut.

    Args:
        model: put into eval mode.
        call: what to call with the model and images; gives features (batch, num_features).
        names: modules that might be blocks.
        size: height and width of the images.
        readout: name of the module that takes in the features; None where `call` gives them.

    Raises:
        ValueError: a model that can't be run, or features of another shape.
    """

    def __init__(
        self, model: nn.Module, call: Call, names: Iterable[str], size: tuple[int, int], readout: str | None = None
    ):
        self.model, self.call, self.size, self.readout = model.eval().requires_grad_(True), call, size, readout
        self.images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        leaf = self.images.clone().requires_grad_()
        with torch.enable_grad(), _Watch(model, {*names, readout} - {None}) as self.watch:
            try:
                features = call(model, leaf.clone())
            except Exception as error:  # whatever a model says of images that don't suit it
                raise ValueError(f"it can't take images of {size[0]} x {size[1]}: {error}") from error
        if readout is not None:
            taken = self.watch.taken[readout]
            features = taken[-1].value if taken else None
        if not isinstance(features, torch.Tensor) or features.dim() != 2 or len(features) != 2:
            raise ValueError(f"features are {_said(features)} for 2 images; they must be (batch, num_features)")
        self.features, self.edges = features, {}
        self._follow(leaf)

    def _follow(self, leaf: torch.Tensor) -> None:
        """Finds how the features come from the images: autograd's nodes and, of each, the inputs that do."""
        waiting, users = [self.features.grad_fn], defaultdict(list)
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.edges:
                self.edges[node] = node.next_functions
                for other, _ in node.next_functions:
                    users[other].append(node)
                    waiting.append(other)
        self.source = next((node for node in self.edges if getattr(node, "variable", None) is leaf), None)
        above = _reached(self.source, users)
        self.edges = {node: [edge for edge in self.edges[node] if edge[0] in above] for node in above if node}

    def fault(self, name: str, before: bool = False) -> str | None:
        """What keeps a chain from being cut behind a module, or before it; None where it can be."""
        passed = (self.watch.taken if before else self.watch.given)[name]
        if len(passed) != 1:
            return f"{name} is called {len(passed)} times; a block of a chain runs once"
        value, what = passed[0].value, f"{name} {'takes' if before else 'gives'}"
        if not isinstance(value, torch.Tensor):
            return f"{what} {_said(value)}; every activation must be one tensor"
        if value.dim() < 2 or len(value) != 2 or not value.is_floating_point():
            return f"{what} {_said(value)} for 2 images; its first axis must be the batch"
        root = self.features.grad_fn, self.features.output_nr
        ways = {node: [edge[0] for edge in edges if edge != passed[0].place] for node, edges in self.edges.items()}
        if root != passed[0].place and self.source in _reached(root[0], ways):
            return f"{what} one of several tensors that go on from there: a skip leads past it"
        return None


def cut(kind: type[nn.Module], trace: Trace, units: Mapping[str, Sequence[str]], **settings: object) -> nn.Module:
    """The chain of a traced model; takes the model's modules over.

    Args:
        kind: `Chain`, whose file imports this one.
        trace: of the model.
        units: block name -> the modules that it ends with: one, or several that follow each other in an nn.Sequential.
        settings: of `Chain`.

    Raises:
        ValueError: what breaks the chain, or that it does not compute what the model does.
    """
    taken, given = trace.watch.taken, trace.watch.given
    units = dict(sorted(units.items(), key=lambda unit: taken[unit[0]][0].time if taken[unit[0]] else -1))
    first, ends = next(iter(units)), [members[-1] for members in units.values()]
    if fault := next(filter(None, (*map(trace.fault, ends), trace.fault(first, before=True))), None):
        raise ValueError(fault)
    passed = [taken[first][0], *(given[end][0] for end in ends)]
    owners = _owners(trace, [each.time for each in passed], ("the stem", *units, "the tail"))
    gates = {end: (None, boundary) for boundary, end in enumerate(ends, start=1)}
    gates[first] = (0, gates.get(first, (None, None))[1])
    gates |= {trace.readout: (len(passed), None)} if trace.readout else {}
    shapes = {boundary: tuple(each.value.shape[1:]) for boundary, each in enumerate(passed)}
    plan = Plan(trace.call, shell(trace.model, gates, ()), trace.size, shapes)
    parts = [Segment(plan, i - 1, shell(trace.model, gates, owner, i)) for i, owner in enumerate(owners)]
    for i, members in enumerate(units.values(), start=1):
        own = taken[members[0]][0]
        if own.alone and own.value is passed[i - 1].value and own.place == passed[i - 1].place:
            modules = [trace.model.get_submodule(member) for member in members]
            parts[i] = nn.Sequential(*modules) if len(modules) > 1 else modules[0]
    blocks, width = dict(zip(units, parts[1:-1], strict=True)), trace.features.shape[-1]
    _prove([part.eval() for part in parts], trace)
    return kind(parts[0], blocks, parts[-1], width, **{"input_size": (3, *trace.size)} | settings).eval()


def cut_module(
    kind: type[nn.Module],
    model: nn.Module,
    blocks: str | Sequence[str],
    *,
    call: Call | None = None,
    features: str | None = None,
    input_size: tuple[int, int, int],
    **settings: object,
) -> nn.Module:
    """The chain of a model by the names of its blocks, see `Chain.from_module`."""
    modules = dict(model.named_modules())
    names = [blocks] if isinstance(blocks, str) else [*blocks]
    if unknown := [name for name in (*names, features) if name is not None and name not in modules]:
        kind, known = type(model).__name__, ", ".join(modules)[2:]
        what = "blocks" if set(unknown) & set(names) else "features"
        raise ValueError(f"{what} is {', '.join(map(repr, unknown))}, which is no module of {kind}; it has {known}")
    names = children_of(model, blocks) if isinstance(blocks, str) else names
    if not names:
        raise ValueError(f"blocks is {blocks!r}, which names no blocks; name a container of some, or a list of blocks")
    units = units_of(model, names)
    trace = Trace(
        model, call or _plainly, [member for unit in units.values() for member in unit], input_size[1:], features
    )
    return cut(kind, trace, whole_units(trace, units), input_size=input_size, **settings)


def children_of(model: nn.Module, name: str) -> list[str]:
    """Names of the blocks in a container: its children that have more weights than norms have."""
    children = model.get_submodule(name).named_children()
    return [f"{name}.{child}".lstrip(".") for child, module in children if has_weights(module)]


def has_weights(module: nn.Module) -> bool:
    """Whether there are other weights in it than a norm has."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def units_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Block name -> its modules: itself, and what follows in an nn.Sequential without weights, such as a norm."""
    units = {name: [name] for name in names}
    for name, unit in units.items():
        parent, _, own = name.rpartition(".")
        siblings = model.get_submodule(parent)
        if isinstance(siblings, nn.Sequential):
            later = [*siblings.named_children()][[*siblings._modules].index(own) + 1 :]
            with_it = takewhile(lambda item: not has_weights(item[1]), later)
            unit += [f"{parent}.{other}".lstrip(".") for other, _ in with_it]
    return units


def whole_units(trace: Trace, units: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Units up to the last of their modules behind which the model can be cut; the first one stays in any case."""
    ends = {name: [n for n, member in enumerate(unit) if trace.fault(member) is None] for name, unit in units.items()}
    return {name: unit[: max(ends[name], default=0) + 1] for name, unit in units.items()}


def examine_parts(parts: Mapping[str, nn.Module], example: torch.Tensor) -> tuple[frozenset[int], list[str]]:
    """What frozen parts do besides computing.

    Args:
        parts: in the network's order, in eval mode.
        example: two or more normalized images (batch, 3, height, width).

    Returns:
        Positions of parts that write into their input, and names of parts in which an image's output depends on its
        neighbours in the batch, far beyond rounding (which is coarse in TF32).
    """
    in_place, mixing = set(), []
    with torch.no_grad():
        for position, (name, part) in enumerate(parts.items()):
            x, first = example.clone(), example[:1].clone()
            before = x._version
            output = part(x)
            if x._version > before:
                in_place.add(position)
            if (part(first) - output[:1]).abs().amax() > 1e-2 * output.abs().amax():
                mixing.append(name)
            example = output
    return frozenset(in_place), mixing


def _owners(trace: Trace, times: Sequence[int], names: Sequence[str]) -> list[set[int]]:
    """For each part the ids of the parameters and buffers that it uses first. Raises for shared parameters."""
    owners, parameters = [set() for _ in names], {id(p): name for name, p in trace.model.named_parameters()}
    end = trace.watch.taken[trace.readout][-1].time if trace.readout else trace.watch.clock + 1
    for key, clocks in trace.watch.used.items():
        used = sorted({bisect_right(times, clock) for clock in clocks if clock < end})
        if len(used) > 1 and key in parameters:
            raise ValueError(f"{names[used[0]]} and {names[used[1]]} share the parameter {parameters[key]}")
        for part in used[:1]:
            owners[part].add(key)
    return owners


def _prove(parts: Sequence[nn.Module], trace: Trace) -> None:
    """Raises ValueError unless the parts give the traced features, bit for bit, and the gradient of a middle block."""
    features, middle = trace.images.clone().requires_grad_(), parts[len(parts) // 2]
    try:
        with torch.enable_grad():
            for part in parts:
                features = part(features.clone())
    except RuntimeError as error:
        raise ValueError(f"its parts don't run one by one: {error}") from error
    if not torch.equal(features, trace.features):
        apart = float((features - trace.features).abs().max())
        raise ValueError(f"the chain's features differ from the model's by up to {apart:.2g}")
    weights, along = [*middle.parameters()], torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    own, models = (torch.autograd.grad(f, weights, along, materialize_grads=True) for f in (features, trace.features))
    if not all(torch.allclose(ours, theirs, 1e-3, 1e-6) for ours, theirs in zip(own, models, strict=True)):
        raise ValueError("the gradient of its middle block differs from the model's")


def _reached(start: object, ways: Mapping[object, Sequence[object]]) -> set[object]:
    """All that can be reached from somewhere, the start among it."""
    found, waiting = set(), [start]
    while waiting:
        if (node := waiting.pop()) not in found:
            found.add(node)
            waiting += ways.get(node, ())
    return found


def _plainly(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images)


def _said(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
