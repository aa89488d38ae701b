"""Decoding: right pixels, right errors, and streams that equal what memory would hold."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from subtuning_lab.data.arrays import as_images, as_integers
from subtuning_lab.data.corruptions.registry import corrupt
from subtuning_lab.data.decode import file_size, read_image
from subtuning_lab.data.images import StreamedImages, common_size, decode_images, load_images


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    """Ten PNG files of 10 x 14 pixels with seeded contents."""
    paths = [tmp_path / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.fromarray(pixels(10, 14, seed=number)).save(path)
    return paths


def test_a_png_is_read_exactly(files):
    assert np.array_equal(read_image(files[3], (10, 14)), pixels(10, 14, seed=3))


@pytest.mark.parametrize(("height", "width", "size"), [(40, 60, 20), (60, 40, 20), (64, 64, 24), (16, 24, 32)])
def test_resizing_is_torchvisions_resize_and_centre_crop(tmp_path, height, width, size):
    Image.fromarray(pixels(height, width)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        resized = transforms.resize(image, [size], interpolation=InterpolationMode.BILINEAR, antialias=True)
        expected = np.asarray(transforms.center_crop(resized, [size, size]))
    assert np.array_equal(read_image(tmp_path / "a.png", (size, size)), expected)


def test_a_large_jpeg_decoded_in_draft_mode_is_close_to_the_full_one(tmp_path):
    ramp = np.linspace(0, 255, 800, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (640, 1)), np.tile(ramp[:640, None], (1, 800))] * 2, -1)[..., :3])
    image.save(tmp_path / "a.jpg", quality=95)
    small = read_image(tmp_path / "a.jpg", (64, 64)).astype(int)
    full = np.asarray(transforms.center_crop(image.resize((80, 64), Image.Resampling.BILINEAR), [64, 64])).astype(int)
    assert np.abs(small - full).max() <= 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(pixels(6, 6)).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(read_image(path, (6, 6)), np.asarray(image.convert("RGB")))


def test_16_bit_images_are_refused_instead_of_clipped(tmp_path):
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png.*8 bits"):
        read_image(tmp_path / "deep.png", (6, 6))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    buffer = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    (tmp_path / f"half.{suffix}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match=rf"half\.{suffix}"):
        read_image(tmp_path / f"half.{suffix}", (64, 64))


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "text.png").write_bytes(content)
    for read in (lambda path: read_image(path, (8, 8)), file_size, lambda path: load_images([path], (8, 8), 0, None)):
        with pytest.raises(ValueError, match=r"cannot decode.*text\.png"):
            read(tmp_path / "text.png")


def test_a_missing_file_is_named(tmp_path):
    for read in (lambda path: read_image(path, (8, 8)), file_size, lambda path: load_images([path], (8, 8), 0, None)):
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            read(tmp_path / "gone.png")


def test_decoding_keeps_the_order(files):
    images = decode_images(files, (10, 14))
    assert images.shape == (10, 3, 10, 14) and images.dtype == torch.uint8
    for number, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(10, 14, seed=number))


def test_one_bad_file_among_many_raises(files):
    files[7].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"7\.png"):
        decode_images(files, (10, 14))


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


def test_as_images_brings_all_layouts_to_one():
    array = np.stack([pixels(8, 9, seed=number) for number in range(4)])
    expected = torch.from_numpy(array).permute(0, 3, 1, 2)
    layouts = [array, torch.from_numpy(array), expected, expected.numpy(), array / 255.0]
    layouts += [(expected.float() / 255), np.asarray(array / 255, dtype=np.float32), array[:, ::-1].copy()[:, ::-1]]
    for images in layouts:
        converted = as_images(images)
        assert converted.dtype == torch.uint8 and converted.is_contiguous()
        assert torch.equal(converted, expected)
    for grey in (array[..., 0], torch.from_numpy(array[:, None, :, :, 0])):
        assert torch.equal(as_images(grey), expected[:, :1].expand(-1, 3, -1, -1))


def test_as_images_copies():
    array = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images = as_images(array)
    array += 1
    assert not images.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.01, -0.01, 255.0])
def test_as_images_names_the_first_bad_image(bad):
    images = torch.rand(5, 3, 4, 4)
    images[3, 1, 2, 2] = images[4, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"images\[3\].*NaN or outside \[0, 1\]"):
        as_images(images)


@pytest.mark.parametrize(
    "shape", [(4, 8), (4, 2, 8, 8), (4, 8, 8, 4), (0, 3, 8, 8), (4, 3, 0, 8), (3,), (1, 2, 3, 8, 8)]
)
def test_as_images_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="must be"):
        as_images(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, bool, complex, "U1", object])
def test_as_images_refuses_other_types(dtype):
    with pytest.raises(TypeError, match="must be uint8"):
        as_images(np.zeros((2, 3, 4, 4), dtype=dtype))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4, dtype=torch.int32), [[[1]]], None])
def test_as_images_refuses_other_objects(images):
    with pytest.raises(TypeError, match="must be"):
        as_images(images)


@pytest.mark.parametrize("values", [[0.0, 1.0], [True, False], ["a", "b"], torch.rand(2), [None, 1]])
def test_as_integers_refuses_other_types(values):
    with pytest.raises(TypeError, match="labels must be integers"):
        as_integers(values, "labels")


@pytest.mark.parametrize("values", [[[0, 1]], np.int64(3), torch.zeros(2, 2, dtype=torch.int64)])
def test_as_integers_refuses_other_shapes(values):
    with pytest.raises(ValueError, match=r"labels must have shape \(n,\)"):
        as_integers(values, "labels")
