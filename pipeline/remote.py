"""Remote files by fsspec URL: opening a backend, and the one place where what failed is tried again."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import fsspec
from fsspec import AbstractFileSystem

from pipeline.artifacts import without_passwords
from pipeline.errors import ArtifactError, ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 3
_FINAL = (ArtifactError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The backend of an fsspec URL and the path on it. Asks nobody. Raises ConfigError if the backend can't be had.

    It remembers no listing: another machine may write there. Credentials are the backend's own business.
    """
    options = {"auto_mkdir": True} if url.startswith(("file://", "local://")) else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; for s3:// install vitruvian[s3]") from None
    except ValueError as error:
        raise ConfigError(f"{url}: not a URL that fsspec knows: {error}") from None
    return filesystem, path.rstrip("/")


def is_transient(error: object) -> bool:
    """True for a failure that may pass: an outage, not an absence and not a refusal."""
    return isinstance(error, Exception) and not isinstance(error, _FINAL)


def retried(action: Callable[[], T], what: str) -> T:
    """The action's result; it is tried again, a little later each time, where it failed for a reason that may pass.

    Backends retry single requests by themselves; this is for the outages that outlast them. Raises what the last
    attempt raised.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            logger.warning("%s: %s; trying again", what, reason(error))
            time.sleep(2**attempt)
    return action()


def reason(error: Exception) -> str:
    """The first line of what a backend raised, without the passwords of the addresses in it."""
    return without_passwords((str(error).splitlines() or [""])[0])[:200] or type(error).__name__


def fetch_ranges(base: str, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
    """Bytes of (file name below `base`, first, last exclusive), by concurrent requests; an error in its place.

    Only what failed is asked for again: an outage must not turn good samples into broken ones.
    """
    filesystem, root = open_filesystem(base)
    blocks: list[bytes | Exception] = [OSError("not asked for yet")] * len(wanted)

    def ask() -> None:
        failed = [i for i, block in enumerate(blocks) if is_transient(block)]
        asked = [wanted[i] for i in failed]
        paths = [f"{root}/{name}" for name, _, _ in asked]
        starts, ends = [start for _, start, _ in asked], [end for _, _, end in asked]
        for i, block in zip(failed, filesystem.cat_ranges(paths, starts, ends, on_error="return"), strict=True):
            blocks[i] = block
        for block in blocks:
            if is_transient(block):
                assert isinstance(block, Exception)
                raise block

    if wanted:
        with suppress(Exception):  # what still fails is in its place
            retried(ask, base)
    return blocks
