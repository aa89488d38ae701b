"""A panel to plan a merged network: pick tasks, tick their blocks, see rows and costs, and measure by a button."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ipywidgets as widgets
import pandas as pd
import torch
from matplotlib.axes import Axes

from subtuning_lab.inference.export import optimize
from subtuning_lab.inference.latency import OneAfterAnother, compare_latency
from subtuning_lab.inference.merge import ORIGINAL, merge_tasks
from subtuning_lab.inference.schedule import Schedule, plan_rows
from subtuning_lab.inference.tuned_task import TunedTask
from subtuning_lab.nets.chain import Chain, copy_weights, in_order
from subtuning_lab.nets.flops import part_table
from subtuning_lab.notebook.panel import Panel, Picture, checkbox, tick_grid
from subtuning_lab.plots import style
from subtuning_lab.plots.merge import fork_size, plot_fork
from subtuning_lab.utils.random import Stream, seeded
from subtuning_lab.utils.validation import Is, Several, Text, Whole, checked

_MERGED, _SEPARATE = "merged", "separate"
_SEED, _BLOCKS = Whole(0, 2**63 - 1), Several(Text(), least=0, unique=True)


@checked(backbone=Is(Chain), blocks=_BLOCKS, classes=Whole(1, 10**6), seed=_SEED)
def untrained_task(backbone: Chain, blocks: Iterable[str], classes: int = 10, seed: int = 0) -> TunedTask:
    """A task with weights of its own that nobody trained: for measurements, which depend on shapes only.

    Args:
        backbone: the chain that it belongs to.
        blocks: names of its parts.
        classes: of its readout.
        seed: of the weights, which are up to a tenth larger than the pretrained ones, so that no memory is shared.

    Raises:
        ValueError: an unknown block.
    """
    names, generator = in_order(backbone, blocks), seeded(Stream.WEIGHTS, seed)
    weights = copy_weights({name: backbone.part(name) for name in names})
    for tensor in (tensor for state in weights.values() for tensor in state.values()):
        if tensor.is_floating_point():
            tensor *= 1 + 0.1 * torch.rand(tensor.shape, generator=generator)
    head = torch.randn(classes, backbone.num_features, generator=generator) / backbone.num_features**0.5
    dtype = backbone.mean.dtype
    weights["head"] = {"weight": head.to(dtype), "bias": torch.zeros(classes, dtype=dtype)}
    return TunedTask(backbone, frozenset(names), weights, tuple(str(k) for k in range(classes)))


class MergePanel(Panel):
    """Pick tasks and tick their blocks, and see the merged network, its rows and its FLOPs; a button measures it.

    Args:
        backbone: what is merged.
        tasks: name -> tuned task, or names of blocks. Where the ticks are not a tuned task's own blocks, weights that
            nobody trained are measured, which take as long.
        image_size: height and width of the images in pixels; by default the backbone's own.
        batch_size, runs: of the measurement.

    Raises:
        ValueError: no tasks, one named "original", or unknown blocks.
    """

    @checked(
        backbone=Is(Chain), tasks=Is(Mapping), image_size=Whole(1, 4096, none=True), batch_size=Whole(1), runs=Whole(1)
    )
    def __init__(
        self,
        backbone: Chain,
        tasks: Mapping[str, TunedTask | Iterable[str]],
        *,
        image_size: int | None = None,
        batch_size: int = 1,
        runs: int = 40,
    ):
        _check_tasks(tasks)
        self.backbone, self.batch_size, self.runs = backbone, batch_size, runs
        self.tuned = {name: task for name, task in tasks.items() if isinstance(task, TunedTask)}
        self.image_size = image_size or backbone.input_size[-1]
        self.parts = part_table(backbone, self.image_size)
        #: rows of `compare_latency` of the last measurement, None before
        self.measured: pd.DataFrame | None = None
        wanted = {name: in_order(backbone, getattr(task, "blocks", task)) for name, task in tasks.items()}
        self.picked = {name: checkbox(name, True) for name in tasks}
        parts = backbone.part_names
        self.boxes = {name: {part: checkbox(part, part in wanted[name]) for part in parts} for name in tasks}
        self.keep_original = widgets.Checkbox(True, description="keep the original output", indent=False)
        self.measure_button = widgets.Button(description="Measure", icon="clock-o", button_style="primary")
        self.fork, self.costs = Picture(), Picture()
        buttons = widgets.HBox([self.keep_original, self.measure_button])
        super().__init__(self._grid(), buttons, self.fork, self.costs, news_first=True)
        self.measure_button.on_click(self.shows_errors(lambda button: self.measure()))
        ticks = [box for boxes in self.boxes.values() for box in boxes.values()]
        self.follow(*self.picked.values(), *ticks, self.keep_original)

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """The picked tasks with their ticked parts, from input to output."""
        return {
            name: tuple(part for part, box in self.boxes[name].items() if box.value)
            for name, pick in self.picked.items()
            if pick.value
        }

    @property
    def schedule(self) -> Schedule:
        """Which rows go where.

        Raises:
            ValueError: no task is picked.
        """
        if not self.blocks:
            raise ValueError("no task is picked; tick the name of at least one")
        subsets = {name: frozenset(blocks) for name, blocks in self.blocks.items()}
        siamese = frozenset(name for name, task in self.tuned.items() if task.siamese and self._is_own(name))
        return plan_rows(self.backbone.part_names, subsets, self.keep_original.value, siamese & set(subsets))

    @property
    def facts(self) -> str:
        if not self.blocks:
            return "no task is picked"
        costs, table = self._costs(), self.schedule.table()
        rows = int((table["frozen_rows"] + table["tuned_rows"]).max())
        lines = [
            f"{name}: {row.merged:,.0f} merged, {row.separate:,.0f} separate, {row.ratio:.2f} x"
            for name, row in costs.iterrows()
        ]
        facts = [f"at most {rows} rows of an image at a part", *lines]
        if self.measured is not None:
            facts.append(f"time: {_in_words(self.measured)}")
        return "\n".join(facts)

    def measure(self) -> pd.DataFrame:
        """Times merged and separate networks in turns, and shows their ratio in the figure.

        Returns:
            Rows "merged" and "separate" of `compare_latency`.

        Raises:
            ValueError: no task is picked.
        """
        schedule = self.schedule
        self.measure_button.disabled = True
        self.say("measuring ...")
        try:
            tasks = {name: self._task(name, seed) for seed, name in enumerate(schedule.subsets)}
            merged = merge_tasks(self.backbone, tasks, schedule.keep_original)
            alone = {name: optimize(task.network()) for name, task in tasks.items()}
            if schedule.keep_original:
                plain = untrained_task(self.backbone, ())
                alone[ORIGINAL] = optimize(plain.network())
            nets = {_MERGED: optimize(merged), _SEPARATE: OneAfterAnother(alone)}
            self.measured = compare_latency(nets, self.image_size, self.batch_size, runs=self.runs)
        finally:
            self.measure_button.disabled = False
        self._draw_costs()
        self.say(_in_words(self.measured))
        return self.measured

    def _grid(self) -> widgets.VBox:
        """A row of checkboxes for each task under each other, its name in front."""
        rows = [box for name in self.boxes for box in (self.picked[name], *self.boxes[name].values())]
        columns = f"minmax(90px, 1.4fr) repeat({len(self.backbone.part_names)}, minmax(0, 1fr))"
        return tick_grid(rows, columns, fork_size(self.parts, len(self.boxes))[0])

    def _is_own(self, name: str) -> bool:
        """Whether the ticks are a tuned task's own blocks."""
        return name in self.tuned and self.tuned[name].blocks == frozenset(self.blocks.get(name, ()))

    def _task(self, name: str, seed: int) -> TunedTask:
        return self.tuned[name] if self._is_own(name) else untrained_task(self.backbone, self.blocks[name], seed=seed)

    def _costs(self) -> pd.DataFrame:
        """What the schedule costs; pruned tasks by the sizes of their own parts."""
        pruned = [name for name in self.blocks if self._is_own(name) and self.tuned[name].pruned]
        own = {name: part_table(self.tuned[name].network().backbone, self.image_size) for name in pruned}
        return self.schedule.cost(self.parts, own=own)

    def _redraw(self) -> None:
        self.measured = None  # of another network
        self.measure_button.disabled = not self.blocks
        if not self.blocks:
            self.say("no task is picked; tick the name of at least one", error=True)
            return
        table, picked = self.schedule.table(), [name for name in self.boxes if name in self.blocks]
        self.fork.draw(lambda ax: plot_fork(table, picked, ax), *fork_size(table, len(self.boxes)))
        self._draw_costs()

    def _draw_costs(self) -> None:
        costs = self._costs()["ratio"].rename({"flops": "FLOPs", "bytes": "weights read"})
        if self.measured is not None:
            costs["time, measured"] = self.measured.loc[_SEPARATE, "ratio"]
        measured, width = self.measured, fork_size(self.parts, 1)[0]
        spread = None if measured is None else measured.loc[_SEPARATE, ["ratio_q25", "ratio_q75"]]
        self.costs.draw(lambda ax: _paint_costs(ax, costs, spread), width, 0.9 + 0.34 * len(costs))


