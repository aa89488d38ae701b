"""Memory: what is measured, what is free, what happens when there is none, and that nothing is left behind."""

import gc

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import subtuning_lab as lab
from subtuning_lab import Chain, Recipe
from subtuning_lab.engine import batches, fit, memory, shared_forward
from subtuning_lab.engine.fit import ENGINES, fit_together
from subtuning_lab.engine.memory import NotEnoughMemoryError, Prepared, is_out_of_memory, kept_for_backward
from subtuning_lab.utils.memory import free_main_memory
from tests.helpers import tiny_chain, tiny_split, tiny_task

RECIPE = Recipe(epochs=2, batch_size=8, head_start="probe")
SUBSETS = [(), ("block1",), ("block3",), ("block1", "block3"), "all"]
TRAIN, VALIDATION = tiny_split(16), tiny_split(9, seed=7)
WORDS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "python": MemoryError(),
    "c++": RuntimeError("std::bad_alloc"),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "onednn": RuntimeError("could not create a primitive"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def train(engine="one_pass", chain=None, **options):
    chain = chain or tiny_chain(dtype=torch.float64)
    return fit_together(chain, SUBSETS, TRAIN, RECIPE, num_classes=3, validation=VALIDATION, engine=engine, **options)


def assert_equal(fits, others):
    for one, other in zip(fits, others, strict=True):
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-9, atol=1e-9)
        assert one.accuracy == other.accuracy


# ---------------------------------------------------------------- when there is none


@pytest.mark.parametrize("words", WORDS)
def test_a_lack_of_memory_is_known_by_its_words(words):
    assert is_out_of_memory(WORDS[words])
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


SITES = {  # every place that allocates, where an error comes out of; and whether training can go on without it
    "copy of the backbone": (memory, "without_dropout", False),
    "examining the parts": (shared_forward, "examine_parts", True),
    "folding BatchNorm": (shared_forward, "fold_batchnorm", True),
    "measuring": (memory, "kept_for_backward", True),
    "a batch of images": (batches, "network_input", True),
    "the trunk": (shared_forward.SharedForward, "trunk", True),
    "the branches": (shared_forward.SharedForward, "logits", True),
    "copies of tuned parts": (shared_forward, "tune_parts", True),
    "a readout": (fit, "new_head", True),
    "the optimizer": (fit, "adamw", True),
    "gradients": (torch.Tensor, "backward", True),
    "the optimizer's states": (torch.optim.AdamW, "step", True),
    "scores": (fit, "validation_scores", True),
    "copies of the weights": (shared_forward, "copy_weights", True),
}


@pytest.mark.parametrize("words", ["cuda", "python"])
@pytest.mark.parametrize("site", SITES)
def test_every_place_that_allocates_survives_or_is_named(site, words, monkeypatch):
    """The first call there fails; where it is the images' place, the second one, which is that of storing the trunk."""
    expected, calls = train(), []
    place, name, survives = SITES[site]
    real, first = getattr(place, name), 2 if site == "a batch of images" else 1

    def failing(*given, **options):
        calls.append(1)
        if len(calls) == first:
            raise WORDS[words]
        return real(*given, **options)

    monkeypatch.setattr(place, name, failing)
    if survives:
        assert_equal(train(), expected)
    else:
        with pytest.raises(NotEnoughMemoryError, match="not enough memory for a copy of tiny"):
            train()
    assert calls


