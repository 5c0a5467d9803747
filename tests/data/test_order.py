"""The order: every sample once, mixed, the same for any division and from any start."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order, positions
from pipeline.errors import ConfigError

LABELS = np.repeat([0, 1, 2], [3000, 1500, 500]).astype(np.int16)
SHUFFLED = np.random.default_rng(0).permutation(LABELS)


def epoch(order: Order, number: int = 0) -> np.ndarray:
    length = order.epoch_length
    found = [order.sample(number * length + i) for i in range(length)]
    assert {e for e, _ in found} == {number}
    return np.array([index for _, index in found])


@pytest.mark.parametrize("block", [None, 1, 64, 256])
@pytest.mark.parametrize("labels", [LABELS, SHUFFLED, LABELS[:7]], ids=["by dataset", "mixed", "tiny"])
def test_an_epoch_of_the_union_holds_every_sample_once_and_each_epoch_differs(
    labels: np.ndarray, block: int | None
) -> None:
    order = Order(labels, seed=1, block=block)
    first, second = epoch(order, 0), epoch(order, 1)
    assert order.epoch_length == len(labels)
    for found in (first, second):
        np.testing.assert_array_equal(np.sort(found), np.arange(len(labels)))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("block", [None, 64, 256])
def test_the_order_depends_on_seed_and_position_alone(block: int | None) -> None:
    one, other = Order(SHUFFLED, 1, block=block), Order(SHUFFLED, 1, block=block)
    backwards = [other.sample(p) for p in (12345, 7, 5000, 4999, 0)]
    assert [one.sample(p) for p in (0, 4999, 5000, 7, 12345)] == [backwards[i] for i in (4, 3, 2, 1, 0)]
    assert pickle.loads(pickle.dumps(one)).sample(12345) == one.sample(12345)  # noqa: S301 - our own object
    assert not np.array_equal(epoch(Order(SHUFFLED, 2, block=block)), epoch(one))


@pytest.mark.parametrize("weights", [None, {0: 1.0, 1: 2.0, 2: 1.0}], ids=["union", "weighted"])
@pytest.mark.parametrize("block", [None, 64], ids=["full", "block"])
@pytest.mark.parametrize("labels", [LABELS, SHUFFLED], ids=["by dataset", "mixed"])
def test_every_batchs_dataset_counts_lie_within_binomial_bounds(
    labels: np.ndarray, block: int | None, weights: dict | None
) -> None:
    order = Order(labels, 3, weights, block=block)
    shares = np.array([0.6, 0.3, 0.1]) if weights is None else np.array([0.25, 0.5, 0.25])
    batch = 250
    seen = labels[np.stack([epoch(order, number) for number in range(3)]).reshape(-1, batch)]
    counts = np.stack([(seen == d).sum(axis=1) for d in range(3)], axis=1)
    deviation = (counts - batch * shares) / np.sqrt(batch * shares * (1 - shares))
    assert np.abs(deviation).max() < 4.5
    assert 0.6 < deviation.std() < 1.3, "batches are too alike or too different to be random"


def test_weights_sample_with_replacement_and_an_epoch_keeps_its_length() -> None:
    order = Order(SHUFFLED, 0, {2: 1.0, 0: 0.0})
    found = epoch(order)
    assert set(SHUFFLED[found]) == {2}
    assert order.epoch_length == 5000
    times = np.bincount(found, minlength=5000)[SHUFFLED == 2]
    assert times.mean() == 10
    assert 2 < times.std() < 4.5, "samples of one dataset are drawn uniformly"


@pytest.mark.parametrize(
    ("weights", "message"),
    [({0: -1.0}, "-1"), ({5: 1.0}, "no sample"), ({0: 0.0}, "above 0"), ({}, "above 0"), ({0: float("nan")}, "nan")],
)
def test_impossible_weights_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Order(SHUFFLED, 0, weights)


def test_empty_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        Order(np.zeros(0, np.int16), 0)


def test_block_order_reads_few_blocks_at_a_time_but_no_neighbours_in_a_row() -> None:
    labels = np.random.default_rng(1).integers(0, 2, 64 * 256).astype(np.int16)
    found = epoch(Order(labels, 0, block=256, buffer=4))
    blocks = [len(np.unique(found[i : i + 1024] // 256)) for i in range(0, len(found), 1024)]
    assert np.median(blocks) <= 12, "of 64"
    assert (np.abs(np.diff(found)) == 1).mean() < 0.01
    full = epoch(Order(labels, 0))
    assert len(np.unique(full[:1024] // 256)) == 64


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_division_covers_the_same_global_batches_from_any_step(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 5))
    micro = data.draw(st.integers(1, 4))
    accumulation = data.draw(st.integers(1, 3))
    step = data.draw(st.integers(0, 1000))
    size = world * micro * accumulation
    division = {"global_batch": size, "micro_batch": micro, "world_size": world}
    found = [
        position
        for micro_step in range(accumulation)
        for rank in range(world)
        for position in positions(step, micro_step, rank=rank, **division)
    ]
    assert found == list(range(step * size, (step + 1) * size))


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 can't be divided"):
        positions(0, 0, global_batch=10, micro_batch=4, rank=0, world_size=2)
