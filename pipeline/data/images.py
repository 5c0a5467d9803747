"""Image bytes in, RGB arrays out, and back: with limits, and an error that names the image."""

import io
import logging
import os
import stat
import warnings

import cv2
import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.remote import read_url, read_within

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 28
"""Of an image file: 100 million pixels of noise, losslessly compressed, need more, but no photograph does."""
# By name: others of Pillow's formats start programs (EPS) or read what no image folder should hold.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"
_PIXELS_A_BYTE = 1000
"""Of a JPEG: even a grey one of one colour needs a bit for each block of 64 pixels."""
_RGB_BY_PIL = frozenset({"CMYK", "YCbCr", "LAB", "HSV"})


def decode_image(
    data: bytes, *, where: str, max_pixels: int = MAX_PIXELS, size: tuple[int, int] | None = None
) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB, whatever its format, depth and colour space.

    The header is read first: an image of more than `max_pixels` is refused before anything is decoded. `size` is the
    annotated (width, height): the EXIF orientation is ignored, as the annotations of the public sets do, unless the
    image then contradicts `size` and the oriented one agrees. Raises DataError naming `where` if the bytes are empty,
    truncated, too large, no image, or of another size than annotated.
    """
    header = _header(data, where, max_pixels)
    if header.mode in _RGB_BY_PIL or header.format == "GIF":
        image = _decode_pil(data, where)
    else:
        if header.format in ("JPEG", "MPO") and not data.rstrip(b"\0\r\n ").endswith(_JPEG_END):
            _decode_pil(data, where)  # OpenCV 4 silently fills the missing part with grey; Pillow refuses
        image = decode_stored(data, where=where)
    if image.shape[:2] != header.size[::-1]:
        raise DataError(f"{where}: decoded to {image.shape[1]}x{image.shape[0]}, its header says {header.size}")
    if size is None or (image.shape[1], image.shape[0]) == tuple(size):
        return image
    return _oriented(image, header, where, size)


def decode_stored(data: bytes, *, where: str) -> np.ndarray:
    """`decode_image` without looking at the header, for bytes that a digest vouches for. (H, W, 3) uint8 RGB."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DataError(f"{where}: can't be decoded ({' '.join(str(error).split())[:200]})") from None
    if image is None:
        raise DataError(f"{where}: {len(data)} bytes that can't be decoded; the file is damaged or no image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """(H, W, 3) uint8 RGB as JPEG bytes, with 4:2:0 chroma."""
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "OpenCV encodes every uint8 RGB image"
    return data.tobytes()


def read_bytes(path_or_url: str, limit: int = MAX_BYTES) -> bytes:
    """All bytes of a local file or of an fsspec URL (`s3://`, `gs://`, `https://`, ...).

    Raises DataError, also for more than `limit` bytes and for what is no ordinary file (a pipe would never end), and
    StorageError if a URL can't be reached: that says nothing about the file.
    """
    source = str(path_or_url)
    if "://" in source:
        return read_url(source, limit)
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise OSError("no ordinary file")
        with open(source, "rb") as stream:
            return read_within(stream, source, limit)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file; check the dataset's image folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: can't be read: {error}") from None


def _header(data: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns below our own limit
            header = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: refused before decoding: {error}") from None
    except Exception as error:  # noqa: BLE001 - Pillow raises SyntaxError, struct.error and more on damaged headers
        kind = "empty file" if not data else f"{len(data)} bytes that are no known image"
        raise DataError(f"{where}: {kind} ({type(error).__name__})") from None
    width, height = header.size
    if width * height > max_pixels:
        limit = f"the limit is {max_pixels} pixels"
        raise DataError(f"{where}: refused before decoding: {width}x{height} pixels, {limit}")
    if header.format in ("JPEG", "MPO") and width * height > _PIXELS_A_BYTE * len(data):
        # Decoders fill the rest with grey, and do not say so.
        raise DataError(f"{where}: refused before decoding: {width}x{height} pixels in {len(data)} bytes")
    return header


def _decode_pil(data: bytes, where: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(f"{where}: truncated or damaged image: {error}") from None


def _oriented(image: np.ndarray, header: Image.Image, where: str, size: tuple[int, int]) -> np.ndarray:
    """The image turned by its EXIF orientation, which must lead to the annotated size."""
    height, width = image.shape[:2]
    orientation = _orientation(header)
    if (height, width) != tuple(size) or orientation not in (5, 6, 7, 8):
        found = f"{width}x{height} pixels, annotated as {size[0]}x{size[1]}"
        raise DataError(f"{where}: {found}; the annotations belong to another version of this image")
    logger.debug("%s: turned by its EXIF orientation %d, which agrees with the annotations", where, orientation)
    turned = image.swapaxes(0, 1)
    if orientation in (6, 7):
        turned = turned[:, ::-1]
    if orientation in (7, 8):
        turned = turned[::-1]
    return np.ascontiguousarray(turned)


def _orientation(header: Image.Image) -> int:
    try:
        return int(header.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block is as good as none
        return 1
