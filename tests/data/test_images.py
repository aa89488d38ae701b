"""Many images: in order, streams that equal what memory would hold, sizes, changes and copies noticed."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.images import NpyRows, StreamedImages, common_size, count_shared, decode_images, load_images
from tests.data.material import copy_of


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    """Ten PNG files of 10 x 14 pixels with seeded contents."""
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.fromarray(pixels(10, 14, seed=number)).save(path)
    return paths


def test_decoding_keeps_the_order(files):
    images = decode_images(files, (10, 14))
    assert images.shape == (10, 3, 10, 14) and images.dtype == torch.uint8
    for number, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(10, 14, seed=number))


def test_arrays_are_copied_or_resized_like_files(files):
    array = np.stack([pixels(10, 14, seed=number) for number in range(10)])
    assert torch.equal(decode_images(array, (10, 14)), decode_images(files, (10, 14)))
    assert torch.equal(decode_images(array, (5, 5)), decode_images(files, (5, 5)))
    images = decode_images(array, (10, 14))
    array[:] = 0
    assert images.any()


def test_progress_goes_to_stderr_when_asked_for(files, capsys):
    decode_images(files, (10, 14), progress="digits train")
    captured = capsys.readouterr()
    assert "digits train: 100%" in captured.err and captured.out == ""
    decode_images(files, (10, 14))
    assert capsys.readouterr().err == ""


def test_images_of_one_size_up_to_256_keep_it(tmp_path, files):
    assert common_size([files]) == (10, 14)
    for side, expected in ((256, (256, 256)), (257, (224, 224))):
        Image.fromarray(pixels(side, side)).save(tmp_path / "large.png")
        assert common_size([[tmp_path / "large.png"]]) == expected
    assert common_size([np.zeros((2, 9, 7, 3), dtype=np.uint8), np.zeros((1, 9, 7, 3), dtype=np.uint8)]) == (9, 7)


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(10, 14), (9, 20)], 32),
        ([(30, 40), (36, 33), (28, 64)], 32),
        ([(47, 60), (47, 50), (300, 300)], 32),
        ([(48, 60), (48, 50), (300, 300)], 64),
        ([(100, 90), (95, 120), (99, 99)], 96),
        ([(500, 400), (300, 375)], 224),
        ([(224, 300), (224, 299)], 224),
    ],
)
def test_images_of_several_sizes_get_the_median_of_their_shorter_sides_in_steps_of_32(tmp_path, sizes, side):
    paths = [tmp_path / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.fromarray(pixels(*size)).save(path)
    assert common_size([paths[:1], paths[1:]]) == (side, side)


def test_what_exceeds_the_limit_is_streamed(files):
    needed = 10 * 3 * 10 * 14
    assert isinstance(load_images(files, (10, 14), needed, None), torch.Tensor)
    assert isinstance(load_images(files, (10, 14), needed - 1, None), StreamedImages)


INDICES = [
    torch.tensor([4, 0, 9, 4]),
    torch.tensor([], dtype=torch.int64),
    torch.arange(10) % 2 == 0,
    slice(2, 7),
    [1, -1],
    3,
    torch.tensor(3),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("size", [(10, 14), (7, 7)])
def test_a_stream_indexes_like_the_tensor(files, index, size):
    stream, tensor = StreamedImages(files, size), decode_images(files, size)
    assert stream.shape == tensor.shape and len(stream) == len(tensor) and stream.dtype == tensor.dtype
    assert torch.equal(stream[index], tensor[index])


def test_a_stream_corrupts_each_image_as_memory_would(files):
    corruptions = (("gaussian_noise", 3, 0), ("shot_noise", 2, 5))
    stream, tensor = StreamedImages(files, (10, 14), corruptions), decode_images(files, (10, 14))
    for name, severity, seed in corruptions:
        tensor = corrupt(tensor, name, severity, seed=seed)
    some = torch.tensor([8, 1, 5])
    assert torch.equal(stream[some], tensor[some])
    assert torch.equal(stream.take(some)[:], tensor[some])
    assert torch.equal(stream.take(some).take(torch.tensor([2, 0]))[:], tensor[torch.tensor([5, 8])])


def test_an_index_out_of_range_raises(files):
    with pytest.raises(IndexError):
        StreamedImages(files, (10, 14))[torch.tensor([10])]


def test_streams_travel_between_processes(files):
    stream = StreamedImages(files, (10, 14), (("contrast", 2, 0),))
    assert torch.equal(pickle.loads(pickle.dumps(stream))[:], stream[:])


def test_the_digest_of_a_stream_follows_bytes_size_and_corruptions(files):
    def digest(stream: StreamedImages) -> str:
        sha = hashlib.sha256()
        stream.update_digest(sha)
        return sha.hexdigest()

    base = digest(StreamedImages(files, (10, 14)))
    assert base == digest(StreamedImages(list(files), (10, 14)))
    others = [
        StreamedImages(files, (9, 9)),
        StreamedImages(files[::-1], (10, 14)),
        StreamedImages(files, (10, 14), (("contrast", 1, 0),)),
        StreamedImages(files, (10, 14), (("contrast", 1, 1),)),
        StreamedImages(files, (10, 14), (("contrast", 1, 0),), torch.arange(10).flip(0)),
    ]
    digests = [digest(stream) for stream in others]
    Image.fromarray(pixels(10, 14, seed=99)).save(files[0])
    digests.append(digest(StreamedImages(files, (10, 14))))
    assert len({base, *digests}) == 7


@pytest.mark.parametrize("change", ["other pixels", "another time", "longer", "gone"])
def test_files_that_changed_are_noticed_when_they_are_read_or_digested(files, change):
    stream = StreamedImages(files, (10, 14))
    stream = pickle.loads(pickle.dumps(stream.take(torch.tensor([8, 4, 1]))))
    status = files[4].stat()
    if change == "other pixels":
        Image.fromarray(pixels(10, 14, seed=99)).save(files[4])
    elif change == "another time":
        os.utime(files[4], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "longer":
        files[4].write_bytes(files[4].read_bytes() + b"\0")
        os.utime(files[4], ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        files[4].unlink()
    assert torch.equal(stream[torch.tensor([0, 2])], decode_images([files[8], files[1]], (10, 14)))
    for read in (lambda: stream[:2], lambda: stream.update_digest(hashlib.sha256())):
        with pytest.raises((RuntimeError, FileNotFoundError), match=r"4\.png.*(load it again)?"):
            read()


def test_a_half_written_file_is_told_as_changed(files):
    stream = StreamedImages(files, (10, 14))
    files[4].write_bytes(files[4].read_bytes()[:40])
    with pytest.raises(RuntimeError, match=r"1 files were changed after the task was loaded.*4\.png"):
        stream[:]


def test_a_changed_npy_file_is_noticed(tmp_path):
    array = np.stack([pixels(4, 4, seed=number) for number in range(6)])
    np.save(tmp_path / "a.npy", array)
    stream = StreamedImages(NpyRows(tmp_path / "a.npy", np.arange(6)), (4, 4))
    assert torch.equal(stream.take(torch.tensor([3, 1]))[:], decode_images(array[[3, 1]], (4, 4)))
    np.save(tmp_path / "a.npy", array[::-1])
    with pytest.raises(RuntimeError, match=r"a\.npy"):
        stream[2]


def test_shared_images_are_found_in_files_and_arrays(tmp_path, files):
    copies = [copy_of(files[number], tmp_path / "copies" / f"{number}.png") for number in (2, 2, 7)]
    other = tmp_path / "other.png"
    Image.fromarray(pixels(10, 14, seed=50)).save(other)
    assert count_shared(files, [*copies, other]) == 3
    array = np.stack([pixels(10, 14, seed=number) for number in range(10)])
    assert count_shared(array, array[[1, 1]]) == 2 and count_shared(array, 255 - array) == 0
    assert count_shared(decode_images(files, (10, 14)), decode_images(array[:4], (10, 14))) == 4
