"""Files that are either whole or absent: atomic writes, digests, JSON."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex digest of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces a file as one step: a reader sees the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` for plain data."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Plain data of a JSON file. Raises OSError or ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def fsync_tree(folder: Path) -> None:
    """Makes every file below a folder, and the folders themselves, durable."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_folder(temporary: Path, final: Path) -> None:
    """Renames a finished folder into place, durably. What stood there is replaced."""
    fsync_tree(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_directory(final.parent)


def fsync_directory(folder: Path) -> None:
    """Makes a rename in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place when the block ends without an error."""
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
