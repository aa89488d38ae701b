"""Latency: what is timed and counted, that comparisons alternate, and that spread is told. No wall-clock thresholds."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from subtuning_lab import Latency, OneAfterAnother, compare_latency, measure_latency, merge_tasks, optimize
from tests.helpers import tiny_chain
from tests.inference.test_merge import tuned


class Sleeper(nn.Module):
    """Takes the seconds it is told and notes its calls."""

    def __init__(self, seconds: float = 0.0, name: str = "", calls: list | None = None) -> None:
        super().__init__()
        self.seconds, self.name, self.calls = seconds, name, [] if calls is None else calls
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.name, images, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(self.seconds)
        return images.mean(dim=(1, 2, 3))


def test_what_is_run():
    net = Sleeper()
    latency = measure_latency(net, np.int64(9), 4, runs=7, warmup=3)
    assert latency.n == 7 and len(net.calls) == 10
    for _, images, inference, _ in net.calls:
        assert images.shape == (4, 3, 9, 9) and inference and images.min() >= 0 and images.max() <= 1
    assert (latency.batch_size, latency.device, latency.precision) == (4, "cpu", "float32")
    assert measure_latency(net, (8, 12), runs=1, warmup=0).n == 1 and net.calls[-1][1].shape == (1, 3, 8, 12)


@pytest.mark.parametrize("wanted", [{"batch_size": 10**9}, {"image_size": 10**6}])
def test_images_that_no_memory_holds_are_refused(wanted):
    with pytest.raises(ValueError, match=r"images of .* GB; .* are free: give a smaller batch_size or image_size"):
        measure_latency(tiny_chain(), **{"image_size": 8} | wanted)


def test_images_are_of_the_size_that_prepare_gives():
    task = tuned(tiny_chain(), ["block1"], crop_size=(8, 24), image_size=8)
    for net in (task.network(), merge_tasks(task.backbone, {"a": task}), optimize(task.network())):
        seen = []
        net.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(tuple(arguments[0].shape)))
        other = Sleeper()
        measure_latency(net, batch_size=2, runs=1, warmup=0)
        compare_latency({"other": other, "net": net}, runs=1, warmup=0)
        assert seen == [(2, 3, 8, 24), (1, 3, 8, 24)] and other.calls[0][1].shape == (1, 3, 8, 24)
        compare_latency({"other": other, "net": net}, 12, runs=1, warmup=0)
        assert seen[2] == (1, 3, 12, 12)
    measure_latency(other, runs=1, warmup=0)
    assert other.calls[-1][1].shape == (1, 3, 224, 224)  # the paper's


def test_precision_and_mode_are_the_networks_own():
    net = Sleeper().double().train()
    assert measure_latency(net, 8, runs=1, warmup=0).precision == "float64"
    assert net.calls[-1][1].dtype == torch.float64 and net.training
    assert measure_latency(nn.Flatten(), 8, runs=1, warmup=0).precision == "float32"  # one without weights
    assert measure_latency(net, 8, runs=1, warmup=0, device="cpu").device == "cpu" and len(net.calls) == 2


def test_threads_are_set_while_measuring_only():
    net, before = Sleeper(), torch.get_num_threads()
    assert measure_latency(net, 8, runs=2, warmup=0, threads=before + 1).threads == before + 1
    assert [threads for *_, threads in net.calls] == [before + 1] * 2 and torch.get_num_threads() == before
    assert measure_latency(net, 8, runs=1).threads == before


def test_more_work_takes_longer_and_includes_all_of_it():
    short, long = (measure_latency(Sleeper(seconds), 8, runs=5, warmup=0) for seconds in (0.002, 0.02))
    assert 2 <= short.median < long.median and long.median >= 20
    assert short.q25 <= short.median <= short.q75 and short.iqr == short.q75 - short.q25


def test_the_text_names_everything_that_a_figure_needs():
    text = str(Latency(2.5, 2.0, 3.0, 100, 8, "cpu", "float32", 2))
    assert text == "2.500 ms (IQR 1.000, n = 100), batch 8, float32, cpu, threads 2"
    assert "threads" not in str(Latency(2.5, 2.0, 3.0, 100, 8, "cuda", "float32", 2))


def test_comparisons_alternate_and_nobody_is_always_first():
    calls = []
    nets = {name: Sleeper(name=name, calls=calls) for name in "abc"}
    table = compare_latency(nets, 8, runs=6, warmup=3)
    rounds = ["".join(name for name, *_ in calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 9 and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert list(table.index) == ["a", "b", "c"] and (table["n"] == 6).all()


def test_ratios_are_to_the_first_of_the_same_round():
    table = compare_latency({"short": Sleeper(0.004), "long": Sleeper(0.02)}, 8, runs=5, warmup=1)
    assert table.loc["short", "ratio"] == table.loc["short", "ratio_q25"] == table.loc["short", "ratio_q75"] == 1
    assert table.loc["long", "ratio"] > 1.5
    assert (table["ratio_q25"] <= table["ratio"]).all() and (table["ratio"] <= table["ratio_q75"]).all()
    assert (table["q25_ms"] <= table["median_ms"]).all() and (table["median_ms"] <= table["q75_ms"]).all()


def test_a_busy_moment_that_meets_both_does_not_change_the_ratio(monkeypatch):
    """Ratios are taken round by round; the ratio of the medians would be another number here."""
    slow = np.array([1.0, 10.0, 1.0, 10.0, 1.0])
    times = {"a": iter(slow), "b": iter(3 * slow)}
    monkeypatch.setattr("subtuning_lab.inference.latency._timed", lambda net, images, clock: next(times[net.name]))
    table = compare_latency({name: Sleeper(name=name) for name in "ab"}, 8, runs=5, warmup=0)
    assert table["ratio"].tolist() == [1, 3] and table["ratio_q75"].tolist() == [1, 3]
    assert table["median_ms"].tolist() == [1, 3] and table["q75_ms"].tolist() == [10, 30]


def test_the_cpu_clock_leaves_out_what_is_waited_for():
    waiting = compare_latency({"net": Sleeper(0.02)}, 8, runs=3, warmup=0, clock="cpu")
    assert waiting.loc["net", "median_ms"] < 15 < measure_latency(Sleeper(0.02), 8, runs=3, warmup=0).median


def test_one_after_another_runs_all():
    calls = []
    both = OneAfterAnother({name: Sleeper(name=name, calls=calls) for name in ("x", "y.z")})
    assert list(both(torch.rand(2, 3, 4, 4))) == ["x", "y.z"] == [name for name, *_ in calls]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "device is 'abacus'; torch has none of this name here"),
        ({"device": "meta"}, "device is meta, where nothing is computed"),
        ({"device": "cuda:99"}, "device is 'cuda:99'; torch has none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(Sleeper(), **{"image_size": 8} | arguments)
    with pytest.raises(ValueError, match=message):
        compare_latency({"net": Sleeper()}, **{"image_size": 8} | arguments)
