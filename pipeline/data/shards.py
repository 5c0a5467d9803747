"""Shards: WebDataset tars with an index beside each, so that any sample is one positioned read.

A sample is two members, `key.jpg` and `key.json`. The index holds, for each, where its bytes lie and their sha256,
which is checked whenever they are read. Nothing is ever extracted.
"""

import hashlib
import json
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError
from webdataset.writer import TarWriter

from pipeline.data.cache import SampleCache
from pipeline.data.images import read_bytes
from pipeline.data.shard_index import COLUMNS, KEY_LENGTH, SampleMeta, ShardIndex, index_path
from pipeline.errors import DataError, StorageError
from pipeline.files import fsync_directory
from pipeline.remote import asked, fetch_ranges, open_filesystem, reason

_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LENGTH}}}")
_META = TypeAdapter(SampleMeta)
_OPEN_FILES = 256


class Sample(NamedTuple):
    """A stored sample, as it was read and checked."""

    key: str
    jpg: bytes
    meta: SampleMeta


def shard_name(number: int) -> str:
    """`shard-000000.tar`, ..."""
    return f"shard-{number:06d}.tar"


def write_shard(path_or_url: str | Path, samples: Iterable[tuple[str, bytes, Mapping[str, Any]]]) -> ShardIndex:
    """Writes a shard of (key, jpg bytes, meta) and its index: the same samples make the same bytes.

    Both appear as one step each, the index last, so an index beside a shard means that the shard is complete. On a
    remote store they are uploaded from a local temporary file. Raises DataError for a key or a meta that is not
    valid, and for a shard without samples.
    """
    target = str(path_or_url)
    described: list[tuple[str, str, bytes, bytes]] = []

    def write(stream: BinaryIO) -> None:
        with TarWriter(stream, user="", group="", encoder=False, mtime=0) as writer:
            for key, jpg, meta in samples:
                encoded = _encoded_meta(meta, f"{target}: {key}")
                if not _KEY.fullmatch(key):
                    raise DataError(f"{target}: key {key!r}: expected 1 to 80 letters, digits, '_' or '-'")
                writer.write({"__key__": key, "jpg": jpg, "json": encoded})
                digests = hashlib.sha256(jpg).digest(), hashlib.sha256(encoded).digest()
                described.append((key, meta["dataset"], *digests))

    def indexed(path: Path) -> ShardIndex:
        return _index(path, target, described)

    if "://" in target:
        return _write_remote(target, write, indexed)
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(final) as temporary:
        with temporary.open("xb") as stream:
            write(stream)
        index = indexed(temporary)
    with _replacing(Path(index_path(final))) as temporary:
        temporary.write_bytes(index.to_bytes())
    return index


