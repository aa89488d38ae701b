"""CIFAR-10-C's published arrays: the right rows, one split for all corruptions, nothing read that was not chosen."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import NpyRows, StreamedImages, decode_images
from subtuning_lab.data.load import list_images
from tests.data.material import load

N = 60  # images of each severity, 6 of each class
NAMES = ("gaussian_noise", "fog")


@pytest.fixture
def arrays(tmp_path):
    """A folder in the published layout; each image's first pixel is (number, severity, corruption)."""
    root = tmp_path / "a+b" / "CIFAR-10-C"
    root.mkdir(parents=True)
    for kind, name in enumerate(NAMES):
        images = np.random.default_rng(kind).integers(0, 256, (5 * N, 32, 32, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.tile(np.arange(N), 5)
        images[:, 0, 0, 1] = np.repeat(np.arange(1, 6), N)
        images[:, 0, 0, 2] = kind
        np.save(root / f"{name}.npy", images)
    np.save(root / "labels.npy", np.tile(np.arange(N) % 10, 5).astype(np.uint8))
    return root


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_a_severity_is_its_fifth_of_the_file(arrays, name, severity):
    task = load(f"cifar10c:{arrays}/{name}@{severity}")
    assert (len(task.train), len(task.test), task.image_size) == (48, 12, (32, 32))
    assert task.classes[0] == "airplane" and task.classes[9] == "truck" and task.num_classes == 10
    numbers = torch.cat([task.train.images[:, 0, 0, 0], task.test.images[:, 0, 0, 0]])
    assert sorted(numbers.tolist()) == list(range(N))
    for split in (task.train, task.test):
        first = split.images[:, :, 0, 0]
        assert (first[:, 1] == severity).all() and (first[:, 2] == NAMES.index(name)).all()
        assert torch.equal(first[:, 0] % 10, split.labels.to(torch.uint8))
    stored = np.load(arrays / f"{name}.npy")[(severity - 1) * N + int(numbers[7])]
    assert np.array_equal(task.train.images[7].permute(1, 2, 0).numpy(), stored)


def test_no_image_is_tested_under_one_corruption_and_trained_on_under_another(arrays):
    specs = [f"cifar10c:{arrays}/{name}@{severity}" for name in NAMES for severity in (1, 4)]
    tested = [load(spec, seed=seed).test.images[:, 0, 0, 0] for seed, spec in enumerate(specs)]
    assert all(torch.equal(numbers, tested[0]) for numbers in tested)


def test_only_chosen_rows_are_read(arrays, monkeypatch):
    read, plain = [], NpyRows.__getitem__

    def counted(self, index):
        found = plain(self, index)
        read.append(len(found) if found.ndim == 4 else 1)
        return found

    monkeypatch.setattr(NpyRows, "__getitem__", counted)
    load(f"cifar10c:{arrays}/fog@2", train_size=20, test_size=10)
    assert sorted(read) == [10, 20]


def test_rows_of_a_file_are_those_of_the_array(arrays):
    listing = list_images(f"cifar10c:{arrays}/fog@5", 1000, 1000, 0, None, False)
    rows = listing.test.items
    assert isinstance(rows, NpyRows) and rows.shape == (12, 32, 32, 3)
    taken, array = rows.take(np.array([5, 0])), np.load(arrays / "fog.npy")
    assert np.array_equal(taken[:], array[rows.rows[[5, 0]]]) and np.array_equal(taken[1], array[rows.rows[0]])
    restored = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 2000 and np.array_equal(restored[:], rows[:])
    assert torch.equal(decode_images(rows, (16, 16)), decode_images(rows[:], (16, 16)))


def test_streams_corrupt_as_memory_does(arrays):
    spec = f"cifar10c:{arrays}/fog@1+motion_blur@3+jpeg_compression@5"
    memory, stream = load(spec), load(spec, memory_limit=0)
    assert isinstance(stream.train.images, StreamedImages)
    assert torch.equal(stream.train.images[:], memory.train.images)
    some = torch.tensor([40, 3, 17])
    assert torch.equal(stream.train.take(some).images[:], memory.train.images[some])
    clean = load(f"cifar10c:{arrays}/fog@1")
    blurred = corrupt(clean.test.images, "motion_blur", 3, seed=1)
    assert torch.equal(memory.test.images, corrupt(blurred, "jpeg_compression", 5, seed=3))
    assert stream.fingerprint == load(spec, memory_limit=0).fingerprint


WRONG = {
    "no severity": ("gaussian_noise", ValueError, "NAME@SEVERITY"),
    "severity 6": ("gaussian_noise@6", ValueError, "severity from 1 to 5"),
    "severity 03": ("gaussian_noise@03", ValueError, "severity from 1 to 5"),
    "no name": ("@3", ValueError, "NAME@SEVERITY"),
    "other name": ("snow@3", FileNotFoundError, r"snow\.npy not found.*'fog', 'gaussian_noise', 'labels'"),
    "other folder": ("none/fog@3", FileNotFoundError, "folder not found.*none"),
}


@pytest.mark.parametrize(("rest", "error", "message"), WRONG.values(), ids=WRONG)
def test_specs_that_name_nothing(arrays, rest, error, message):
    with pytest.raises(error, match=message):
        load(f"cifar10c:{arrays}/{rest}")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((10, 32, 32, 3), dtype=np.float32),
        np.zeros((12, 32, 32, 3), dtype=np.uint8),
        np.zeros((10, 3, 32, 32), dtype=np.uint8),
        np.zeros((10, 96, 96, 3), dtype=np.uint8),
        np.zeros((0, 32, 32, 3), dtype=np.uint8),
        np.zeros(10, dtype=np.uint8),
    ],
    ids=["float", "not five times", "channels first", "larger", "none", "flat"],
)
def test_images_of_another_shape(arrays, images):
    np.save(arrays / "fog.npy", images)
    with pytest.raises(ValueError, match=r"fog\.npy must be uint8 \(5 n, 32, 32, 3\), got"):
        load(f"cifar10c:{arrays}/fog@1")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(N, dtype=np.uint8), r"ints \(300,\), got uint8 \(60,\)"),
        (np.zeros(5 * N), r"got float64"),
        (np.full(5 * N, 10), "labels from 0 to 9, got 10 to 10"),
        (np.full(5 * N, -1), "got -1 to -1"),
        (np.zeros(5 * N, dtype=np.int64), "class 'automobile' has 0 images"),
    ],
    ids=["fewer", "float", "ten", "negative", "one class"],
)
def test_labels_that_do_not_fit(arrays, labels, message):
    np.save(arrays / "labels.npy", labels)
    with pytest.raises(ValueError, match=message):
        load(f"cifar10c:{arrays}/fog@1")


