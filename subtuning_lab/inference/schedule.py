"""Which rows go through which part when several tasks share one network: a plan made before any image is seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import pandas as pd

from subtuning_lab.utils.containers import Mapped, Table
from subtuning_lab.utils.validation import OneOf, Several, Text, Whole, checked

if TYPE_CHECKING:
    import torch

TRUNK = None  # the pretrained network's own rows, among the names of tasks


class Rows(NamedTuple):
    """Neighbouring rows of one of the tensors that a step leaves behind; start and stop count in batches."""

    tensor: int
    start: int
    stop: int

    def of(self, tensors: list[torch.Tensor], batch: int) -> torch.Tensor:
        """The rows themselves, without a copy."""
        return tensors[self.tensor][self.start * batch : self.stop * batch]


class Step(NamedTuple):
    """What happens at one part.

    Args:
        part: its name.
        shared: whose rows go through the frozen part together, in the order of the rows; `TRUNK` among them.
        tuned: the tasks that have this part of their own.
        inputs: the rows that make up the frozen part's input; several are joined by a copy.
        own_inputs: the rows that each tuned part takes.
    """

    part: str
    shared: tuple[str | None, ...]
    tuned: tuple[str, ...]
    inputs: tuple[Rows, ...]
    own_inputs: tuple[Rows, ...]


@dataclass(frozen=True)
class Schedule:
    """Which rows go through which part, fixed before any image is seen.

    The steps leave behind one tensor with the shared rows, if there are any, and one for each tuned part. A task
    stays alone while it has parts of its own, so rows are copied only where they come together.

    Args:
        subsets: task -> names of its tuned parts.
        steps: one for each part, in the network's order.
        features: member -> its rows behind the last step.
        siamese: tasks whose readout sees the frozen features too.
        keep_original: whether the pretrained network's own output is wanted.
    """

    subsets: dict[str, frozenset[str]]
    steps: tuple[Step, ...]
    features: dict[str | None, Rows]
    siamese: frozenset[str]
    keep_original: bool

    def table(self) -> pd.DataFrame:
        """One row a part, by name: `position`; `frozen_rows` and `tuned_rows` for each image; `trunk`, whether the
        pretrained network's rows are among the frozen ones; the tasks that are `shared_by` and `tuned_by`."""
        rows = []
        for i, step in enumerate(self.steps):
            tasks = tuple(member for member in step.shared if member is not TRUNK)
            rows.append((step.part, i, len(step.shared), len(step.tuned), TRUNK in step.shared, tasks, step.tuned))
        columns = ["part", "position", "frozen_rows", "tuned_rows", "trunk", "shared_by", "tuned_by"]
        return pd.DataFrame(rows, columns=columns).set_index("part")

    @checked(parts=Table(numbers=("flops", "params")), bytes_per_weight=Whole(1), own=Mapped(least=0).or_none())
    def cost(
        self, parts: pd.DataFrame, bytes_per_weight: int = 4, own: Mapping[str, pd.DataFrame] | None = None
    ) -> pd.DataFrame:
        """What the parts cost merged, and in separate networks run one after another; readouts are not counted.

        The last row's ratio, separate over merged, is the speed-up that arithmetic allows, or that reading weights
        allows where a batch is too small to keep the arithmetic busy.

        Args:
            parts: of `part_table` for the size of the images.
            bytes_per_weight: 4 in float32.
            own: task -> `part_table` of its own network, for tasks whose tuned parts are smaller, such as pruned ones.
        Returns:
            Rows "flops" of one image's forward pass and "bytes" of weights read in one pass of any batch; columns
            `merged`, `separate` and `ratio`.
        """
        for name, table in {"parts": parts, **(own or {})}.items():
            if tuple(table.index) != tuple(step.part for step in self.steps):
                raise ValueError(f"{name} is a table of {', '.join(map(str, table.index))}; it must be part_table's")
        separate = pd.Series({step.part: self._separate_rows(i) for i, step in enumerate(self.steps)})
        table = self.table()
        rows, copies = table["frozen_rows"] + table["tuned_rows"], (table["frozen_rows"] > 0) + table["tuned_rows"]
        more = {name: self._difference(parts[name], own or {}) for name in ("flops", "params")}
        costs = {
            "flops": tuple((parts["flops"] * n).sum() + more["flops"] for n in (rows, separate)),
            "bytes": tuple(
                bytes_per_weight * ((parts["params"] * n).sum() + more["params"]) for n in (copies, separate)
            ),
        }
        costs = pd.DataFrame.from_dict(costs, orient="index", columns=["merged", "separate"])
        return costs.assign(ratio=costs["separate"] / costs["merged"]).rename_axis("cost")

    def _difference(self, parts: pd.Series, own: Mapping[str, pd.DataFrame]) -> float:
        """What tasks' own parts cost more than the backbone's; their rows are their own, merged or separate."""
        tuned = {task: parts.index.isin(self.subsets[task]) for task in own}
        return sum((table[parts.name] - parts)[tuned[task]].sum() for task, table in own.items())

    def _separate_rows(self, position: int) -> int:
        """Rows for each image at a part of separate networks; a Siamese one goes both ways behind its fork."""
        names = [step.part for step in self.steps[: position + 1]]
        twice = sum(1 for task in self.siamese if self.subsets[task].intersection(names))
        return len(self.subsets) + twice + self.keep_original


