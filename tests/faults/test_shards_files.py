"""Broken and hostile shards. Reading goes by the index alone; what single damages cost is in tests/data/test_shards.py."""

import io
import os
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.artifacts import Artifact
from pipeline.data.collection import open_shards
from pipeline.data.loader import MaeView, TrainSet, make_loader
from pipeline.data.order import Order
from pipeline.data.shard_index import ShardIndex, index_path
from pipeline.data.shards import ShardSet, shard_name, write_shard
from pipeline.errors import ArtifactError, DataError, VitruvianError
from tests.data.test_shards import samples
from tests.faults.fixtures import change_json, publish_shards, republish

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """6 samples in shards of 2."""
    return publish_shards(tmp_path_factory.mktemp("sound") / "artifact", images=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard of 5 samples with its index."""
    write_shard(tmp_path / shard_name(0), samples(5))
    return tmp_path


def truncated(tar: Path) -> None:
    os.truncate(tar, 1000)


def garbage_header(tar: Path) -> None:
    tar.write_bytes(b"\xff" * 512 + tar.read_bytes()[512:])


def empty_tar(tar: Path) -> None:
    with tarfile.open(tar, "w"):
        pass


def zero_bytes(tar: Path) -> None:
    tar.write_bytes(b"")


# how many of the shard's two samples are lost
DAMAGES: dict[str, tuple[Callable[[Path], None], int]] = {
    "truncated": (truncated, 2),
    "empty tar": (empty_tar, 2),
    "zero bytes": (zero_bytes, 2),
    "garbage header": (garbage_header, 0),
}


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_tar_costs_its_samples_and_neither_order_nor_time(
    sound: Artifact, tmp_path: Path, name: str, workers: int
) -> None:
    """The epoch's length comes from the index, each lost sample keeps its slot with weight 0 and is named, and both of
    two ranks get as many batches: nobody waits for anybody."""
    damage, lost = DAMAGES[name]
    # An artifact's tars are large: they are not hashed when it is opened, but each sample is when it is read.
    artifact = republish(sound, tmp_path / "artifact", lambda staged: damage(staged / "shards" / shard_name(1)))
    collection = open_shards(artifact)
    assert len(collection.shards) == 6 and collection.counts() == {"coco": 6}
    order = Order(collection.shards.dataset_of, seed=1)
    assert order.epoch_length == 6
    data = TrainSet(collection.shards, order, MaeView((16, 16), 4), seed=1)
    seen, bad, weights = [], [], 0.0
    for rank in (0, 1):
        division = {"rank": rank, "world_size": 2, "accumulation": 1, "workers": workers}
        batches = list(make_loader(data, start_step=0, steps=3, global_batch=2, micro_batch=1, **division))
        assert len(batches) == 3
        seen += [name for batch in batches for name in batch["ids"]]
        bad += [fault for batch in batches for fault in batch["bad"]]
        weights += sum(float(batch["weight"].sum()) for batch in batches)
    assert len(set(seen)) == 6 and len(bad) == lost and weights == 6 - lost
    assert all(shard_name(1) in fault and "sample coco_" in fault and "\n" not in fault for fault in bad)


@pytest.mark.fault(18)
def test_a_missing_shard_is_refused_and_an_extra_one_is_no_part_of_the_data(sound: Artifact, tmp_path: Path) -> None:
    """What the description names must be there; what it does not name is not read."""

    def remove(staged: Path) -> None:
        (staged / "shards" / shard_name(2)).unlink()

    with pytest.raises(DataError, match=r"shard-000002\.tar: the shard is missing"):
        open_shards(republish(sound, tmp_path / "missing", remove))

    def add(staged: Path) -> None:
        write_shard(staged / "shards" / shard_name(7), samples(5))

    assert len(open_shards(republish(sound, tmp_path / "extra", add)).shards) == 6


# 20: hostile tars, and hostile indexes


def evil_members() -> list[tarfile.TarInfo]:
    found = []
    for name, kind, target in [
        ("../evil", tarfile.REGTYPE, ""),
        ("/tmp/evil-absolute", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard", tarfile.LNKTYPE, "../../evil"),
        ("device", tarfile.CHRTYPE, ""),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("twice.jpg", tarfile.REGTYPE, ""),
        ("twice.jpg", tarfile.REGTYPE, ""),
    ]:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        found.append(member)
    return found


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.fault(20)
def test_only_its_own_tars_are_ever_opened_as_tars() -> None:
    """One place opens a tar, to index what was written a moment before, and nothing extracts anything: names, links and
    devices in a foreign tar mean nothing to this program."""
    sources = [path for part in ("pipeline", "stages", "launchers") for path in (ROOT / part).rglob("*.py")]
    opened = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"tarfile\.open|TarFile\(|unpack_archive|\.extract(all|file)?\(|WebDataset\(|ShardReader", line)
    ]
    assert opened == ['pipeline/data/shards.py: with tarfile.open(path, "r:") as tar:']


@pytest.mark.fault(20)
def test_a_tar_of_evil_members_writes_nothing_and_its_samples_are_lost_by_digest(folder: Path) -> None:
    """In the place of a shard: every sample is refused, in seconds, and no file is made, inside or outside."""
    with tarfile.open(folder / shard_name(0), "w") as tar:
        for member in evil_members():
            tar.addfile(member, io.BytesIO(b""))
    before = snapshot(folder.parent)
    started = time.process_time()
    found = ShardSet(folder).read_many(range(5))
    assert all(isinstance(one, DataError) and "\n" not in str(one) for one in found)
    assert time.process_time() - started < 5
    assert snapshot(folder.parent) == before and not Path("/tmp/evil-absolute").exists()


@pytest.mark.fault(20)
def test_evil_members_beside_the_samples_are_not_looked_at(folder: Path) -> None:
    """A hundred thousand more members, links and devices among them: the samples read as before, as quickly."""
    path = folder / shard_name(0)
    wanted = ShardSet(folder).read_many(range(5))
    header = b"".join(member.tobuf() for member in evil_members())
    with path.open("ab") as stream:
        stream.write(header * (100_000 // len(evil_members())))
    started = time.process_time()
    assert ShardSet(folder).read_many(range(5)) == wanted
    assert time.process_time() - started < 5


@pytest.mark.fault(20)
def test_tars_without_an_index_are_refused(folder: Path) -> None:
    """Somebody else's WebDataset is not scanned for what might be a sample."""
    Path(index_path(folder / shard_name(0))).unlink()
    with pytest.raises(DataError, match=r"shard-000000\.index\.safetensors: no such file"):
        ShardSet(folder)


def changed(index: ShardIndex, **columns: np.ndarray | list[str]) -> bytes:
    return ShardIndex(**{**index.__dict__, **columns}).to_bytes()


def moved(index: ShardIndex, column: str, row: int, value: int) -> bytes:
    values = getattr(index, column).copy()
    values[row] = value
    return changed(index, **{column: values})


def raw(index: ShardIndex, **changes: Any) -> bytes:
    arrays = {name: value for name, value in index.__dict__.items() if name != "datasets"} | changes
    return safetensors.numpy.save(
        {name: value for name, value in arrays.items() if value is not None}, {"index": ABOUT}
    )


ABOUT = '{"schema_version": 1, "datasets": ["coco", "mpii"]}'
GIB = 1 << 30
INDEXES: dict[str, Callable[[ShardIndex], bytes]] = {
    "negative offset": lambda index: moved(index, "jpg_offset", 1, -1),
    "offset of exabytes": lambda index: moved(index, "jpg_offset", 4, 1 << 62),
    "both offsets of exabytes": lambda index: changed(
        index, jpg_offset=index.jpg_offset + (1 << 61), json_offset=index.json_offset + (1 << 61)
    ),
    "offset and size that overflow": lambda index: moved(index, "json_offset", 4, (1 << 63) - 1),
    "members a terabyte apart": lambda index: moved(index, "json_offset", 4, 1 << 40),
    "size of 2 GB": lambda index: moved(index, "jpg_size", 4, 2 * GIB),
    "size of nothing": lambda index: moved(index, "json_size", 2, 0),
    "negative size": lambda index: moved(index, "json_size", 2, -5),
    "overlapping members": lambda index: moved(
        index, "jpg_size", 0, int(index.json_offset[0] - index.jpg_offset[0]) + 1
    ),
    "a sample twice": lambda index: changed(
        index,
        **{
            name: np.repeat(getattr(index, name)[:1], 5, axis=0)
            for name in ("jpg_offset", "jpg_size", "json_offset", "json_size")
        },
    ),
    "float offsets": lambda index: raw(index, jpg_offset=index.jpg_offset.astype(np.float64)),
    "int32 offsets": lambda index: raw(index, jpg_offset=index.jpg_offset.astype(np.int32)),
    "one row less": lambda index: raw(index, sha256=index.sha256[:-1]),
    "a column less": lambda index: raw(index, sha256=None),
    "no rows but one number": lambda index: raw(index, jpg_offset=np.array(5)),
    "dataset out of range": lambda index: changed(index, dataset=index.dataset + 2),
    "negative dataset": lambda index: changed(index, dataset=index.dataset - 1),
    "dataset names that are none": lambda index: changed(index, datasets=[1, 2]),  # type: ignore[list-item]
    "dataset names twice": lambda index: changed(index, datasets=["coco", "coco"]),
    "dataset names that are a text": lambda index: changed(index, datasets="coco"),  # type: ignore[arg-type]
    "keys with control characters": lambda index: changed(index, key=np.full_like(index.key, 10)),
    "a pickled npz": lambda index: npz(),
    "a pickle": lambda index: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
    "a header of petabytes": lambda index: (1 << 60).to_bytes(8, "little") + b"{}",
    "a header without end": lambda index: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a description nested without end": lambda index: deep(index),
    "no description": lambda index: safetensors.numpy.save({"jpg_offset": index.jpg_offset}),
    "zero bytes": lambda index: b"",
}


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, jpg_offset=np.array([object()], dtype=object))
    return stream.getvalue()


