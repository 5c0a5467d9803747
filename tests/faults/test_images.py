"""Image files of every broken and hostile kind, written as files and read as training and evaluation read them.

Formats that people honestly have (grey, CMYK, 16 bit, EXIF-rotated) are in tests/data/test_images.py.
"""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images
from pipeline.data.check import _image_fault
from pipeline.data.images import MAX_BYTES, decode_image, decode_stored, encode_jpeg, read_bytes
from pipeline.data.readers.records import ImageRecord
from pipeline.errors import DataError

pytestmark = pytest.mark.fault(19)

ROOT = Path(__file__).resolve().parents[2]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
FRAMES = [Image.fromarray(np.full((40, 60, 3), shade, np.uint8)) for shade in (0, 80, 160, 240)]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, *extra: bytes, rows: int = 1) -> bytes:
    """A PNG whose header says side x side, black and white; `rows` black rows are in it."""
    compressor = zlib.compressobj(1)
    pixels = b"".join(compressor.compress(bytes(1 + (side + 7) // 8)) for _ in range(rows)) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_that_says(height: int, width: int) -> bytes:
    data = bytearray(encoded(NOISE, "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


REFUSED = {
    "zero bytes": (b"", "empty file"),
    "text": (b"<html>404 not found</html>", "no known image"),
    "png 30000x30000": (png(30_000), "refused before decoding"),
    "png just above the limit": (png(10_001), "refused before decoding"),
    "jpeg 65535x65535": (jpeg_that_says(65_535, 65_535), "refused before decoding"),
    "jpeg 9000x9000 in 2 kB": (jpeg_that_says(9_000, 9_000), "9000x9000 pixels in"),
    "jpeg without height": (jpeg_that_says(0, 60), "no known image"),
    "jpeg without width": (jpeg_that_says(40, 0), "no known image"),
    "gif 65535x65535": (with_bytes(encoded(NOISE, "GIF"), 6, b"\xff" * 4), "refused before decoding"),
    "bmp 30000x30000": (
        with_bytes(encoded(NOISE, "BMP"), 18, struct.pack("<ii", 30_000, 30_000)),
        "refused before decoding",
    ),
    "png with 20 MB of text": (png(8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))), "no known image"),
    "png with a profile of 20 MB": (
        png(8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))),
        "no known image",
    ),
    "eps, for which Pillow would start a program": (encoded(NOISE.convert("CMYK"), "EPS"), "no known image"),
    "pdf": (encoded(NOISE, "PDF"), "no known image"),
    "truncated multi-picture jpeg": (
        encoded(NOISE, "MPO", save_all=True, append_images=FRAMES)[:1500],
        "truncated or damaged",
    ),
}
READ = {
    "png": encoded(FRAMES[0], "PNG"),
    "animated png": encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "gif": encoded(FRAMES[0], "GIF"),
    "animated gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated webp": encoded(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]),
    "multi-picture jpeg": encoded(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]),
    "bmp": encoded(FRAMES[0], "BMP"),
    "cmyk tiff": encoded(FRAMES[0].convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_can_not_or_must_not_be_decoded_is_named(tmp_path: Path, name: str) -> None:
    """One line with the file, whatever is wrong, from the reader of training and from `data check` alike."""
    content, said = REFUSED[name]
    path = tmp_path / "one.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        decode_image(read_bytes(str(path)), where=str(path))
    assert "one.jpg" in str(caught.value) and "\n" not in str(caught.value)
    seen = _image_fault(ImageRecord(1, "one.jpg", str(path), None, None))
    if said != "truncated or damaged" and not said.endswith("pixels in"):  # which the header alone does not tell
        assert seen is not None and seen[0] == "image unreadable"


@pytest.mark.parametrize("name", READ)
def test_other_formats_under_the_name_of_a_jpeg_are_read_the_first_picture_of_several(
    tmp_path: Path, name: str
) -> None:
    """The content counts, not the name; an animation is its first picture."""
    (tmp_path / "one.jpg").write_bytes(READ[name])
    image = decode_image(read_bytes(str(tmp_path / "one.jpg")), where="one.jpg")
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8 and image.max() < 40


@pytest.mark.parametrize("name", [name for name, (_, said) in REFUSED.items() if said == "refused before decoding"])
def test_a_bomb_never_reaches_a_decoder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The header alone decides."""

    def decoder(*_: Any, **__: Any) -> None:
        pytest.fail("a bomb was decoded")

    monkeypatch.setattr(images.cv2, "imdecode", decoder)
    monkeypatch.setattr(images.Image.Image, "convert", decoder)
    with pytest.raises(DataError, match="refused before decoding"):
        decode_image(REFUSED[name][0], where="x")


PEAK = """
import resource, sys
from pathlib import Path
from pipeline.data.images import decode_image, decode_stored, read_bytes
from pipeline.errors import DataError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (lambda data: decode_image(data, where="bomb"), lambda data: decode_stored(data, where="bomb")):
    try:
        read(read_bytes(sys.argv[1]))
    except DataError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_whole_bomb_of_900_million_pixels_costs_no_memory_wherever_it_lies(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels in a small file, all of them really there: 2.7 GB if decoded. Neither the reader of raw
    images nor that of stored crops, which trusts a digest, takes more than a few MB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(30_000, rows=30_000))
    assert path.stat().st_size < 4e6
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OPENCV_IO_MAX_IMAGE_PIXELS", None)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, timeout=60, env=environment
    )
    raw, stored, peak = done.stdout.splitlines()
    assert "refused before decoding" in raw and "can't be decoded" in stored
    assert int(peak) < 100, done.stdout


def test_a_file_that_is_too_large_or_never_ends_is_not_read(tmp_path: Path) -> None:
    """A sparse file of 2 GB, a pipe, a device behind a link, a folder: refused at once."""
    with (tmp_path / "large.jpg").open("wb") as stream:
        stream.truncate(2 << 30)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name, said in [("large", f"more than {MAX_BYTES} bytes"), ("pipe", "no ordinary"), ("zero", "no ordinary")]:
        with pytest.raises(DataError, match=said):
            read_bytes(str(tmp_path / f"{name}.jpg"))
    with pytest.raises(DataError, match=r"folder\.jpg"):
        read_bytes(str(tmp_path / "folder.jpg"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_give_an_image_or_a_named_error(kind: str) -> None:
    """Whatever bytes are changed: an image of some size, or one line; no other exception."""
    whole = encoded(NOISE, kind)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 20)):
            data[place] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(data), where="one.jpg").shape[2] == 3
        except DataError as error:
            assert str(error).startswith("one.jpg: ") and "\n" not in str(error)


def test_stored_crops_that_are_no_image_are_an_error_too() -> None:
    """What a digest vouches for may still be damaged before the digest was made."""
    for data in (b"", b"text", encode_jpeg(np.asarray(NOISE), 90)[:20]):
        with pytest.raises(DataError, match="one"):
            decode_stored(data, where="one")
