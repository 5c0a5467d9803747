"""Where annotation files and images lie: local paths and fsspec URLs by one syntax."""

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.remote import asked, info, open_filesystem, read_url

MAX_BYTES = 1 << 33
"""Of a remote annotation file: those of millions of people are a few gigabytes."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def is_url(path: str) -> bool:
    """True for fsspec URLs such as s3://bucket/folder."""
    return "://" in path


def join(root: str, path: str) -> str:
    """`path` below `root`; `path` itself where it is absolute or a URL."""
    if is_url(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.join(root, path)


def stays_below(name: str) -> bool:
    """True for an image name that leads to a file below its folder: no URL, no absolute path, no `..`.

    An annotation file comes from anybody; it does not choose what else of this machine or network is read.
    """
    return not (is_url(name) or os.path.isabs(name) or ".." in name.split("/") or _UNPRINTABLE.search(name))


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def is_file(path: str) -> bool:
    """True where a file is. Raises StorageError if the place can't be reached."""
    if not is_url(path):
        return os.path.isfile(path)
    found = info(path)
    return found is not None and found["type"] == "file"


def is_folder(path: str) -> bool:
    """True where a folder is. Raises StorageError if the place can't be reached."""
    if not is_url(path):
        return os.path.isdir(path)
    found = info(path)
    if found is None or found["type"] == "directory":
        return found is not None
    filesystem, inner = open_filesystem(path)  # a page of links is a file, too
    return asked(lambda: filesystem.isdir(inner), path)


def is_image_folder(path: str) -> bool:
    """True for a folder with an image directly in it; a folder behind a URL is not listed, only asked for."""
    if is_url(path) or not os.path.isdir(path):
        return is_folder(path)
    with os.scandir(path) as entries:
        return any(entry.name.lower().endswith(IMAGE_ENDINGS) for entry in entries)


def read_bytes(path: str) -> bytes:
    """The content of a file. Raises DataError if it can't be read, StorageError if a URL can't be reached."""
    if is_url(path):
        return read_url(path, MAX_BYTES)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def read_json(path: str) -> tuple[Any, str]:
    """Content of a JSON file and the sha256 of its bytes.

    Raises DataError, with the position of the mistake, for an empty file and for anything that is not JSON.
    """
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty ({len(content)} bytes)")
    digest = hashlib.sha256(content).hexdigest()
    try:
        return json.loads(content), digest
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON: byte {error.start} is not {error.encoding}") from None
    except ValueError as error:
        raise DataError(f"{path}: not usable JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{path}: not usable JSON: nested too deep") from None


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: among millions of new objects it finds nothing and takes a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def first_found(what: str, places: Sequence[str], found: Callable[[str], bool], hint: str) -> str:
    """The first place for which `found(place)` holds. Raises DataError that lists the places."""
    for place in places:
        if found(place):
            return place
    looked = "".join(f"\n  {place}" for place in places) or " nowhere: the definition names no place"
    raise DataError(f"{what} not found; {hint}. Looked at:{looked}")
