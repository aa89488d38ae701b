"""One torch thread for every test process and for all that it starts, and fixtures that every test can ask for."""

import os

# Before torch is imported: workers side by side, and kernels and scripts that tests start, would wait for each other.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import hypothesis
import pytest
import torch

from subtuning_lab.nets.chain import Chain
from tests.helpers import tiny_chain

torch.set_num_threads(1)
hypothesis.settings.register_profile("same examples in every run", derandomize=True)
hypothesis.settings.load_profile("same examples in every run")

# Files whose tests train several studies, start kernels or export networks; other slow tests say so themselves.
SLOW = (
    "baselines/test_compare", "baselines/test_head2toe", "cli/test_main", "data/test_corruption",
    "end_to_end/test_faults", "experiments/", "inference/test_export", "inference/test_prune",
    "nets/test_families", "nets/test_registry", "notebook/test_study", "project/test_readme",
    "project/test_surface", "project/test_wheel", "report/test_run", "search/test_racing", "theory/test_measure",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow files."""
    for item in items:
        if any(item.nodeid.startswith(f"tests/{name}") for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def chain() -> Chain:
    """A fresh `tiny_chain`."""
    return tiny_chain()


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies choose a GPU where there is one; here only tests marked so do."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
