"""Shards on disk: deterministic bytes, positioned reads, every damage detected."""

import hashlib
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.data.shard_index import ShardIndex, index_path
from pipeline.data.shards import ShardSet, shard_name, write_shard
from pipeline.errors import DataError


def meta(dataset: str = "coco", number: int = 0) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "split": "train",
        "id": number,
        "image_id": f"im{number}",
        "keypoints": [(1.5, 2.25, 2.0), (0.1, 0.2, 0.0)],
        "bbox": (1.0, 2.0, 3.0, 4.0),
        "window": None,
        "crop": {"x": 0.5, "y": 0.0, "scale_x": 1.0, "scale_y": 1.0},
        "image_sha256": "0" * 64,
        "image_size": (640, 480),
        "max_input": (256, 192),
        "mode": "person",
    }


def samples(count: int, start: int = 0, datasets: tuple[str, ...] = ("mpii", "coco")) -> list[tuple[str, bytes, dict]]:
    rng = np.random.default_rng(start)
    return [
        (f"{datasets[n % len(datasets)]}-{n:04d}", rng.bytes(100 + 37 * n), meta(datasets[n % len(datasets)], n))
        for n in range(start, start + count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shard(tmp_path / shard_name(0), samples(5))
    write_shard(tmp_path / shard_name(1), samples(4, 5, ("aic", "coco")))
    return tmp_path


def test_every_sample_returns_as_it_was_written(folder: Path) -> None:
    shards = ShardSet(folder)
    assert len(shards) == 9
    assert shards.datasets == ["aic", "coco", "mpii"]
    names = [shards.datasets[d] for d in shards.dataset_of]
    assert names == ["mpii", "coco", "mpii", "coco", "mpii", "coco", "aic", "coco", "aic"]
    for index, (key, jpg, described) in enumerate(samples(5) + samples(4, 5, ("aic", "coco"))):
        sample = shards.read(index)
        assert (sample.key, sample.jpg) == (key, jpg)
        assert sample.meta == described
    assert shards.sizes.tolist() == [5, 4]
    with pytest.raises(IndexError):
        shards.read(9)


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name / "shard-000000.tar", samples(6))
    for file in ("shard-000000.tar", "shard-000000.index.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["shard-000000.index.safetensors", "shard-000000.tar"], "no temporary file is left"


def test_a_shard_is_a_plain_webdataset_tar_without_owner_or_time(folder: Path) -> None:
    with tarfile.open(folder / shard_name(0)) as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:2]] == ["mpii-0000.jpg", "mpii-0000.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        assert tar.extractfile(members[0]).read() == samples(1)[0][1]
    import webdataset

    read = list(webdataset.WebDataset(str(folder / shard_name(0)), shardshuffle=False))
    assert [item["__key__"] for item in read] == [key for key, *_ in samples(5)]
    assert json.loads(read[3]["json"])["id"] == 3


def test_the_index_holds_offsets_and_digests_of_the_tars_bytes(folder: Path) -> None:
    tar = (folder / shard_name(0)).read_bytes()
    place = index_path(folder / shard_name(0))
    index = ShardIndex.from_bytes(Path(place).read_bytes(), place)
    for row, (_, jpg, _) in enumerate(samples(5)):
        start, size = index.jpg_offset[row], index.jpg_size[row]
        assert tar[start : start + size] == jpg
        assert index.sha256[row, 0].tobytes() == hashlib.sha256(jpg).digest()
        start, size = index.json_offset[row], index.json_size[row]
        assert index.sha256[row, 1].tobytes() == hashlib.sha256(tar[start : start + size]).digest()
    assert index.dataset.dtype == np.int16
    assert [index.datasets[d] for d in index.dataset] == ["mpii", "coco", "mpii", "coco", "mpii"]


def test_a_flipped_byte_is_detected_by_shard_and_key_and_costs_only_its_sample(folder: Path) -> None:
    path = folder / shard_name(1)
    whole, index = path.read_bytes(), ShardSet(folder)
    for kind, column in (("jpg", "jpg_offset"), ("json", "json_offset")):
        offset = int(ShardIndex.from_bytes(Path(index_path(path)).read_bytes(), "x").__dict__[column][2])
        damaged = bytearray(whole)
        damaged[offset + 7] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"shard-000001\.tar: sample coco-0007\.{kind}: its bytes have changed"):
            ShardSet(folder).read(7)
        found = ShardSet(folder).read_many(range(9))
        assert [isinstance(item, DataError) for item in found] == [False] * 7 + [True, False]
    path.write_bytes(whole)
    assert index.read(7).key == "coco-0007"


@pytest.mark.fault(18)
def test_a_truncated_shard_still_counts_its_samples_and_names_the_lost_ones(folder: Path) -> None:
    path = folder / shard_name(0)
    path.write_bytes(path.read_bytes()[:3000])
    shards = ShardSet(folder)
    assert len(shards) == 9
    assert shards.read(0).key == "mpii-0000"
    with pytest.raises(DataError, match=r"shard-000000\.tar: sample mpii-0004\.jpg: the shard is truncated"):
        shards.read(4)
    path.write_bytes(b"")
    assert all(isinstance(item, DataError) for item in ShardSet(folder).read_many(range(5)))


