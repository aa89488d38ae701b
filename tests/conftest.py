"""One torch thread for every test process and for all that it starts, and fixtures that every test can ask for."""

import os

# Before torch is imported: workers side by side, and kernels and scripts that tests start, would wait for each other.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import pytest
import torch

from subtuning_lab.nets.chain import Chain
from tests.helpers import tiny_chain

torch.set_num_threads(1)


@pytest.fixture
def chain() -> Chain:
    """A fresh `tiny_chain`."""
    return tiny_chain()