@checked
def plan_rows(
    part_names: Annotated[Sequence[str], Several(Text(), unique=True)],
    subsets: Annotated[Mapping[str, frozenset[str]], Mapped()],
    keep_original: bool = True,
    siamese: Annotated[frozenset[str], Several(Text(), least=0)] = frozenset(),
) -> Schedule:
    """The schedule of tasks on one chain: they leave the trunk at their first tuned part.

    Args:
        part_names: of the chain.
        subsets: task -> names of its tuned parts.
        keep_original: whether the pretrained network's own output is wanted.
        siamese: tasks whose readout sees the frozen features too.
    """
    for task, subset in subsets.items():
        Text().check("a task's name", task)
        Several(OneOf(tuple(part_names)), least=0, unique=True).check(f"subsets[{task!r}]", subset)
    Several(OneOf(tuple(subsets)), least=0).check("siamese", siamese)
    subsets = {task: frozenset(subset) for task, subset in subsets.items()}
    positions = {task: {i for i, name in enumerate(part_names) if name in subset} for task, subset in subsets.items()}
    end = len(part_names)
    forks = {task: min(tuned, default=end) for task, tuned in positions.items()}
    trunk_end = end if keep_original or siamese else max(forks.values())

    def leaves(member: str | None, position: int) -> int:
        """Where a member next leaves those it goes with."""
        return trunk_end if member is TRUNK else min((i for i in positions[member] if i >= position), default=end)

    tensors: list[tuple[str | None, ...]] = [(TRUNK,)]  # who is in which tensor, in the order of the rows
    steps = []
    for position, part in enumerate(part_names):
        members = [m for tensor in tensors for m in tensor]
        shared = [m for m in members if position < leaves(m, position)]
        alone = [m for m in members if m is not TRUNK and m not in shared]
        joining = [task for task, fork in forks.items() if fork == position]
        if not any(set(shared) <= set(tensor) for tensor in tensors):  # a copy is due: who leaves first goes last
            shared.sort(key=lambda m: -leaves(m, position + 1))
        inputs = tuple(_runs(tensors, shared))
        sources = [next(_runs(tensors, [m])) for m in alone + [TRUNK] * len(joining)]
        steps.append(Step(part, tuple(shared), tuple(alone + joining), inputs, tuple(sources)))
        tensors = [tuple(shared)] * bool(shared) + [(task,) for task in alone + joining]
    features = {m: next(_runs(tensors, [m])) for tensor in tensors for m in tensor}
    return Schedule(subsets, tuple(steps), features, frozenset(siamese), keep_original)


def _runs(tensors: list[tuple[str | None, ...]], members: list[str | None]) -> Iterator[Rows]:
    """The members' rows in the order wanted, neighbours taken together."""
    place = {m: (i, row) for i, tensor in enumerate(tensors) for row, m in enumerate(tensor)}
    run: Rows | None = None
    for tensor, row in (place[m] for m in members):
        if run is not None and (tensor, row) == (run.tensor, run.stop):
            run = run._replace(stop=row + 1)
            continue
        if run is not None:
            yield run
        run = Rows(tensor, row, row + 1)
    if run is not None:
        yield run