@pytest.mark.fault(18)
def test_missing_shards_and_damaged_indexes_are_refused_at_once(folder: Path) -> None:
    place = Path(index_path(folder / shard_name(0)))
    whole = place.read_bytes()
    other_version = whole.replace(rb"\"schema_version\": 1", rb"\"schema_version\": 9")
    assert other_version != whole
    for damaged in (b"", whole[:40], whole[:-5], other_version):
        place.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shard-000000\.index\.safetensors"):
            ShardSet(folder)
    place.write_bytes(whole)
    (folder / shard_name(1)).unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar.*missing"):
        ShardSet(folder, [shard_name(0), shard_name(1)])
    assert len(ShardSet(folder, [shard_name(0)])) == 5
    with pytest.raises(DataError, match="no shards"):
        ShardSet(folder / "nowhere")


@pytest.mark.fault(20)
def test_an_index_of_another_shard_is_detected(folder: Path) -> None:
    swapped = [index_path(folder / shard_name(n)) for n in (1, 0)]
    shards = ShardSet(folder, [shard_name(0), shard_name(1)], swapped)
    assert all(isinstance(item, DataError) for item in shards.read_many(range(1, 4)))


def test_an_index_with_a_changed_dataset_is_detected(folder: Path) -> None:
    place = Path(index_path(folder / shard_name(0)))
    index = ShardIndex.from_bytes(place.read_bytes(), "x")
    changed = ShardIndex(**{**index.__dict__, "dataset": 1 - index.dataset})
    place.write_bytes(changed.to_bytes())
    with pytest.raises(DataError, match="its index says"):
        ShardSet(folder).read(0)


@pytest.mark.fault(20)
@pytest.mark.parametrize("key", ["", "../evil", "a.b", "a/b", "x" * 81, "é"])
def test_keys_that_could_leave_a_folder_or_confuse_a_reader_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        write_shard(tmp_path / "s.tar", [(key, b"x", meta())])
    assert not list(tmp_path.iterdir()), "a refused shard leaves nothing behind"


@pytest.mark.fault(20)
def test_duplicate_keys_bad_descriptions_and_empty_shards_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[list, str]] = [
        ([("a", b"x", meta()), ("a", b"y", meta())], "more than once"),
        ([("a", b"x", {**meta(), "bbox": (1.0, 2.0)})], "bbox"),
        ([("a", b"x", {**meta(), "bbox": (1.0, 2.0, float("nan"), 1.0)})], "bbox.2: Input should be a finite number"),
        ([("a", b"x", {k: v for k, v in meta().items() if k != "dataset"})], "dataset"),
        ([], "at least one"),
    ]
    for content, message in wrong:
        with pytest.raises(DataError, match=message):
            write_shard(tmp_path / "s.tar", content)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_the_old_shard_as_it_was(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted() -> Any:
        yield from samples(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(folder / shard_name(0), interrupted())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_shards_on_a_remote_store_read_as_local_ones_do(folder: Path) -> None:
    base = "memory://bucket/shards-a"
    for number, content in enumerate((samples(5), samples(4, 5, ("aic", "coco")))):
        write_shard(f"{base}/{shard_name(number)}", content)
    filesystem = fsspec.filesystem("memory")
    local = folder / shard_name(1)
    assert filesystem.cat_file("/bucket/shards-a/shard-000001.tar") == local.read_bytes()
    remote, here = ShardSet(base), ShardSet(folder)
    assert remote.read_many(range(9)) == here.read_many(range(9))
    filesystem.rm("/bucket/shards-a/shard-000001.tar")
    found = remote.read_many([0, 8])
    assert not isinstance(found[0], DataError)
    assert isinstance(found[1], DataError)


def test_a_passing_outage_of_a_remote_store_breaks_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "memory://bucket/shards-b"
    write_shard(f"{base}/{shard_name(0)}", samples(5))
    shards = ShardSet(base)
    filesystem = fsspec.filesystem("memory")
    real, calls = filesystem.cat_ranges, []

    def flaky(paths: list, starts: list, ends: list, **options: Any) -> list:
        calls.append(len(paths))
        found = real(paths, starts, ends, **options)
        return [OSError("reset"), *found[1:]] if len(calls) == 1 else found

    monkeypatch.setattr(type(filesystem), "cat_ranges", staticmethod(flaky))
    monkeypatch.setattr("pipeline.remote.time.sleep", lambda seconds: None)
    assert [sample.key for sample in shards.read_many(range(5))] == [key for key, *_ in samples(5)]
    assert calls == [5, 1], "only what failed is asked for again"


def test_a_shard_set_travels_to_another_process(folder: Path) -> None:
    shards = ShardSet(folder)
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301 - what a data loader does with its own objects
    assert copy.read(8) == shards.read(8)
