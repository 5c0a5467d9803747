"""A local cache of samples that were read from remote shards: limited in size, shared by all processes of a machine.

```
<folder>/
    3f/3fa8...      the bytes of a sample; the name is made of the sha256 that the shard's index gives
    size            bytes that were written since the folder was last counted, and the lock of who counts or evicts
```
What lies here is never trusted: the reader checks it as it checks remote bytes. So an entry needs no fsync, and one that
was cut or changed is dropped and fetched anew.
"""

import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

_ROOM = 0.1
"""Share of the limit that an eviction makes free, so that it need not happen at each write."""
_SHARES = 1024
"""A process reports what it wrote once it is this part of the limit."""
_ABANDONED_SECONDS = 3600.0


class SampleCache:
    """Entries by hexadecimal name, the least recently used evicted above the limit. It can be pickled.

    Several processes may use one folder. They may exceed the limit, each by a 1024th of it, and by what they write
    while one of them evicts.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` in bytes. Raises ConfigError if the folder can't be written."""
        self.folder, self.limit = folder, limit
        self._unreported = 0
        self._complained = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "size").touch()
        except OSError as error:
            raise ConfigError(f"storage.cache: {folder} can't be written: {error}") from None

    def get(self, name: str) -> bytes | None:
        """An entry, which counts as used now; None where there is none."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keeps an entry, which appears as a whole. A full or broken disk costs the entry, not the run."""
        path = self._path(name)
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self._unreported += len(data)
            if self._unreported * _SHARES >= self.limit:
                self._report()
        except OSError as error:
            if not self._complained:
                logger.warning("storage.cache: %s: %s; going on without", self.folder, error)
            self._complained = True

    def drop(self, name: str) -> None:
        """Removes an entry that is not what its name says."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _report(self) -> None:
        """Adds what this process wrote to the sum of all; above the limit it evicts. Waits for nobody."""
        with (self.folder / "size").open("r+", encoding="ascii") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # the next write reports it
            text = stream.read()
            total = int(text) + self._unreported if text.isdecimal() else None  # a new or torn file: count
            if total is None or total > self.limit:
                total = self._evict()
            stream.seek(0)
            stream.truncate()
            stream.write(str(total))
            self._unreported = 0

    def _evict(self) -> int:
        """Counts the folder, and above the limit removes the oldest entries. What is left, in bytes."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        wanted = total if total <= self.limit else self.limit * (1 - _ROOM)
        for _, size, path in entries:
            if total <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of use, size and path of each; what a killed process left behind is removed."""
        for subfolder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(subfolder):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process dropped it
                    continue
                if not entry.name.startswith("."):
                    yield stat.st_mtime_ns, stat.st_size, Path(entry.path)
                elif stat.st_mtime < time.time() - _ABANDONED_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
