"""Parts that are no modules of their own, such as a stem, a tail, or a block with what lies before it.

They run the model's own `forward`: on shapes alone (`Ghost`) before the part, and not at all behind it.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Shape = tuple[int, ...]
Gates = Mapping[str, tuple[int | None, int | None]]
# What may be asked of a tensor without a look at its values.
_PROPERTIES = "shape dtype device ndim requires_grad is_cuda layout is_leaf itemsize is_meta is_sparse is_quantized"
_METHODS = "size dim numel nelement stride is_contiguous is_floating_point is_complex get_device element_size __len__"
ABOUT = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()}
ABOUT |= {getattr(torch.Tensor, name) for name in _METHODS.split()}


class Ghost(torch.Tensor):
    """A tensor without values: what is computed with one is one again, with the shape that it should have."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Ghost:
        """`inner` is on the meta device; the ghost claims the device and precision of the run that goes on."""
        like = _NOW.run.value
        dtype, strides = like.dtype if inner.is_floating_point() else inner.dtype, inner.stride()
        ghost = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides, dtype=dtype, device=like.device)
        ghost.inner = inner
        return ghost

    @classmethod
    def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in ABOUT:
            return super().__torch_function__(func, types, args, kwargs or {})
        if _NOW.run.resumed:
            raise ValueError(f"{getattr(func, '__name__', func)} needs what was computed before the part began")
        with _disable_current_modes(), torch.no_grad():  # nobody is to count, trace or export it
            result = func(*tree_map(_bare, args), **tree_map(_bare, kwargs or {}))
        return tree_map(lambda leaf: Ghost(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        raise NotImplementedError(f"{func} looks at values")

    def __deepcopy__(self, memo: dict) -> Ghost:
        return self

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _ghost, (tuple(self.inner.shape), self.inner.dtype)


def _ghost(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Ghost:
    with _disable_current_modes():
        return Ghost(torch.empty(shape, dtype=dtype, device="meta"))


def _bare(leaf: object) -> object:
    """What ghosts compute with: everything on the meta device, in float32."""
    if isinstance(leaf, Ghost):
        return leaf.inner
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().to("meta", torch.float32 if leaf.is_floating_point() else leaf.dtype)
    if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
        return torch.float32
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


class _Reached(BaseException):
    """The end of a part, with its output; a model's own `except Exception` must not catch it."""


@dataclass
class _Run:
    """A run through a model from boundary `start`, where `value` stands, to boundary `stop`; -1 are the images."""

    start: int
    stop: int
    value: torch.Tensor
    shapes: Mapping[int, Shape] = field(default_factory=dict)
    resumed: bool = False
    seen: dict[int, Shape] = field(default_factory=dict)
    reached: torch.Tensor | None = None

    def at(self, boundary: int, value: torch.Tensor) -> torch.Tensor:
        """What goes on behind a boundary."""
        if boundary == self.start:
            self.resumed = True
            return self.value
        if boundary == self.stop and not torch.compiler.is_exporting():
            raise _Reached(value)
        if boundary == self.stop:  # exporters lose count of the modules that an error leaves: the rest is ghosts
            self.reached, self.resumed = value, False
            return _ghost(value.shape)
        self.seen[boundary] = tuple(value.shape[1:])
        return value

    def of(self, call: Call, model: nn.Module, images: torch.Tensor | Shape) -> torch.Tensor:
        """What the model gives, or what reached boundary `stop`; images are ghosts where there is a shape alone."""
        outer, _NOW.run = _NOW.run, self
        try:
            output = call(model, images if isinstance(images, torch.Tensor) else _ghost(images))
            return output if self.reached is None else self.reached
        except _Reached as reached:
            return reached.args[0]
        finally:
            _NOW.run = outer


class _Now(threading.local):
    """The run that goes on in this thread."""

    run = _Run(-1, -1, torch.empty(0))


_NOW = _Now()


class _Gate(nn.Module):
    """Stands in a module's place where a boundary is at its input (`enters`) or at its output (`leaves`)."""

    def __init__(self, enters: int | None, leaves: int | None, inner: nn.Module | None):
        super().__init__()
        self.enters, self.leaves, self.inner = enters, leaves, inner

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The module's output, or what the run that goes on has in its place."""
        run = _NOW.run
        if self.enters is not None:
            value = run.at(self.enters, input_of(args, kwargs))
            args, kwargs = ((value, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): value})
        if self.leaves is not None and (run.start > self.leaves or run.reached is not None):
            return _ghost((run.value.shape[0], *run.shapes[self.leaves]))
        if self.leaves is not None and run.start == self.leaves:
            return run.at(self.leaves, run.value)
        output = self.inner(*args, **kwargs)
        return output if self.leaves is None else run.at(self.leaves, output)


def input_of(args: tuple, kwargs: Mapping[str, object]) -> object:
    """What a module is called on: its first argument."""
    return args[0] if args else next(iter(kwargs.values()), None)


class Plan:
    """What the parts of a model share.

    Args:
        call: how to run it.
        skeleton: the model in ghosts.
        size: height and width of the images that it is known for.
        shapes: boundary -> shape of its activation then, without the batch.
    """

    def __init__(self, call: Call, skeleton: nn.Module, size: tuple[int, int], shapes: Mapping[int, Shape]):
        self.call, self.skeleton, self.size = call, skeleton.eval(), size
        self.of_tokens = any(len(shape) == 2 for shape in shapes.values())
        self._shapes: dict[tuple[int, int], Mapping[int, Shape]] = {size: shapes}
        self._sizes: dict[tuple[int, Shape], tuple[int, int]] = {}

    def __deepcopy__(self, memo: dict) -> Plan:
        return self

    def shapes(self, size: tuple[int, int]) -> Mapping[int, Shape]:
        """The activations' shapes for images of another size; empty where the model can't take them."""
        if size not in self._shapes:
            run = _Run(-1, len(self._shapes[self.size]), torch.empty(2))
            try:
                run.of(self.call, self.skeleton, (2, 3, *size))
            except Exception:  # whatever a model says of images that don't suit it
                run.seen.clear()
            self._shapes[size] = run.seen
        return self._shapes[size]

    def image_size(self, boundary: int, shape: Shape) -> tuple[int, int]:
        """Height and width of images that have an activation of this shape at a boundary."""
        if (boundary, shape) not in self._sizes:
            sizes = (size for size in self._guesses(boundary, shape) if self.shapes(size).get(boundary) == shape)
            self._sizes[boundary, shape] = next(sizes, (0, 0))
        if self._sizes[boundary, shape] == (0, 0):
            raise ValueError(f"no images are known that have activations of {shape} here; try those of {self.size}")
        return self._sizes[boundary, shape]

    def _guesses(self, boundary: int, shape: Shape) -> Iterator[tuple[int, int]]:
        yield self.size
        height, width = self.size
        known, double = (self.shapes(size).get(boundary, ()) for size in (self.size, (2 * height, 2 * width)))
        if len(shape) == 2:  # tokens of a grid, with some among them that are no patches
            grids = [[math.sqrt(max(0, n - p)) for n in (known[0], *double[:1], shape[0])] for p in range(9)]
            shares = [(g[-1] - g[0]) / (g[1] - g[0]) for g in grids if len(g) == 3 and all(map(float.is_integer, g))]
            yield from ((round(height + height * share), round(width + width * share)) for share in shares)
        shares = [(c - a) / (b - a) for a, b, c in zip(known, double, shape, strict=False) if a != b]
        if len(shape) > 2 and len(shares) == 2:
            yield round(height + height * shares[0]), round(width + width * shares[1])


class Segment(nn.Module):
    """A part of a model between two boundaries; `model` has its modules and ghosts of the others."""

    def __init__(self, plan: Plan, start: int, model: nn.Module):
        super().__init__()
        self.start, self.model = start, model
        self._plan = plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the model makes of images or an activation (batch, ...) up to the part's end.

        Raises:
            ValueError: images of another aspect where activations are tokens, which don't tell it, or of a size that
                the model can't take.
        """
        plan, images, shapes = self._plan, x, {}
        height, width = plan.size
        if self.start >= 0:
            size = plan.image_size(self.start, tuple(x.shape[1:]))
            images, shapes = (x.shape[0], 3, *size), plan.shapes(size)
        elif plan.of_tokens and x.shape[-2] * width != x.shape[-1] * height:
            raise ValueError(
                f"images are {x.shape[-2]} x {x.shape[-1]}; their sides must be to each other as {plan.size}"
            )
        if torch.compiler.is_exporting() and not shapes:
            shapes = plan.shapes(tuple(x.shape[-2:]))
        return _Run(self.start, self.start + 1, x, shapes, resumed=self.start < 0).of(plan.call, self.model, images)


def shell(
    module: nn.Module, gates: Gates, owned: Collection[int], stop: int | None = None, path: str = ""
) -> nn.Module:
    """A copy of a module with gates in it, which shares the tensors that are owned and has ghosts of the others.

    Args:
        module, path: what to copy, and where in the model it is.
        gates: path -> the boundaries at the input and the output of the module there.
        owned: ids of parameters and buffers. Buffers of constants are shared in any case.
        stop: the boundary where the part ends, behind whose gates nothing runs; None for a copy that runs as a whole.
    """
    enters, leaves = gates.get(path, (None, None))
    if stop is not None and leaves not in (None, stop):
        return _Gate(enters, leaves, None)
    if stop is not None and leaves == stop and not any(other.startswith(f"{path}.") for other in gates):
        return _Gate(enters, leaves, module)
    copied = copy.copy(module)
    copied._modules = {
        name: child and shell(child, gates, owned, stop, f"{path}.{name}".lstrip("."))
        for name, child in module._modules.items()
    }
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    gathers = any(name.startswith("running_") for name in copied._buffers)
    if gathers and any(id(buffer) in owned for buffer in copied._buffers.values()):
        owned = {*owned, *map(id, copied._buffers.values())}  # the count of batches is used in train mode alone
    for tensors in (copied._parameters, copied._buffers):
        for name, tensor in [item for item in tensors.items() if item[1] is not None and id(item[1]) not in owned]:
            if gathers or tensors is copied._parameters:
                copied.__dict__[name] = _ghost(tensor.shape, tensor.dtype)
                del tensors[name]
            else:
                copied._non_persistent_buffers_set.add(name)
    return copied if enters is leaves is None else _Gate(enters, leaves, copied)