def deep(index: ShardIndex) -> bytes:
    arrays = {name: value for name, value in index.__dict__.items() if name != "datasets"}
    return safetensors.numpy.save(arrays, {"index": "[" * 100_000})


@pytest.mark.fault(20)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_was_tampered_with_is_refused_at_once(folder: Path, name: str) -> None:
    """Offsets, sizes, types, numbers, names, a pickle: refused when the shards are opened, in one line, at once."""
    place = Path(index_path(folder / shard_name(0)))
    index = ShardIndex.from_bytes(place.read_bytes(), str(place))
    place.write_bytes(INDEXES[name](index))
    started = time.process_time()
    with pytest.raises(DataError, match=r"shard-000000\.index\.safetensors: no valid shard index") as caught:
        ShardSet(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - started < 5


@pytest.mark.fault(20)
def test_an_index_that_points_beyond_its_tar_loses_its_samples_and_no_more(folder: Path) -> None:
    """Beyond the end of the file nothing is read: the sample is named as truncated, and memory is not asked for."""
    place = Path(index_path(folder / shard_name(0)))
    index = ShardIndex.from_bytes(place.read_bytes(), str(place))
    far = {name: getattr(index, name).copy() for name in ("jpg_offset", "json_offset")}
    for values in far.values():
        values[4] += 1 << 43
    place.write_bytes(changed(index, **far))
    found = ShardSet(folder).read_many(range(5))
    assert [isinstance(one, DataError) for one in found] == [False] * 4 + [True]
    assert "the shard is truncated" in str(found[4])


@pytest.mark.fault(20)
def test_a_sparse_tar_of_2_gb_is_read_by_place(folder: Path) -> None:
    """The size of a tar costs nothing, nor does that of its last member."""
    wanted = ShardSet(folder).read_many(range(5))
    os.truncate(folder / shard_name(0), 2 * GIB)
    started = time.process_time()
    assert ShardSet(folder).read_many(range(5)) == wanted
    assert time.process_time() - started < 5


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "changes",
    [
        {"base": "../.."},
        {"base": "/tmp"},
        {"base": "shards/../../x"},
        {"shards": ["../shard-000000.tar"]},
        {"shards": ["/etc/passwd"]},
        {"shards": []},
        {"shards": "shard-000000.tar"},
        {"samples": {"coco": 7}},
        {"samples": {"coco": 6, "mpii": 1}},
        {"datasets": {}},
        {"mode": "whatever"},
        {"max_input": [64]},
        {"more": 1},
        {"lost_pixels": "none"},
    ],
)
def test_a_description_of_shards_that_lies_is_refused(sound: Artifact, tmp_path: Path, changes: dict[str, Any]) -> None:
    """No place outside the artifact, no other names, no other numbers than the indexes hold: one line each."""
    artifact = republish(sound, tmp_path / "a", lambda staged: change_json(staged / "shards.json", **changes))
    with pytest.raises(ArtifactError, match=r"shards\.json") as caught:
        open_shards(artifact)
    assert "\n" not in str(caught.value) and isinstance(caught.value, VitruvianError)


@pytest.mark.fault(20)
@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\x00"])
def test_a_description_of_shards_that_is_none_is_refused(sound: Artifact, tmp_path: Path, text: str) -> None:
    """Whatever the file holds."""
    artifact = republish(sound, tmp_path / "a", lambda staged: (staged / "shards.json").write_text(text) and None)
    with pytest.raises(ArtifactError, match=r"shards\.json"):
        open_shards(artifact)
