"""A store that goes away while it is read: the run stops and can go on, and no data counts as broken."""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from pipeline import remote
from pipeline.data import sharding
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.check import check
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource, resolve
from pipeline.data.images import read_bytes
from pipeline.data.loader import Item, MaeView, TrainSet, make_loader
from pipeline.data.order import Order
from pipeline.data.readers import files
from pipeline.data.shards import Sample, ShardSet, shard_name, write_shard
from pipeline.errors import DataError, StorageError
from tests.data.test_loader import INPUT, sample
from tests.faults.fixtures import raw_coco
from tests.s3 import BUCKET, S3Server

BASE = f"s3://{BUCKET}/shards"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


class Impatient(TrainSet):
    """Does not wait in a worker, either, which asks this test's server: the fork server may know that of an earlier one."""

    server: dict[str, str]

    def __getitems__(self, wanted: Sequence[int]) -> list[Item]:
        remote.time.sleep = lambda _: None
        os.environ.update(self.server)
        return super().__getitems__(wanted)


@pytest.mark.fault(32)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_outage_while_training_stops_with_one_line_and_breaks_no_sample(s3: S3Server, workers: int) -> None:
    write_shard(f"{BASE}/{shard_name(0)}", [sample(n) for n in range(8)])
    shards = ShardSet(BASE)
    data = Impatient(shards, Order(shards.dataset_of, 5), MaeView(INPUT, 12), 5)
    data.server = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    division = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "accumulation": 1}
    batches = iter(make_loader(data, start_step=0, steps=400, workers=workers, **division))
    assert next(batches)["weight"].tolist() == [1.0] * 4
    s3.stop()
    told, bad = "", []
    try:
        for batch in batches:  # those that were read ahead
            bad += batch["bad"]
    except StorageError as error:
        told = str(error)
    assert bad == []
    assert told.startswith(f"{BASE}: Could not connect") and told.endswith("the same command goes on")
    assert len(told.splitlines()) == 1


@pytest.mark.fault(18)
def test_a_cut_or_missing_shard_on_s3_still_costs_its_samples_only(s3: S3Server) -> None:
    for number in range(3):
        write_shard(f"{BASE}/{shard_name(number)}", [sample(n) for n in range(4 * number, 4 * number + 4)])
    shards = ShardSet(BASE)
    whole = s3.filesystem.cat_file(f"{BASE}/{shard_name(1)}")
    s3.filesystem.pipe_file(f"{BASE}/{shard_name(1)}", whole[: len(whole) // 2])
    s3.filesystem.rm_file(f"{BASE}/{shard_name(2)}")
    found = shards.read_many(range(12))
    kinds = [type(one) for one in found]
    assert kinds[:5] == [Sample] * 5 and kinds[7:] == [DataError] * 5
    assert "the shard is truncated" in str(found[7]) and "can't be read" in str(found[8])


@pytest.mark.fault(32)
def test_a_store_that_refuses_is_no_broken_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / shard_name(0), [sample(n) for n in range(4)])
    shards = ShardSet(f"file://{tmp_path}")
    filesystem, _ = remote.open_filesystem(shards.base)
    refused = [PermissionError("the token is expired")] * 4
    monkeypatch.setattr(type(filesystem), "cat_ranges", lambda *_, **__: refused)
    with pytest.raises(StorageError, match="the token is expired"):
        shards.read_many(range(4))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 that was never started."""
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    return server


@pytest.mark.fault(32)
def test_raw_data_out_of_reach_is_neither_absent_nor_broken(nobody: S3Server) -> None:
    for url in (f"s3://{BUCKET}/raw", f"http://127.0.0.1:{nobody.port}/raw"):
        for question in (files.is_file, files.is_folder, files.read_bytes, read_bytes, sharding._digest):
            with pytest.raises(StorageError, match=rf"^{url}/a: .*[Cc]onnect") as raised:
                question(f"{url}/a")
            assert len(str(raised.value).splitlines()) == 1
        with pytest.raises(StorageError, match=f"^{url}/coco"):
            resolve(DatasetSource(name="coco"), url)


@pytest.mark.fault(32)
def test_raw_data_that_a_store_refuses_is_neither_absent_nor_broken(
    nobody: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(StorageError, match="redentials"):
        files.is_file(f"s3://{BUCKET}/raw/a")


@pytest.mark.fault(32)
def test_what_is_not_there_is_told_from_what_is(s3: S3Server, tmp_path: Path) -> None:
    s3.filesystem.put(f"{raw_coco(tmp_path / 'raw')}/", f"{BUCKET}/raw/", recursive=True)
    url = f"s3://{BUCKET}/raw"
    found = resolve(DatasetSource(name="coco"), url)
    assert found.annotations.startswith(url) and files.is_folder(found.images) and found.truth is None
    assert not files.is_file(f"{url}/a") and not files.is_folder(f"{url}/a") and not files.is_file(found.images)
    for reading in (read_bytes, files.read_bytes):
        assert reading(found.annotations) == s3.filesystem.cat_file(found.annotations)
        with pytest.raises(DataError, match=f"^{url}/a: no such file"):
            reading(f"{url}/a")
    with pytest.raises(DataError, match="more than 5 bytes"):
        read_bytes(found.annotations, limit=5)
    s3.filesystem.rm_file(f"{found.images}/1.jpg")
    assert check(DatasetSource(name="coco"), url).missing_images == 1


@pytest.mark.slow
@pytest.mark.fault(32)
def test_an_outage_leaves_nobody_out_of_the_shards(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, url, work = raw_coco(tmp_path / "raw"), f"s3://{BUCKET}/raw", tmp_path / "work"
    settings = {"seed": 1, "samples_per_shard": 2, "measured_people": 0, "output": None, "workers": 1}
    read = sharding.read

    def make() -> sharding.ShardsReport:
        s3.filesystem.put(f"{raw}/", f"{BUCKET}/raw/", recursive=True)
        sources, crop = [DatasetSource(name="coco")], CropConfig(input_size=(64, 48))
        return sharding.make_shards(
            work, url, sources, [], crop, max_bad_fraction=1, augmentation=PoseAugmentation(), **settings
        )

    def read_and_stop(source: DatasetSource, root: str) -> sharding.Annotations:
        found = read(source, root)
        s3.stop()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "read", read_and_stop)
        with pytest.raises(StorageError, match=f"^{url}/coco/train2017/.*Could not connect"):
            make()
    for worker in multiprocessing.active_children():
        worker.join(30)
    assert not list(work.glob("report-*"))
    s3.start()
    report = make()
    assert (report.unreadable, report.samples["coco"]) == (0, 4)
