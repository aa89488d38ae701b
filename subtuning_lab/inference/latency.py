"""How long a network takes: medians after a warm-up, and networks compared side by side in one run."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import nn

from subtuning_lab.inference.preparation import random_images, trained_size
from subtuning_lab.utils.containers import Mapped
from subtuning_lab.utils.validation import Is, OneOf, Rule, Sides, Whole, checked, shown

_PAPERS_SIZE = 224  # pixels a side
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_MEASURED: dict[str, Rule] = {
    "image_size": Sides().or_none(),
    "batch_size": Whole(1),
    "runs": Whole(1),
    "warmup": Whole(0),
    "device": Is((str, torch.device)).or_none(),
    "threads": Whole(1).or_none(),
    "clock": OneOf(tuple(_CLOCKS)),
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass.

    Args:
        median: over the runs, in ms.
        q25, q75: quartiles, in ms.
        n: timed runs; those of the warm-up don't count.
        batch_size: images of one pass.
        device: kind of device, "cpu" or "cuda".
        precision: of the network's weights, e.g. "float32".
        threads: of torch on the CPU.
    """

    median: float
    q25: float
    q75: float
    n: int
    batch_size: int
    device: str
    precision: str
    threads: int

    @property
    def iqr(self) -> float:
        """The spread of the middle half of the runs, in ms."""
        return self.q75 - self.q25

    def __str__(self) -> str:
        threads = f", threads {self.threads}" if self.device == "cpu" else ""
        spread = f"{self.median:.3f} ms (IQR {self.iqr:.3f}, n = {self.n})"
        return f"{spread}, batch {self.batch_size}, {self.precision}, {self.device}{threads}"


@checked(net=Is(nn.Module), **_MEASURED)
def measure_latency(
    net: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    *,
    runs: int = 100,
    warmup: int = 10,
    device: str | torch.device | None = None,
    threads: int | None = None,
    clock: str = "wall",
) -> Latency:
    """Times a network's forward pass on random images in [0, 1], in inference mode.

    Args:
        net: takes images (batch, 3, height, width); its train or eval mode is left as it is.
        image_size: height and width in pixels, one number if they are equal; by default those that a tuned or merged
            network's `prepare` gives, and 224 for other networks.
        batch_size: images of one pass.
        runs, warmup: passes that are timed, and before them passes that are not.
        device: by default the network's own; for another one a copy is measured.
        threads: of torch on the CPU while measuring; by default as they are.
        clock: "wall" for the time that passes, or "cpu" for the time that this process computes, all threads together:
            with one thread the same on a quiet machine, and hardly another one on a busy machine. Only for a CPU.
    Source: PAPER "Efficient Multi-Task Inference", which measures batch 1 at 224 x 224 in float32.
    """
    plan = _Plan(image_size, batch_size, runs, warmup, device, threads, clock)
    return plan.latency(net, plan.times({"net": net})["net"])


