"""What a chain costs: its parts' parameters, and multiplications and additions forward and backward.

Everything is counted by running it on torch's meta device, where shapes are worked out and nothing is computed; a
network that can't run there, because it makes constants or looks at values, runs once where it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from math import prod

import pandas as pd
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from subtuning_lab.nets.chain import Chain
from subtuning_lab.utils.containers import Blocks, Table
from subtuning_lab.utils.validation import IMAGE_SIZE, Flag, Is, Sides, checked

COUNTS = ("flops", "backward", "backward_first", "backward_weights")


@checked(backbone=Is(Chain), image_size=Sides(high=IMAGE_SIZE.high, none=True))
def part_table(backbone: Chain, image_size: int | tuple[int, int] | None = None) -> pd.DataFrame:
    """One row a part: its parameters, and FLOPs and output shape for one image.

    Args:
        image_size: height and width in pixels, one number if they are equal; by default the backbone's own.

    Returns:
        Table with index `part` and columns `position` (0 for the stem), `params`, `flops` (forward), `backward` (the
        gradient of its input, through all of its activations), `backward_first` (gradients of activations inside it
        where nothing before it is tuned), `backward_weights` (gradients of its weights), and `output_shape`.
    """
    size = backbone.input_size[1:] if image_size is None else image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    try:
        return _table_on("meta", backbone, height, width)
    except Exception:  # whatever a forward makes of tensors without values; what is really wrong comes up again
        return _table_on(backbone.mean.device, backbone, height, width)


def _table_on(device: torch.device | str, backbone: Chain, height: int, width: int) -> pd.DataFrame:
    skeleton = copy.deepcopy(backbone).to(device).eval().requires_grad_(True)
    x, rows = torch.full((1, 3, height, width), 0.5, device=device, dtype=backbone.mean.dtype), []
    for position, (name, part) in enumerate(zip(skeleton.part_names, skeleton.parts, strict=True)):
        with sdpa_kernel(SDPBackend.MATH):  # so fused attention is counted like any other product
            x, counts = _counted_part(part, x)
        rows.append((name, position, sum(p.numel() for p in part.parameters()), *counts, tuple(x.shape[1:])))
    return pd.DataFrame(rows, columns=["part", "position", "params", *COUNTS, "output_shape"]).set_index("part")


@checked(table=Table(numbers=COUNTS), blocks=Blocks(), weight_gradients=Flag())
def training_flops(table: pd.DataFrame, blocks: Iterable[str], weight_gradients: bool = True) -> dict[str, int]:
    """FLOPs per image and training step of one subset, by what they are spent on.

    Args:
        table: of `part_table`.
        blocks: the subset's names.
        weight_gradients: False where only biases, norms or adapters are trained; theirs cost next to nothing.

    Returns:
        "trunk": frozen forward before the first tuned part, which candidates can share; "forward": the forward from
        there on; "backward": gradients of the tuned weights, of activations in the first tuned part as far as its
        own weights need them, and of all activations behind it.
    """
    tuned = table.index.isin(list(table.index if blocks == "all" else blocks))
    first = int(tuned.argmax()) if tuned.any() else len(table)
    weights = int(table["backward_weights"][tuned].sum()) if weight_gradients else 0
    inside = int(table["backward_first"].iloc[first : first + 1].sum())
    return {
        "trunk": int(table["flops"].iloc[:first].sum()),
        "forward": int(table["flops"].iloc[first:].sum()),
        "backward": weights + inside + int(table["backward"].iloc[first + 1 :].sum()),
    }


def _counted_part(part: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The part's output, and its `COUNTS`."""
    x = x.detach().requires_grad_(True)
    output, forward = _counted(lambda: part(x.clone()))  # a part may write into its input
    weights = list(part.parameters())

    def backward(inputs: list[torch.Tensor]) -> int:
        if not inputs or not output.requires_grad:
            return 0
        return _counted(lambda: torch.autograd.grad(output, inputs, torch.empty_like(output), True, allow_unused=True))[
            1
        ]

    through = backward([x])
    of_weights = backward([x, *weights]) - through
    return output, (forward, through, backward(weights) - of_weights, of_weights)


def _counted(run: Callable[[], object]) -> tuple:
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = run()
    return result, counter.get_total_flops()


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *settings: object, **_: object
) -> int:
    """Either gradient takes as much as the forward; torch's formula takes grouped weights' for whole ones."""
    transposed, wanted = settings[4], settings[7]
    batch, _, *positions = x if transposed else gradient
    return 2 * batch * prod(positions) * prod(weight) * sum(map(bool, wanted[:2]))
