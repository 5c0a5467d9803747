"""Remote files by fsspec URL: opening a backend, and the one place where what failed is tried again."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeGuard, TypeVar

import fsspec
from fsspec import AbstractFileSystem

from pipeline.artifacts import without_passwords
from pipeline.errors import ConfigError, DataError, StorageError, VitruvianError

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 3
PATIENT_ATTEMPTS = 6
"""For what a running stage can't do without: a minute of waiting in all, beside the backend's own retries."""
_PART = 1 << 26
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FINAL = (VitruvianError, PermissionError, *_ABSENT)


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The backend of an fsspec URL and the path on it. Asks nobody. Raises ConfigError if the backend can't be had.

    It remembers no listing: another machine may write there. Credentials are the backend's own business.
    """
    options = {"auto_mkdir": True} if url.startswith(("file://", "local://")) else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; s3:// needs the extra `s3`: pip install '.[s3]' in the checkout") from None
    except ValueError as error:
        raise ConfigError(f"{url}: not a URL that fsspec knows: {error}") from None
    return filesystem, path.rstrip("/")


def is_transient(error: object) -> bool:
    """True for a failure that may pass: an outage, not an absence and not a refusal."""
    return isinstance(error, Exception) and not isinstance(error, _FINAL)


def retried(action: Callable[[], T], what: str, attempts: int = ATTEMPTS) -> T:
    """The action's result; it is tried again, a little later each time, where it failed for a reason that may pass.

    Backends retry single requests by themselves; this is for the outages that outlast them. Raises what the last
    attempt raised.
    """
    for attempt in range(1, attempts):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s: %s; trying again", what, reason(error))
            time.sleep(2**attempt)
    return action()


def reason(error: BaseException) -> str:
    """The first line of what a backend raised, without the passwords of the addresses in it."""
    return without_passwords((str(error).splitlines() or [""])[0])[:200] or type(error).__name__


def asked(action: Callable[[], T], where: str, attempts: int = ATTEMPTS) -> T:
    """`retried`. Raises FileNotFoundError for what is not there, StorageError where nobody answers or lets us in."""

    def tell_outages() -> T:
        try:
            return action()
        except FileNotFoundError as error:  # the backend for HTTP says so whatever happened
            if isinstance(error.__cause__, OSError) or getattr(error.__cause__, "status", 0) >= 500:
                raise OSError(reason(error.__cause__)) from None
            raise

    try:
        return retried(tell_outages, where, attempts)
    except (VitruvianError, FileNotFoundError):
        raise
    except Exception as error:  # every backend has its own
        raise StorageError(f"{where}: {reason(error)}") from None


def info(url: str) -> dict[str, Any] | None:
    """What fsspec knows of a file or folder; None where there is none. Raises StorageError if the place can't be reached.

    A backend's own `isfile` and `exists` take an outage for an absence.
    """
    filesystem, path = open_filesystem(url)
    try:
        return asked(lambda: filesystem.info(path), url)
    except FileNotFoundError:
        return None


def read_url(url: str, limit: int) -> bytes:
    """All bytes of a remote file. Raises DataError if there is none or it has more than `limit`, StorageError if the
    place can't be reached or refuses.
    """
    filesystem, path = open_filesystem(url)

    def action() -> bytes:
        with filesystem.open(path, "rb") as stream:
            return read_within(stream, url, limit)

    try:
        return asked(action, url)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None


def read_within(stream: BinaryIO, where: str, limit: int) -> bytes:
    """All bytes of a stream, in parts: `read(limit)` would take as much memory as that at once. Raises DataError."""
    parts: list[bytes] = []
    while part := stream.read(_PART):
        parts.append(part)
        if sum(map(len, parts)) > limit:
            raise DataError(f"{where}: can't be read: more than {limit} bytes")
    return b"".join(parts)


def fetch_ranges(base: str, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
    """Bytes of (file name below `base`, first, last exclusive), by concurrent requests; shorter where the file ends.

    A file that is not there is an error in its place. Raises StorageError if the store can't be reached or refuses:
    that says nothing about the samples, which must not count as broken. Only what failed is asked for again.
    """
    filesystem, root = open_filesystem(base)
    blocks: list[bytes | Exception] = [OSError("not asked for yet")] * len(wanted)

    def ask() -> None:
        failed = [i for i, block in enumerate(blocks) if _is_missing(block)]
        asked_for = [wanted[i] for i in failed]
        paths = [f"{root}/{name}" for name, _, _ in asked_for]
        starts, ends = [start for _, start, _ in asked_for], [end for _, _, end in asked_for]
        for i, block in zip(failed, filesystem.cat_ranges(paths, starts, ends, on_error="return"), strict=True):
            blocks[i] = block
        for block, (name, start, _) in zip(blocks, wanted, strict=True):
            if _is_missing(block) and filesystem.size(f"{root}/{name}") > start:
                raise block
        # What is left begins after the end of its file, which S3 calls an invalid request.
        blocks[:] = [b"" if _is_missing(block) else block for block in blocks]

    if wanted:
        try:
            asked(ask, base, PATIENT_ATTEMPTS)
        except StorageError as error:
            raise StorageError(f"{error}; no sample is lost by it: the same command goes on") from None
    return blocks


def _is_missing(block: bytes | Exception) -> TypeGuard[Exception]:
    return isinstance(block, Exception) and not isinstance(block, _ABSENT)