class FailingOnce(TorchDispatchMode):
    """Counts torch's operations, backward's too, and lets one of them run out of memory."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("std::bad_alloc")
        return function(*args, **(kwargs or {}))


def test_any_operation_may_run_out_of_memory():
    chain = tiny_chain(dtype=torch.float64)
    expected = train(chain=chain)
    with FailingOnce(0) as all_of_them:
        train(chain=chain)
    named = 0
    for at in torch.linspace(2, all_of_them.count - 1, 15).long().tolist():
        try:
            with FailingOnce(at):
                fits = train(chain=chain)
        except NotEnoughMemoryError as error:
            assert "not enough memory for" in str(error)
            named += 1
        else:
            assert_equal(fits, expected)
    assert named < 4


class Large(nn.Identity):
    """Needs more memory than there is, for more than so many images."""

    def forward(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError(f"Tried to allocate {len(x)} images")
        return x


@pytest.mark.parametrize("engine", ENGINES)
def test_a_candidate_that_does_not_fit_alone_is_named(engine):
    plain = tiny_chain()
    chain = Chain(plain.stem, {"a": plain.blocks[0], "b": plain.blocks[1], "c": Large()}, plain.tail, 6, name="tiny")
    with pytest.raises(MemoryError, match=r"training a \+ b of tiny on batches of 8 images \(Tried to allocate 8"):
        fit_together(chain, [("a", "b")], TRAIN, Recipe(epochs=1, batch_size=8), num_classes=3, engine=engine)


# ---------------------------------------------------------------- what is free


def control_groups(root, version, limits, path="/docker/abc"):
    """Files as Linux shows them: `limits` by group, the path's own one or "" for the root."""
    base = root / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = names if version == 1 else ("memory.max", "memory.current", "inactive_file")
    for group, (limit, used, cached) in limits.items():
        (base / group).mkdir(parents=True, exist_ok=True)
        (base / group / names[0]).write_text(f"{limit}\n")
        (base / group / names[1]).write_text(f"{used}\n")
        (base / group / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")
    (root / "proc/self").mkdir(parents=True)
    line = f"4:cpu,memory:{path}" if version == 1 else f"0::{path}"
    (root / "proc/self/cgroup").write_text(f"9:pids:/other\n{line}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"docker/abc": (1000, 700, 200)}, 500),
        ({"docker": (400, 300, 0), "docker/abc": ("max", 10, 0)}, 100),
        ({"": (800, 100, 50)}, 750),  # in a container the path is the host's
        ({"docker/abc": (1000, 1200, 0)}, 0),
        ({"docker/abc": (2**63 - 4096, 0, 0)}, None),
        ({}, None),
    ],
)
def test_free_memory_keeps_to_the_containers_limit(version, limits, left, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Machine", (), {"available": 2**40}))
    if version == 1:
        limits = {group: (2**63 - 4096 if limit == "max" else limit, *use) for group, (limit, *use) in limits.items()}
    assert free_main_memory(control_groups(tmp_path, version, limits)) == (2**40 if left is None else left)


def test_a_pass_takes_a_third_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_main_memory", lambda: 3000)
    assert memory.free_bytes(torch.device("cpu")) == 1000
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Machine", (), {"available": 77}))
    assert free_main_memory(tmp_path) == 77  # no Linux


# ---------------------------------------------------------------- what is measured


def test_what_a_linear_layer_keeps_is_known_by_hand():
    """Its input, of 4 bytes a number; in bf16 of 2, and the copies of the weights count once, not once an image."""
    stem = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 512))
    chain = Chain(stem, [nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)], nn.Identity(), 512)
    for bf16, size in ((False, 4), (True, 2)):
        kept = kept_for_backward(chain, torch.rand(4, 3, 8, 8), bf16)
        assert kept[1:] == [4 * 512 * size, 4 * 512 * size, 0]
    prepared = Prepared(chain)
    full, half = (
        prepared.costs(torch.rand(4, 3, 8, 8), [frozenset({"block2"})], 64, bf16)[0] for bf16 in (False, True)
    )
    assert full - half == 64 * 512 * 2


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_studies_leave_nothing_behind():
    """A measurement that kept its graph once cost every study that trained its activations."""
    recipe, counts, resident = Recipe(epochs=1, batch_size=8), [], []
    for i in range(24):
        chain, task = tiny_chain(), tiny_task(48)
        if i < 20:
            lab.Study(chain, task, recipe, folds=2, progress=False).scores([(), ("block2",), "all"])
        else:
            methods = ("linear probing", "full finetuning")
            lab.low_data_curves(chain, task, [12], [recipe], repeats=1, methods=methods, folds=2, progress=False)
        if i in (4, 19, 23):
            counts.append(live_tensors())
            resident.append(psutil.Process().memory_info().rss)
    assert max(counts) - counts[0] < 10
    assert resident[-1] - resident[0] < 16 * 2**20
