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

from pipeline.errors import ConfigError


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


MAX_JSON = 1 << 28


def read_json(path: Path) -> Any:
    """Plain data of a JSON file of at most `MAX_JSON` bytes. Raises OSError or ValueError, whatever is in it."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path.stat().st_size} bytes, the limit is {MAX_JSON}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link where the file system has them, else a copy: for files that are never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def require_writable(folder: Path) -> None:
    """Makes a folder and writes into it, to find out now. Raises ConfigError that says what is in the way."""
    probe = folder / f".writable-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{folder}: can't be written to ({reason}); choose another place or free this one") from None


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
