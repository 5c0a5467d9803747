"""A store that goes away while it is read: the run stops and can go on, and no data counts as broken."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import remote
from pipeline.data.loader import Item, MaeView, TrainSet, make_loader
from pipeline.data.order import Order
from pipeline.data.shards import Sample, ShardSet, shard_name, write_shard
from pipeline.errors import DataError, StorageError
from tests.data.test_loader import INPUT, sample
from tests.s3 import BUCKET, S3Server

BASE = f"s3://{BUCKET}/shards"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


class Impatient(TrainSet):
    """Does not wait in a worker, either."""

    def __getitems__(self, wanted: Sequence[int]) -> list[Item]:
        remote.time.sleep = lambda _: None
        return super().__getitems__(wanted)


@pytest.mark.fault(32)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_outage_while_training_stops_with_one_line_and_breaks_no_sample(s3: S3Server, workers: int) -> None:
    write_shard(f"{BASE}/{shard_name(0)}", [sample(n) for n in range(8)])
    shards = ShardSet(BASE)
    data = Impatient(shards, Order(shards.dataset_of, 5), MaeView(INPUT, 12), 5)
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
