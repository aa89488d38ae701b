"""What is promised on a CPU holds on a GPU, too; each test runs on both where it can."""

import copy
import gc

import pytest
import torch
from torch import nn

import subtuning_lab as lab
from subtuning_lab.inference.export import optimize
from subtuning_lab.study import runner
from tests.helpers import tiny_task
from tests.inference.test_export import some_tasks
from tests.inference.test_merge import images_for, residual_network

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SUBSETS = [(), ("layer1.0",), ("layer2.0",), "all"]
#: largest difference of training losses after six steps: float32 with exact products, bf16's rounding of 2^-8
TOLERANCE = {"float32": 2e-3, "bf16": 0.1}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Float32 products that are float32's, where a GPU would round them to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def backbone() -> lab.Chain:
    return lab.load_backbone("cifar_resnet20", "random").eval()


def task(n: int = 48) -> lab.Task:
    return tiny_task(n, n_test=24)


def recipe(**changes) -> lab.Recipe:
    return lab.Recipe(**{"epochs": 2, "batch_size": 16, "image_size": 32} | changes)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("augment", ["none", "shift_flip"])
@pytest.mark.parametrize("device", DEVICES)
def test_one_pass_equals_one_training_after_another(backbone, device, augment, precision):
    how = {"num_classes": 3, "validation": task().test}
    settings = recipe(augment=augment, precision=precision, lr=1e-3)
    one, other = (
        lab.fit_together(backbone.to(device), SUBSETS, task().train, settings, engine=engine, **how)
        for engine in ("one_pass", "sequential")
    )
    for a, b in zip(one, other, strict=True):
        assert (a.losses - b.losses).abs().max() < TOLERANCE[precision], a.blocks
        assert a.losses.isfinite().all() and not a.diverged


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_parts_keep_their_bits(backbone, device):
    before = copy.deepcopy(backbone)
    tuned = lab.Study(backbone, task(), recipe(), folds=2, device=device, progress=False).fit(["layer1.1"])
    served = next(module for module in tuned.network().modules() if isinstance(module, lab.Chain))
    for chain, changed in ((backbone, []), (served, ["layer1.1"])):
        assert [name for name in chain.part_names if not same_bits(chain.part(name), before.part(name))] == changed


def same_bits(part: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor.cpu(), state[name].cpu()) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_records_resume_without_training(backbone, device, tmp_path, monkeypatch):
    def scores() -> list[float]:
        records = tmp_path / "records.sqlite"
        study = lab.Study(backbone, task(), recipe(), folds=2, device=device, progress=False, records=records)
        return study.scores(SUBSETS)["accuracy"].tolist()

    first = scores()
    monkeypatch.setattr(runner, "fit_together", None)  # whatever trains fails
    assert scores() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_lack_of_memory_halves_the_pass_with_the_same_numbers():
    """A process that may take little of the card: the pass of all candidates does not fit, halves of it do."""
    backbone = lab.load_backbone("resnet18", "random").to("cuda")
    images = torch.randint(0, 256, (128, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = lab.Split(images, torch.arange(128) % 4)
    subsets = [(), *([name] for name in backbone.block_names)] * 4
    settings = lab.Recipe(epochs=1, batch_size=128, lr=1e-3)

    def losses(**options) -> torch.Tensor:
        passes = []
        fits = lab.fit_together(
            backbone, subsets, train, settings, num_classes=4, memory_limit=2**40, on_pass=passes.append, **options
        )
        counted.append(len(passes))
        return torch.stack([fit.losses for fit in fits])

    counted = []
    torch.cuda.reset_peak_memory_stats()
    roomy = losses()
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    try:
        for share in (0.6, 0.45, 0.3, 0.2):  # cuDNN does with less workspace before anything fails
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(share * peak / total)
            tight = losses()
            assert (roomy - tight).abs().max() < TOLERANCE["float32"]
            if counted[-1] > 1:
                break
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert counted[0] == 1 < counted[-1]


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "cuda_graph"])
@pytest.mark.parametrize("device", DEVICES)
def test_merged_networks_equal_separate_ones(device, mode):
    if device == "cpu" and mode is not None:
        pytest.skip("compiled on a CPU in tests/inference/test_export.py")
    chain = residual_network()
    tasks, images = some_tasks(chain), images_for(chain, 3)
    separate = {name: task.network() for name, task in tasks.items()}
    net = optimize(lab.merge_tasks(chain.to(device), tasks), mode=mode, images=images.to(device))
    with torch.inference_mode():
        for seed in range(4):  # a graph is captured in the first calls and replayed in the last, for new images
            views = images.roll(seed, 2)
            merged = net(views.to(device))
            for name, network in separate.items():
                torch.testing.assert_close(merged[name].cpu(), network.cpu()(views), rtol=1e-3, atol=1e-4)