class ShardSet:
    """Shards opened for reading at random, from a folder or an fsspec URL.

    It can be pickled: a process opens its own files. `datasets` are the names in it, sorted; `dataset_of` (N,) int16
    is each sample's place among them. Samples are numbered through the shards in the order given.
    """

    def __init__(
        self,
        base: str | Path,
        shards: Sequence[str] | None = None,
        indexes: Sequence[str | Path] | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        """`shards`: names of the tars; unset, all of the folder. `indexes`: their index files where not beside them.
        `cache` keeps what was read from a remote store.

        Raises DataError for a missing shard or a damaged index.
        """
        self.base = str(base).rstrip("/")
        self._cache = cache if self._remote else None
        self.names = list(shards) if shards is not None else self._listed()
        if not self.names:
            raise DataError(f"{self.base}: no shards; run the shards stage first")
        places = [self._path(index_path(name)) for name in self.names] if indexes is None else list(map(str, indexes))
        if len(places) != len(self.names):
            raise DataError(f"{self.base}: {len(self.names)} shards, but {len(places)} index files")
        found = [ShardIndex.from_bytes(read_bytes(place), place) for place in places]
        self.datasets = sorted({name for index in found for name in index.datasets})
        self.sizes = np.array([len(index) for index in found], np.int64)
        self.dataset_of = np.concatenate([self._renumbered(index) for index in found])
        self._ends = np.cumsum(self.sizes)
        self._columns = {name: np.concatenate([getattr(index, name) for index in found]) for name in COLUMNS}
        self._files: dict[str, int] = {}
        for name in self.names if not self._remote else ():
            if not Path(self._path(name)).is_file():
                raise DataError(f"{self._path(name)}: the shard is missing, its index is there; make the shards anew")

    def __len__(self) -> int:
        return len(self.dataset_of)

    def read(self, index: int) -> Sample:
        """One sample, its digests checked. Raises DataError naming shard and key if it is not as it was written.

        Raises StorageError as `read_many` does.
        """
        sample = self.read_many([index])[0]
        if isinstance(sample, DataError):
            raise sample
        return sample

    def read_many(self, indices: Sequence[int]) -> list[Sample | DataError]:
        """Several samples, from a remote store concurrently. A broken one is a DataError in its place.

        Raises StorageError if the store can't be reached: no sample is broken by that.
        """
        if any(not 0 <= index < len(self) for index in indices):
            raise IndexError(f"indices {list(indices)} of {len(self)} samples")
        found = {index: sample for index in indices if (sample := self._cached(index)) is not None}
        missing = [index for index in indices if index not in found]
        spans = [self._span(index) for index in missing]
        wanted = [(self._shard_of(index), *span) for index, span in zip(missing, spans, strict=True)]
        blocks = fetch_ranges(self.base, wanted) if self._remote else self._fetch_local(wanted)
        found |= {item[0]: self._sample(*item) for item in zip(missing, spans, blocks, strict=True)}
        return [found[index] for index in indices]

    def key(self, index: int) -> str:
        """The sample's key, as far as the index knows."""
        return self._columns["key"][index].tobytes().rstrip(b"\0").decode("ascii", "replace")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)

    @property
    def _remote(self) -> bool:
        return "://" in self.base

    def _listed(self) -> list[str]:
        if not self._remote:
            return sorted(path.name for path in Path(self.base).glob("shard-*.tar"))
        filesystem, root = open_filesystem(self.base)
        found = asked(lambda: filesystem.glob(f"{root}/shard-*.tar"), self.base)
        return sorted(Path(name).name for name in found)

    def _path(self, name: str) -> str:
        return f"{self.base}/{name}"

    def _renumbered(self, index: ShardIndex) -> np.ndarray:
        numbers = np.array([self.datasets.index(name) for name in index.datasets], np.int16)
        return numbers[index.dataset] if len(index) else np.zeros(0, np.int16)

    def _shard_of(self, index: int) -> str:
        return self.names[int(np.searchsorted(self._ends, index, side="right"))]

    def _span(self, index: int) -> tuple[int, int]:
        """First and last byte (exclusive) that hold both members: they lie next to each other."""
        columns = self._columns
        start = min(int(columns["jpg_offset"][index]), int(columns["json_offset"][index]))
        ends = (int(columns[f"{kind}_offset"][index] + columns[f"{kind}_size"][index]) for kind in ("jpg", "json"))
        return start, max(ends)

    def _fetch_local(self, wanted: list[tuple[str, int, int]]) -> list[bytes | Exception]:
        blocks: list[bytes | Exception] = []
        for name, start, end in wanted:
            try:
                blocks.append(os.pread(self._file(name), end - start, start))
            except OSError as error:
                blocks.append(error)
        return blocks

    def _file(self, name: str) -> int:
        if name not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self._path(name), os.O_RDONLY)
        return self._files[name]

    def _sample(self, index: int, span: tuple[int, int], block: bytes | Exception) -> Sample | DataError:
        key, where = self.key(index), self._path(self._shard_of(index))
        if isinstance(block, Exception):
            return DataError(f"{where}: sample {key}: can't be read: {block}")
        parts = []
        for kind in ("jpg", "json"):
            offset = int(self._columns[f"{kind}_offset"][index]) - span[0]
            parts.append(block[offset : offset + int(self._columns[f"{kind}_size"][index])])
        for part, kind, expected in zip(parts, ("jpg", "json"), self._columns["sha256"][index], strict=True):
            if hashlib.sha256(part).digest() != expected.tobytes():
                cut = "the shard is truncated" if len(block) < span[1] - span[0] else "its bytes have changed"
                return DataError(f"{where}: sample {key}.{kind}: {cut}; make the shards anew")
        if self._cache is not None:
            self._cache.put(self._cache_name(index), b"".join(parts))
        return self._checked(index, *parts)

    def _cache_name(self, index: int) -> str:
        """Of the jpg and the json together, from the digests in the index."""
        return hashlib.sha256(self._columns["sha256"][index].tobytes()).hexdigest()

    def _cached(self, index: int) -> Sample | None:
        """A sample from the cache, its digests checked; an entry that is damaged is dropped."""
        if self._cache is None:
            return None
        name, cut = self._cache_name(index), int(self._columns["jpg_size"][index])
        data = self._cache.get(name)
        if data is None:
            return None
        parts = data[:cut], data[cut:]
        if b"".join(hashlib.sha256(part).digest() for part in parts) != self._columns["sha256"][index].tobytes():
            self._cache.drop(name)
            return None
        sample = self._checked(index, *parts)
        return None if isinstance(sample, DataError) else sample

    def _checked(self, index: int, jpg: bytes, sidecar: bytes) -> Sample | DataError:
        """A sample of bytes that fit their digests, if its description is one, and of the dataset of the index."""
        key, where = self.key(index), self._path(self._shard_of(index))
        try:
            meta = _META.validate_json(sidecar)
        except ValidationError as error:
            return DataError(f"{where}: sample {key}.json: {_first_mistake(error)}")
        if meta["dataset"] != self.datasets[self.dataset_of[index]]:
            expected = self.datasets[self.dataset_of[index]]
            return DataError(f"{where}: sample {key}: from {meta['dataset']!r}, its index says {expected!r}")
        return Sample(key, jpg, meta)


