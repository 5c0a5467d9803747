"""The cache of remote samples: never above its limit for long, never trusted, shared by processes."""

import hashlib
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.data.cache import SampleCache
from pipeline.data.shards import ShardSet, shard_name, write_shard
from pipeline.errors import ConfigError, DataError
from tests.data.test_shards import samples

KB = 1000


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in entries(folder))


def test_what_was_put_comes_back_from_a_subfolder(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path / "cache", 100 * KB)
    assert cache.get(name(1)) is None
    cache.put(name(1), b"one")
    assert cache.get(name(1)) == b"one"
    assert [str(path.relative_to(tmp_path / "cache")) for path in entries(tmp_path / "cache")] == [
        f"{name(1)[:2]}/{name(1)}"
    ]
    cache.drop(name(1))
    cache.drop(name(1))
    assert cache.get(name(1)) is None


def test_above_the_limit_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 100 * KB)
    for number in range(10):
        cache.put(name(number), bytes(10 * KB))
        os.utime(tmp_path / name(number)[:2] / name(number), (number + 1, number + 1))
    assert all((tmp_path / name(number)[:2] / name(number)).is_file() for number in range(10)), "within the limit"
    assert cache.get(name(0)) is not None, "now the most recently used"
    cache.put(name(10), bytes(10 * KB))
    there = [number for number in range(11) if (tmp_path / name(number)[:2] / name(number)).is_file()]
    assert there == [0, 3, 4, 5, 6, 7, 8, 9, 10], "a tenth of the limit was made free"
    assert size(tmp_path) <= 90 * KB


def test_the_size_is_counted_again_where_the_record_of_it_was_lost(tmp_path: Path) -> None:
    for number in range(30):
        SampleCache(tmp_path, 1000 * KB).put(name(number), bytes(10 * KB))
    (tmp_path / "size").write_text("")
    SampleCache(tmp_path, 100 * KB).put(name(30), bytes(10 * KB))
    assert 80 * KB <= size(tmp_path) <= 90 * KB
    assert int((tmp_path / "size").read_text()) == size(tmp_path)


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, 10 * KB)
    cache.put(name(0), bytes(KB))
    old, new = (tmp_path / name(0)[:2] / f".{name(0)}.{ending}" for ending in ("old", "new"))
    for path in (old, new):
        path.write_bytes(bytes(KB))
    os.utime(old, (time.time() - 7200,) * 2)
    for number in range(1, 20):
        cache.put(name(number), bytes(KB))
    assert new.exists() and not old.exists()


def test_a_full_disk_costs_the_entry_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    cache = SampleCache(tmp_path, 100 * KB)
    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put(name(1), b"one")
    cache.put(name(2), b"two")
    assert cache.get(name(1)) is None
    [record] = caplog.records
    assert "No space left" in record.getMessage() and "going on without" in record.getMessage()


def test_a_folder_that_is_none_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"storage\.cache: .*file/cache can't be written"):
        SampleCache(tmp_path / "file" / "cache", KB)


def _write(cache: SampleCache, first: int) -> None:
    for number in range(first, first + 300):
        cache.put(name(number), str(number).encode() * 100)
        found = cache.get(name(number))
        assert found in (None, str(number).encode() * 100), "half an entry"


def test_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    limit = 50 * KB
    cache = SampleCache(tmp_path, limit)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(cache, first)) for first in (0, 200, 5000)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache.put(name(9999), b"x" * 100)
    assert 0 < size(tmp_path) <= limit * 1.25
    assert not [path for path in tmp_path.rglob(".*")]


class Counted:
    """How many ranges were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        filesystem = fsspec.filesystem("memory")
        real = filesystem.cat_ranges
        self.asked = 0

        def counting(paths: list, *rest: Any, **options: Any) -> list:
            self.asked += len(paths)
            return real(paths, *rest, **options)

        monkeypatch.setattr(type(filesystem), "cat_ranges", staticmethod(counting))


@pytest.fixture
def base(tmp_path: Path) -> str:
    """Five samples on a remote store."""
    url = f"memory://cache/{tmp_path.name}"
    write_shard(f"{url}/{shard_name(0)}", samples(5))
    return url


def test_a_sample_is_fetched_once(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    plain = ShardSet(base).read_many(range(5))
    shards = ShardSet(base, cache=SampleCache(tmp_path / "cache", 100 * KB))
    assert shards.read_many([0, 1]) == plain[:2]
    assert counted.asked == 5 + 2
    assert shards.read_many([1, 4, 0, 1]) == [plain[1], plain[4], plain[0], plain[1]]
    assert counted.asked == 5 + 2 + 1, "only what is not there"
    other = pickle.loads(pickle.dumps(shards))  # noqa: S301 - what a data loader does with its own objects
    assert other.read(4) == plain[4] and counted.asked == 8
    assert len(entries(tmp_path / "cache")) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_dropped_and_fetched_anew(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    counted = Counted(monkeypatch)
    shards = ShardSet(base, cache=SampleCache(tmp_path / "cache", 100 * KB))
    whole = shards.read(3)
    [entry] = entries(tmp_path / "cache")
    good = entry.read_bytes()
    bad = {"flip": good[:50] + bytes([good[50] ^ 1]) + good[51:], "cut": good[:-1], "empty": b""}
    entry.write_bytes(bad[damage])
    assert shards.read(3) == whole
    assert counted.asked == 2 and entry.read_bytes() == good
    assert shards.read(3) == whole and counted.asked == 2


def test_damaged_remote_bytes_never_enter_the_cache(base: str, tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    path = f"{base.removeprefix('memory://')}/{shard_name(0)}"
    tar = filesystem.cat_file(path)
    shards = ShardSet(base, cache=SampleCache(tmp_path / "cache", 100 * KB))
    filesystem.pipe_file(path, tar[:600] + bytes([tar[600] ^ 1]) + tar[601:])
    found = shards.read_many([0, 1])
    assert isinstance(found[0], DataError) and "its bytes have changed" in str(found[0])
    assert len(entries(tmp_path / "cache")) == 1


def test_local_shards_are_not_cached(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(0), samples(2))
    ShardSet(tmp_path, cache=SampleCache(tmp_path / "cache", 100 * KB)).read(0)
    assert not entries(tmp_path / "cache")
