"""Plans of rows, played through with histories in the place of tensors."""

from hypothesis import given
from hypothesis import strategies as st

from subtuning_lab.inference.schedule import TRUNK, Rows, plan_rows

PARTS = ("stem", "block1", "block2", "block3", "block4", "tail")
SUBSETS = st.lists(st.frozensets(st.sampled_from(PARTS)), min_size=1, max_size=6)


def as_tasks(subsets) -> dict[str, frozenset[str]]:
    return {f"t{i}": subset for i, subset in enumerate(subsets)}


def take(tensors: list[list[tuple]], rows: Rows) -> list[tuple]:
    assert 0 <= rows.start < rows.stop <= len(tensors[rows.tensor])
    return tensors[rows.tensor][rows.start : rows.stop]


def play(schedule) -> list[list[tuple]]:
    """What the last step leaves behind; a row is the tuple of (owner, part) that it went through."""
    tensors = [[()]]
    for step in schedule.steps:
        frozen = [(*row, (TRUNK, step.part)) for rows in step.inputs for row in take(tensors, rows)]
        assert len(frozen) == len(step.shared) and len(step.tuned) == len(step.own_inputs)
        left = [frozen] if frozen else []
        for task, rows in zip(step.tuned, step.own_inputs, strict=True):
            (row,) = take(tensors, rows)
            left.append([(*row, (task, step.part))])
        tensors = left
    return tensors


@given(SUBSETS, st.booleans(), st.sets(st.integers(0, 5)))
def test_everybody_takes_the_way_of_a_separate_network(subsets, keep_original, siamese):
    tasks = as_tasks(subsets)
    two_sided = frozenset(task for i, task in enumerate(tasks) if i in siamese)
    schedule = plan_rows(PARTS, tasks, keep_original, two_sided)
    tensors = play(schedule)
    for task, subset in tasks.items():
        member = task if subset else TRUNK  # who tunes nothing reads the frozen features
        expected = tuple((task if part in subset else TRUNK, part) for part in PARTS)
        assert take(tensors, schedule.features[member]) == [expected]
    trunk_wanted = keep_original or bool(two_sided) or not all(subsets)
    assert (TRUNK in schedule.features) == trunk_wanted
    if trunk_wanted:
        assert take(tensors, schedule.features[TRUNK]) == [tuple((TRUNK, part) for part in PARTS)]


@given(SUBSETS, st.booleans())
def test_no_rows_too_many_and_no_copies_without_a_reason(subsets, keep_original):
    tasks = as_tasks(subsets)
    schedule = plan_rows(PARTS, tasks, keep_original)
    before: set = {TRUNK}
    for position, step in enumerate(schedule.steps):
        forked = [task for task, subset in tasks.items() if subset & set(PARTS[: position + 1])]
        trunk_goes_on = keep_original or not all(subsets) or len(forked) < len(tasks)
        assert len(step.shared) + len(step.tuned) == len(forked) + trunk_goes_on
        # The frozen input is a view, unless somebody comes back from parts of its own.
        assert len(step.inputs) <= 1 or set(step.shared) - before
        before = set(step.shared)


def test_the_table_of_a_plan():
    table = plan_rows(PARTS, as_tasks([{"block1"}, {"block1", "block3"}]), keep_original=False).table()
    assert list(table.index) == list(PARTS) and table["position"].tolist() == list(range(6))
    assert table["frozen_rows"].tolist() == [1, 0, 2, 1, 2, 2] and table["tuned_rows"].tolist() == [0, 2, 0, 1, 0, 0]
    assert table["trunk"].tolist() == [True, False, False, False, False, False]
    assert table.loc["block1", "tuned_by"] == ("t0", "t1") and table.loc["block3", "shared_by"] == ("t0",)
