"""Batches: their content, and that nothing about them depends on who makes them or from where."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.definitions import load_definition
from pipeline.data.images import encode_jpeg
from pipeline.data.loader import Loader, MaeView, PoseView, TrainSet, make_loader
from pipeline.data.order import Order
from pipeline.data.shard_index import ShardIndex, index_path
from pipeline.data.shards import ShardSet, shard_name, write_shard
from pipeline.errors import ConfigError, StorageError

DEFINITIONS = {name: load_definition(name) for name in ("coco", "mpii", "crowdpose")}
NAMES = sorted(DEFINITIONS)
INPUT = (64, 48)


def sample(number: int) -> tuple[str, bytes, dict[str, Any]]:
    rng = np.random.default_rng(number)
    dataset = NAMES[number % 3]
    y, x = np.mgrid[0:90, 0:80]
    image = np.stack([x * 3, y * 2, np.full_like(x, number * 4 % 256)], -1).astype(np.uint8)
    count = DEFINITIONS[dataset].num_keypoints
    keypoints = [(float(u), float(v), 2.0) for u, v in rng.uniform(20, 60, (count, 2))]
    described = {
        "dataset": dataset,
        "split": "train",
        "id": number,
        "image_id": number,
        "keypoints": keypoints,
        "bbox": (15.0, 10.0, 50.0, 70.0),
        "window": (40.0, 45.0, 80.0, 80.0) if dataset == "mpii" else None,
        "crop": {"x": 0.0, "y": 0.0, "scale_x": 1.0, "scale_y": 1.0},
        "image_sha256": "0" * 64,
        "image_size": (80, 90),
        "max_input": INPUT,
        "mode": "person",
    }
    return f"{dataset}-{number:03d}", encode_jpeg(image, 90), described


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    write_shard(place / shard_name(0), [sample(n) for n in range(17)])
    write_shard(place / shard_name(1), [sample(n) for n in range(17, 31)])
    return place


def train_set(folder: Path, view: Any = None, seed: int = 5) -> TrainSet:
    shards = ShardSet(folder)
    view = view or PoseView(INPUT, DEFINITIONS, PoseAugmentation())
    return TrainSet(shards, Order(shards.dataset_of, seed), view, seed)


def alone(data: TrainSet, size: int, *, steps: int = 1, workers: int = 0) -> Any:
    """The loader of a single rank."""
    division = {"global_batch": size, "micro_batch": size, "rank": 0, "world_size": 1, "accumulation": 1}
    return make_loader(data, start_step=0, steps=steps, workers=workers, **division)


def run(
    data: TrainSet, *, start: int, steps: int, world: int = 1, accumulation: int = 1, workers: int = 0
) -> dict[int, str]:
    """Digest of every sample by its position, over all ranks."""
    found = {}
    for rank in range(world):
        loader = make_loader(
            data,
            start_step=start,
            steps=steps,
            global_batch=24,
            micro_batch=24 // world // accumulation,
            rank=rank,
            world_size=world,
            accumulation=accumulation,
            workers=workers,
        )
        assert len(loader) == steps * accumulation
        for batch in loader:
            for i, position in enumerate(batch["position"].tolist()):
                digest = hashlib.sha256(batch["ids"][i].encode())
                for name in sorted(key for key, value in batch.items() if torch.is_tensor(value)):
                    digest.update(batch[name][i].numpy().tobytes())
                assert position not in found
                found[position] = digest.hexdigest()
    return found


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> dict[int, str]:
    found = run(train_set(folder), start=0, steps=4)
    assert sorted(found) == list(range(96)), "three epochs of 31 samples and a little"
    return found


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_run_resumed_at_any_step_in_any_division_sees_the_same_samples(
    folder: Path, whole_run: dict[int, str], data: st.DataObject
) -> None:
    world = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    accumulation = data.draw(st.sampled_from([1, 2]))
    start = data.draw(st.integers(0, 3))
    found = run(train_set(folder), start=start, steps=4 - start, world=world, accumulation=accumulation)
    assert found == {position: digest for position, digest in whole_run.items() if position >= start * 24}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing_and_do_not_touch_the_global_generator(
    folder: Path, whole_run: dict[int, str], workers: int
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = run(train_set(folder), start=1, steps=3, workers=workers)
    assert found == {position: digest for position, digest in whole_run.items() if position >= 24}
    assert torch.equal(torch.get_rng_state(), before)


class OutOfReach(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        raise StorageError("s3://bucket: refused: twice: an outage")


@pytest.mark.fault(32)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_the_line_that_it_was(workers: int) -> None:
    with pytest.raises(StorageError) as told:
        list(Loader(OutOfReach(), workers))
    assert str(told.value) == "s3://bucket: refused: twice: an outage"
    assert not multiprocessing.active_children(), "the workers end with it, whoever keeps the error"


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "batches = list(batches), 1 / 0"])
def test_a_program_ends_though_it_left_its_batches_half_read(end: str) -> None:
    program = f"from pipeline.data.loader import Loader\nbatches = iter(Loader(range(99), 1))\nnext(batches)\n{end}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == ("1 / 0" in end), done.stderr
    assert ("1 / 0" in end) == ("ZeroDivisionError" in done.stderr) and "DataLoader" not in done.stderr


def test_workers_outlive_the_stop_signals(folder: Path) -> None:
    data = train_set(folder)
    loader = alone(data, 4, steps=60, workers=1)
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
        os.kill(forkserver._forkserver._forkserver_pid, number)
    assert sum(1 for _ in batches) == 60
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_another_seed_gives_other_samples(folder: Path, whole_run: dict[int, str]) -> None:
    other = run(train_set(folder, seed=6), start=0, steps=2)
    assert all(other[position] != whole_run[position] for position in other)


def test_the_same_sample_looks_different_in_the_next_epoch(folder: Path) -> None:
    data = train_set(folder)
    first = {(item := data[p])["id"]: item["keypoints"] for p in range(31)}
    second = {(item := data[p])["id"]: item["keypoints"] for p in range(31, 62)}
    assert first.keys() == second.keys()
    assert sum(np.array_equal(first[key], second[key]) for key in first) == 0


def test_a_pose_batch_has_the_promised_fields(folder: Path) -> None:
    data = train_set(folder, PoseView(INPUT, DEFINITIONS, None))
    (batch,) = alone(data, 9)
    assert (batch["images"].shape, batch["images"].dtype) == ((9, 3, 64, 48), torch.uint8)
    assert batch["images"].is_contiguous()
    assert (batch["keypoints"].shape, batch["keypoints"].dtype) == ((9, 17, 2), torch.float32)
    assert batch["visible"].shape == (9, 17)
    assert (batch["dataset"].dtype, batch["position"].tolist()) == (torch.int64, list(range(9)))
    assert batch["weight"].tolist() == [1.0] * 9
    assert batch["bad"] == []
    for i, key in enumerate(batch["ids"]):
        name = data.shards.datasets[batch["dataset"][i]]
        assert key.startswith(name + "-")
        count = DEFINITIONS[name].num_keypoints
        assert batch["visible"][i].sum() == count
        assert not batch["keypoints"][i, count:].any()
        number = int(key.split("-")[1])
        u, v, _ = sample(number)[2]["keypoints"][3]
        window = (40.0, 45.0, 80.0, 80.0) if name == "mpii" else (40.0, 45.0, 1.25 * 52.5, 1.25 * 70)
        expected = [(u - window[0]) * 47 / window[2] + 23.5, (v - window[1]) * 63 / window[3] + 31.5]
        np.testing.assert_allclose(batch["keypoints"][i, 3], expected, atol=1e-3)
        centre = batch["images"][i, :, 32, 24].tolist()
        assert centre == pytest.approx([120, 91, number * 4 % 256], abs=9), "not this sample, or not in RGB"


def test_an_mae_batch_has_noise_that_is_its_own_for_every_position(folder: Path) -> None:
    data = train_set(folder, MaeView(INPUT, 12, (0.2, 1.0), 0.5))
    (batch,) = alone(data, 31)
    assert (batch["noise"].shape, batch["noise"].dtype) == ((31, 12), torch.float32)
    assert len({tuple(row) for row in batch["noise"].tolist()}) == 31
    assert 0 <= batch["noise"].min() < batch["noise"].max() < 1
    assert batch["images"].shape == (31, 3, 64, 48)
    assert "keypoints" not in batch


def test_a_corrupt_sample_keeps_its_slot_with_weight_zero_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    content = [sample(n) for n in range(6)]
    content[4] = (content[4][0], b"\xff\xd8 no jpeg", content[4][2])
    content[1][2]["keypoints"] = content[1][2]["keypoints"][:3]
    write_shard(path, content)
    offset = int(ShardIndex.from_bytes(Path(index_path(path)).read_bytes(), "x").jpg_offset[2])
    damaged = bytearray(path.read_bytes())
    damaged[offset + 50] ^= 255
    path.write_bytes(damaged)
    for view in (PoseView(INPUT, DEFINITIONS, PoseAugmentation()), MaeView(INPUT, 12)):
        data = train_set(tmp_path, view)
        (batch,) = alone(data, 6)
        zero = {key: weight for key, weight in zip(batch["ids"], batch["weight"].tolist(), strict=True)}
        broken = {content[2][0], content[4][0]} | ({content[1][0]} if isinstance(view, PoseView) else set())
        assert {key for key, weight in zero.items() if weight == 0} == broken
        assert len(batch["bad"]) == len(broken)
        assert any("shard-000000.tar: sample mpii-002.jpg" in line for line in batch["bad"])
        for key, image, weight in zip(batch["ids"], batch["images"], batch["weight"], strict=True):
            assert bool(image.any()) == bool(weight), key
        assert sorted(batch["dataset"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_view_refuses_shards_of_a_dataset_without_definition(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'mpii'"):
        train_set(folder, PoseView(INPUT, {n: DEFINITIONS[n] for n in ("coco", "crowdpose")}, None))


def test_a_global_batch_must_be_the_product_of_its_division(folder: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size 12 is not 5 samples x 2 ranks x 1 micro-steps"):
        make_loader(
            train_set(folder),
            start_step=0,
            steps=1,
            global_batch=12,
            micro_batch=5,
            rank=0,
            world_size=2,
            accumulation=1,
            workers=0,
        )