def _first_mistake(error: ValidationError) -> str:
    mistake = error.errors()[0]
    return f"{'.'.join(map(str, mistake['loc'])) or 'JSON'}: {mistake['msg']}"


def _encoded_meta(meta: Mapping[str, Any], where: str) -> bytes:
    try:
        valid = _META.validate_python(dict(meta))
    except ValidationError as error:
        raise DataError(f"{where}: {_first_mistake(error)}") from None
    return json.dumps(valid, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _index(path: Path, where: str, described: list[tuple[str, str, bytes, bytes]]) -> ShardIndex:
    """Reads the headers of a finished tar back: what is indexed is what lies there."""
    if not described:
        raise DataError(f"{where}: a shard needs at least one sample")
    with tarfile.open(path, "r:") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar if member.isreg()}
    if len(places) != 2 * len(described):
        keys = [key for key, *_ in described]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise DataError(f"{where}: key {twice[0]!r} is there more than once")
    datasets = sorted({dataset for _, dataset, _, _ in described})
    jpg = np.array([places[f"{key}.jpg"] for key, *_ in described], np.int64)
    sidecar = np.array([places[f"{key}.json"] for key, *_ in described], np.int64)
    return ShardIndex(
        datasets=datasets,
        jpg_offset=jpg[:, 0],
        jpg_size=jpg[:, 1],
        json_offset=sidecar[:, 0],
        json_size=sidecar[:, 1],
        dataset=np.array([datasets.index(dataset) for _, dataset, _, _ in described], np.int16),
        sha256=np.frombuffer(b"".join(a + b for *_, a, b in described), np.uint8).reshape(-1, 2, 32),
        key=np.frombuffer(b"".join(key.encode().ljust(KEY_LENGTH, b"\0") for key, *_ in described), np.uint8).reshape(
            -1, KEY_LENGTH
        ),
    )


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A temporary path beside `final` that takes its place, durably, when the block ends without an error."""
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(final)
        fsync_directory(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _write_remote(target: str, write: Callable[[BinaryIO], None], indexed: Callable[[Path], ShardIndex]) -> ShardIndex:
    filesystem, place = open_filesystem(target)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        with local.open("wb") as stream:
            write(stream)
        index = indexed(local)
        try:
            asked(lambda: filesystem.put_file(str(local), place), target)
            asked(lambda: filesystem.pipe_file(index_path(place), index.to_bytes()), target)
        except FileNotFoundError as error:
            raise StorageError(f"{target}: can't be written: {reason(error)}") from None
    return index
