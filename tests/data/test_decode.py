"""One image file: right pixels, upright, on white; right errors; bounded memory."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from subtuning_lab.data.decode import file_size, fit_image, read_image
from subtuning_lab.data.images import common_size, load_images


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_png_is_read_exactly(tmp_path):
    Image.fromarray(pixels(10, 14)).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", (10, 14)), pixels(10, 14))


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_images_stand_upright(tmp_path, orientation, kind):
    """Whatever the camera's side up, the picture is what Pillow's own viewer function shows."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    options = {"tif": {"compression": "tiff_lzw"}}.get(kind, {"quality": 95} if kind in ("jpg", "webp", "avif") else {})
    Image.fromarray(np.kron(pixels(3, 4), np.ones((8, 8, 1), np.uint8))).save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((24, 32) if orientation < 5 else (32, 24)) == file_size(path) == common_size([[path]])
    assert np.array_equal(read_image(path, expected.shape[:2]), expected)


@pytest.mark.parametrize("note", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + bytes(range(64))])
def test_damaged_notes_leave_pixels_readable(tmp_path, note):
    Image.fromarray(pixels(8, 12)).save(tmp_path / "a.jpg", exif=note, quality=95)
    assert read_image(tmp_path / "a.jpg", (8, 12)).shape == (8, 12, 3) and file_size(tmp_path / "a.jpg") == (8, 12)


def see_through(kind: str) -> Image.Image:
    """A red image whose left half is transparent, whatever its colour there."""
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 4, 8))
    return image if kind == "RGBA" else image.convert("LA") if kind == "LA" else image.quantize(8)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp"), ("RGBA", "gif")]
)
def test_transparent_images_lie_on_white(tmp_path, kind, suffix):
    see_through(kind).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(tmp_path / f"a.{suffix}", (8, 8))
    assert (image[:, :4] == 255).all()
    assert np.allclose(image[:, 4:], 60 if kind == "LA" else [200, 0, 0], atol=2)


def test_a_transparent_colour_is_white_and_half_a_shade_is_half_white(tmp_path):
    grey = Image.fromarray(np.array([[0, 100], [200, 0]], dtype=np.uint8))
    grey.save(tmp_path / "key.png", transparency=0)
    assert read_image(tmp_path / "key.png", (2, 2))[..., 0].tolist() == [[255, 100], [200, 255]]
    Image.new("RGBA", (2, 2), (100, 0, 200, 51)).save(tmp_path / "half.png")
    assert np.allclose(read_image(tmp_path / "half.png", (2, 2)), [255 - 0.2 * 155, 255 * 0.8, 255 - 0.2 * 55], atol=1)


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1), (3, 500), (2000, 20)])
def test_a_strip_is_scaled_as_a_whole_would_be(size):
    height, width = size
    image = Image.fromarray(pixels(height, width))
    got = fit_image(image, (16, 16)).astype(int)
    scale = max(16 / height, 16 / width)
    whole = image.resize((max(16, round(width * scale)), max(16, round(height * scale))), Image.Resampling.BILINEAR)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    expected = np.asarray(whole.crop((left, top, left + 16, top + 16))).astype(int)
    assert np.abs(got - expected).max() <= 1


def tiny_png(width: int, height: int, rows_written: int | None = None) -> bytes:
    """A PNG file of black pixels, as small as it can be."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    deflate, rows = zlib.compressobj(9), b""
    row = b"\0" * (1 + (width + 7) // 8)
    for _ in range(height if rows_written is None else rows_written):
        rows += deflate.compress(row)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows + deflate.flush()) + part(b"IEND", b"")


BOMBS = {
    "strip": tiny_png(20_000, 1),
    "tall strip": tiny_png(1, 60_000),
    "8000 x 8000": tiny_png(8_000, 8_000),
    "9000 x 9000": tiny_png(9_000, 9_000),
    "20000 x 20000": tiny_png(20_000, 20_000),
    "40000 x 40000 without data": tiny_png(40_000, 40_000, rows_written=0),
}
MEASURED = """
import json, re, sys
from pathlib import Path
from subtuning_lab.data.decode import read_image

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before, said = peak(), {}
for path in map(Path, sys.argv[1:]):
    try:
        read_image(path, (224, 224))
    except ValueError as error:
        said[path.stem] = str(error)
print(json.dumps({"MB": peak() - before, "said": said}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_image_bombs_take_little_memory_and_are_named(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in BOMBS]
    for path, content in zip(paths, BOMBS.values(), strict=True):
        path.write_bytes(content)
    assert max(path.stat().st_size for path in paths) < 70_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["MB"] < 700, measured
    assert set(measured["said"]) == {"9000 x 9000", "20000 x 20000", "40000 x 40000 without data"}
    assert all("67,108,864" in text and "cannot decode image" in text for text in measured["said"].values())


def samples() -> dict[str, bytes]:
    """A small file of every kind that this Pillow writes."""
    image, files = Image.fromarray(pixels(9, 7)), {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO", "JPEG2000"):
        stream = io.BytesIO()
        try:
            image.save(stream, kind)
        except (OSError, KeyError):
            continue
        files[kind] = stream.getvalue()
    return files


SAMPLES = samples()


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_damaged_images_are_read_or_refused_with_their_name(tmp_path, kind, data):
    content = bytearray(SAMPLES[kind])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
    ):
        content[place] = value
    content = content[: data.draw(st.integers(0, len(content)))]
    (tmp_path / "x.png").write_bytes(content)
    for read in (file_size, lambda path: read_image(path, (8, 8)).shape[:2]):
        try:
            assert len(read(tmp_path / "x.png")) == 2
        except ValueError as error:
            assert "x.png" in str(error) and "cannot decode image" in str(error)


def test_no_other_program_is_started_for_an_image(tmp_path):
    """PostScript under a picture's name would start Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(ValueError, match="not an image"):
        read_image(tmp_path / "a.png", (8, 8))