@checked(nets=Mapped(Is(nn.Module)), **_MEASURED)
def compare_latency(
    nets: Mapping[str, nn.Module],
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    *,
    runs: int = 100,
    warmup: int = 10,
    device: str | torch.device | None = None,
    threads: int | None = None,
    clock: str = "wall",
) -> pd.DataFrame:
    """Times several networks in turns, one pass each, so that a busy moment of the machine meets all of them.

    Args:
        nets: name -> network; ratios are to the first one.
        image_size, batch_size, runs, warmup, device, threads, clock: as in `measure_latency`; runs of each network,
            and by default the size of the first one that has such a `prepare`.
    Returns:
        One row a network, by `name`: `median_ms`, `q25_ms`, `q75_ms`; `ratio` (median over the rounds of its time to
        the first network's of the same round), `ratio_q25`, `ratio_q75`; `n`, `batch_size`, `device`, `precision`,
        `threads`.
    """
    plan = _Plan(image_size, batch_size, runs, warmup, device, threads, clock)
    times = plan.times(nets)
    first, rows = times[next(iter(nets))], {}
    for name, net in nets.items():
        row = asdict(plan.latency(net, times[name]))
        ratios = np.quantile(times[name] / first, (0.5, 0.25, 0.75))
        rows[name] = {
            **{f"{key}_ms": row.pop(key) for key in ("median", "q25", "q75")},
            **dict(zip(("ratio", "ratio_q25", "ratio_q75"), ratios, strict=True)),
            **row,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


class OneAfterAnother(nn.Module):
    """Several networks on the same images, one after another: what merging is compared with.

    Args:
        networks: name -> network, each images -> logits.
    """

    @checked(networks=Mapped(Is(nn.Module)))
    def __init__(self, networks: Mapping[str, nn.Module]):
        super().__init__()
        self.names, self.networks = tuple(networks), nn.ModuleList(networks.values())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits of each network by name."""
        return {name: network(images) for name, network in zip(self.names, self.networks, strict=True)}


@dataclass(frozen=True)
class _Plan:
    """How networks are timed; arguments of `measure_latency`."""

    image_size: int | tuple[int, int] | None
    batch_size: int
    runs: int
    warmup: int
    device: str | torch.device | None
    threads: int | None
    clock: str

    def times(self, nets: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        """Milliseconds of every run by network; run i of one is next to run i of the others."""
        self._check(nets)
        known = (self.image_size, *map(trained_size, nets.values()), _PAPERS_SIZE)
        size = next(size for size in known if size is not None)
        height, width = size if isinstance(size, tuple | list) else (size, size)
        images = random_images(self.batch_size, height, width)
        ready = {name: self._on_device(net) for name, net in nets.items()}
        inputs = {name: images.to(_weight(net)) for name, net in ready.items()}
        times: dict[str, list[float]] = {name: [] for name in nets}
        names = list(nets)
        with torch.inference_mode(), _threads(self.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random images need not be of the size that a task was trained on
            for run in range(-self.warmup, self.runs):
                turn = run % len(names)  # nobody is always the first of a round
                for name in names[turn:] + names[:turn]:
                    elapsed = _timed(ready[name], inputs[name], _CLOCKS[self.clock])
                    if run >= 0:
                        times[name].append(elapsed)
        return {name: np.array(values) for name, values in times.items()}

    def latency(self, net: nn.Module, times: np.ndarray) -> Latency:
        """What the times of one network come to."""
        median, q25, q75 = (float(value) for value in np.quantile(times, (0.5, 0.25, 0.75)))
        precision = str(_weight(net).dtype).removeprefix("torch.")
        threads = self.threads or torch.get_num_threads()
        return Latency(median, q25, q75, len(times), self.batch_size, self._kind(net), precision, threads)

    def _on_device(self, net: nn.Module) -> nn.Module:
        stays = self.device is None or torch.device(self.device) == _weight(net).device
        return net if stays else copy.deepcopy(net).to(self.device)

    def _kind(self, net: nn.Module) -> str:
        return (_weight(net).device if self.device is None else torch.device(self.device)).type

    def _check(self, nets: Mapping[str, nn.Module]) -> None:
        try:
            kinds = {self._kind(net) for net in nets.values()}
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ValueError(f"device is {shown(self.device)}; torch has none of this name here") from error
        if "meta" in kinds:
            raise ValueError("device is meta, where nothing is computed; measure on another one")
        if self.clock == "cpu" and kinds != {"cpu"}:
            raise ValueError(f'clock="cpu" is for networks on the CPU, not on {", ".join(sorted(kinds - {"cpu"}))}')


def _timed(net: nn.Module, images: torch.Tensor, clock: Callable[[], float]) -> float:
    """Milliseconds of one pass, all work on the device included."""
    if images.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(images.device)
        start.record()
        net(images)
        end.record()
        torch.cuda.synchronize(images.device)
        return start.elapsed_time(end)
    begin = clock()
    net(images)
    return 1e3 * (clock() - begin)


def _weight(net: nn.Module) -> torch.Tensor:
    """The first floating point weight, which tells device and precision; an empty one for a network without any."""
    tensors = chain(net.parameters(), net.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