def test_a_missing_or_damaged_file_is_named(arrays):
    (arrays / "fog.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"cannot read .*fog\.npy"):
        load(f"cifar10c:{arrays}/fog@1")
    (arrays / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.npy not found"):
        load(f"cifar10c:{arrays}/gaussian_noise@1")


@settings(max_examples=150, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["fog", "labels"]), data=st.data())
def test_damaged_arrays_are_read_or_refused_with_their_name(arrays, name, data):
    """Bytes of the header change, or the file is cut: no hang, no large memory, a message that names the file."""
    path = arrays / f"{name}.npy"
    before = path.read_bytes()
    content = bytearray(before)
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=6)):
        content[place] = value
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    try:
        assert len(load(f"cifar10c:{arrays}/fog@1").train) == 48
    except ValueError as error:
        assert ".npy" in str(error) or "class " in str(error)
    finally:
        path.write_bytes(before)


HEADERS = {
    "petabytes": "{'descr': '|u1', 'fortran_order': False, 'shape': (5000000000000, 32, 32, 3)}",
    "beyond 64 bits": f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**70}, 32, 32, 3)}}",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 32, 32, 3)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (10, 32, 32, 3)}",
    "code": "__import__('os').abort()",
    "deep": "(" * 5000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_forged_headers_are_refused(arrays, header):
    text = header.encode() + b"\n"
    (arrays / "fog.npy").write_bytes(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text + bytes(1000))
    with pytest.raises(ValueError, match=r"fog\.npy"):
        load(f"cifar10c:{arrays}/fog@1")


def test_an_archive_of_arrays_is_refused(arrays):
    np.savez(arrays / "fog.npz", images=np.zeros(3))
    (arrays / "fog.npz").rename(arrays / "fog.npy")
    with pytest.raises(ValueError, match=r"fog\.npy is an archive of arrays"):
        load(f"cifar10c:{arrays}/fog@1")
