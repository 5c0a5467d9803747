"""Images of every kind that people's disks hold, and what is refused."""

import io
import struct
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import decode_image, decode_stored, encode_jpeg, read_bytes
from pipeline.errors import ConfigError, DataError


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], -1).astype(np.uint8)


def encoded(image: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def test_png_decodes_exactly_and_in_rgb_order() -> None:
    np.testing.assert_array_equal(decode_image(encoded(picture(), "PNG"), where="x.jpg"), picture())


def test_jpeg_survives_encoding_and_decoding_closely() -> None:
    image = decode_image(encode_jpeg(picture(), 95), where="x")
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture()).mean() < 3
    np.testing.assert_array_equal(image, decode_stored(encode_jpeg(picture(), 95), where="x"))


@pytest.mark.fault(19)
def test_grey_palette_alpha_and_sixteen_bit_images_become_rgb() -> None:
    grey = picture()[..., 0]
    for data in (encoded(grey, "PNG"), encoded((grey.astype(np.uint16) * 256), "PNG")):
        np.testing.assert_array_equal(decode_image(data, where="x"), np.repeat(grey[..., None], 3, axis=2))
    stream = io.BytesIO()
    Image.fromarray(picture()).convert("RGBA").save(stream, "PNG")
    np.testing.assert_array_equal(decode_image(stream.getvalue(), where="x"), picture())
    flat = np.zeros((8, 8, 3), np.uint8)
    flat[:4] = (250, 10, 60)
    stream = io.BytesIO()
    Image.fromarray(flat).convert("P", palette=Image.Palette.ADAPTIVE).save(stream, "PNG")
    np.testing.assert_allclose(decode_image(stream.getvalue(), where="x"), flat, atol=4)


@pytest.mark.fault(19)
def test_cmyk_jpeg_has_the_colours_that_pillow_gives_it() -> None:
    stream = io.BytesIO()
    Image.fromarray(picture()).convert("CMYK").save(stream, "JPEG", quality=95)
    image = decode_image(stream.getvalue(), where="x")
    assert np.abs(image.astype(int) - picture()).mean() < 4


@pytest.mark.fault(19)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_image_is_refused_by_name(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(DataError, match=r"folder/one\.jpg"):
        decode_image(data[: int(len(data) * share)], where="folder/one.jpg")


@pytest.mark.fault(19)
@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"hello world, this is text", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_bytes_that_are_no_image_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match="one.jpg"):
        decode_image(data, where="one.jpg")


@pytest.mark.fault(19)
def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused() -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9 looks like an end"
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG", exif=exif)
    with pytest.raises(DataError):
        decode_image(data[: len(data) // 2], where="x")


def test_a_jpeg_with_bytes_after_its_end_is_accepted() -> None:
    data = encode_jpeg(picture(), 95)
    np.testing.assert_array_equal(decode_image(data + b"trailing garbage", where="x"), decode_image(data, where="x"))


@pytest.mark.fault(19)
def test_a_decompression_bomb_is_refused_before_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (30_000, 10_001):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        with pytest.raises(DataError, match="refused before decoding"):
            decode_image(bomb, where="bomb.png")
    with pytest.raises(DataError, match="60x40 pixels, the limit is 2399"):
        decode_image(encoded(picture(), "PNG"), where="x", max_pixels=2399)


@pytest.mark.fault(19)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_orientation_is_ignored_unless_the_annotated_size_asks_for_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(picture()).save(stream, "PNG", exif=exif)
    data = stream.getvalue()
    np.testing.assert_array_equal(decode_image(data, where="x"), picture())
    np.testing.assert_array_equal(decode_image(data, where="x", size=(60, 40)), picture())
    if orientation < 5:
        with pytest.raises(DataError, match="60x40 pixels, annotated as 40x60"):
            decode_image(data, where="x", size=(40, 60))
        return
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode_image(data, where="x", size=(40, 60)), expected)


def test_an_image_of_another_size_than_annotated_is_refused() -> None:
    with pytest.raises(DataError, match="another version"):
        decode_image(encoded(picture(), "PNG"), where="x", size=(61, 40))


def test_bytes_come_from_folders_and_urls_alike(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"local")
    assert read_bytes(str(tmp_path / "a.bin")) == b"local"
    assert read_bytes(f"file://{tmp_path}/a.bin") == b"local"
    fsspec.filesystem("memory").pipe("/images/a.bin", b"remote")
    assert read_bytes("memory://images/a.bin") == b"remote"
    for missing in (str(tmp_path / "b.bin"), "memory://images/b.bin"):
        with pytest.raises(DataError, match=missing):
            read_bytes(missing)
    with pytest.raises(ConfigError, match="nosuchprotocol://x/y"):
        read_bytes("nosuchprotocol://x/y")


def test_real_images_have_their_annotated_sizes(samples: Path) -> None:
    path = samples / "coco" / "val2017" / "000000000785.jpg"
    assert decode_image(read_bytes(str(path)), where=str(path), size=(640, 425)).shape == (425, 640, 3)