def _paint_costs(ax: Axes, ratios: pd.Series, spread: pd.Series | None) -> None:
    """Bars of what separate networks cost, where the merged one costs 1; `spread` are the quartiles of the last."""
    names = list(ratios.index)[::-1]
    colours = [style.BLUE if "measured" in name else style.PALE_BLUE for name in names]
    ax.barh(names, ratios[names], color=colours, height=0.65)
    ax.axvline(1.0, color=style.DARK, linewidth=1.2)
    quartiles = "" if spread is None else " (quartiles {:.2f} to {:.2f})".format(*spread)
    for place, ratio in enumerate(ratios[names]):
        ax.text(ratio + 0.02, place, f"{ratio:.2f} x{'' if place else quartiles}", va="center", fontsize=9)
    ax.set_xlim(0, 1.4 * max(2.0, *ratios))
    style.finish(ax, "separate networks one after another, in units of the merged network")


def _in_words(measured: pd.DataFrame) -> str:
    row, merged = measured.loc[_SEPARATE], measured.loc[_MERGED]
    return (
        f"merged {merged['median_ms']:.2f} ms, separate {row['median_ms']:.2f} ms, {row['ratio']:.2f} x "
        f"(quartiles {row['ratio_q25']:.2f} to {row['ratio_q75']:.2f}, n = {row['n']}, batch {row['batch_size']})"
    )


def _check_tasks(tasks: Mapping[str, object]) -> None:
    if not tasks:
        raise ValueError("tasks is empty; give at least 1 task")
    for name, task in tasks.items():
        Text().check("a task's name", name)
        if not isinstance(task, TunedTask):
            _BLOCKS.check(f"tasks[{name!r}]", task)
    if ORIGINAL in tasks:
        raise ValueError('a task is named "original", which is the pretrained output; rename it')
