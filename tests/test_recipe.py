"""Rates, lengths and batches, against values worked out by hand."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.recipe import Optimizer, Schedule, TrainingConfig


def training(**changes: Any) -> TrainingConfig:
    given = {"kind": "any", "steps": 100, "global_batch_size": 512, "optimizer": {"lr": 0.001}, **changes}
    return TrainingConfig.model_validate(given)


def test_base_lr_is_for_a_batch_of_256() -> None:
    assert Optimizer(base_lr=1.5e-4).peak(4096) == pytest.approx(2.4e-3)
    assert Optimizer(base_lr=1.5e-4).peak(64) == pytest.approx(3.75e-5)
    assert Optimizer(lr=5e-4).peak(4096) == 5e-4


@pytest.mark.parametrize("rates", [{}, {"lr": 1.0, "base_lr": 1.0}, {"lr": 0.0}, {"lr": -1.0}])
def test_exactly_one_positive_rate_is_given(rates: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Optimizer.model_validate(rates)


def test_the_cosine_falls_from_one_to_zero_after_the_warm_up() -> None:
    schedule = Schedule(shape="cosine", warmup_steps=10)
    factors = [schedule.factor(step, 110, 1.0) for step in (0, 5, 10, 35, 60, 85, 110)]
    assert factors == pytest.approx([0, 0.5, 1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0])


def test_a_warm_up_in_epochs_lasts_as_many_steps() -> None:
    schedule = Schedule(shape="cosine", warmup_epochs=2)
    assert [schedule.factor(step, 100, 5.0) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 293, 2927])
def test_steps_fall_by_ten_exactly_at_epochs_170_and_200_of_210(steps_per_epoch: int) -> None:
    total = 210 * steps_per_epoch
    schedule = Schedule(shape="step", milestones=[170 / 210, 200 / 210])
    at = {170 * steps_per_epoch - 1: 1, 170 * steps_per_epoch: 0.1, 200 * steps_per_epoch - 1: 0.1, total - 1: 0.01}
    for step, expected in at.items():
        assert schedule.factor(step, total, steps_per_epoch) == pytest.approx(expected), step
    assert schedule.factor(200 * steps_per_epoch, total, steps_per_epoch) == pytest.approx(0.01)


def test_a_milestone_that_was_written_with_six_digits_falls_on_the_same_step() -> None:
    schedule = Schedule(shape="step", milestones=[0.809524, 0.952381])
    assert [schedule.factor(step, 210_000, 1.0) for step in (169_999, 170_000)] == pytest.approx([1, 0.1])
    assert [schedule.factor(step, 210_000, 1.0) for step in (199_999, 200_000)] == pytest.approx([0.1, 0.01])


def test_the_warm_up_of_the_released_vitpose_configs_starts_at_a_thousandth() -> None:
    """mmcv's linear warm-up: rate = regular * (1 - (1 - i / 500) * (1 - 0.001))."""
    schedule = Schedule(shape="step", milestones=[0.8], warmup_steps=500, warmup_start=0.001)
    for step in (0, 1, 250, 499):
        expected = 1 - (1 - step / 500) * (1 - 0.001)
        assert schedule.factor(step, 10_000, 100.0) == pytest.approx(expected, rel=1e-12)
    assert schedule.factor(0, 10_000, 100.0) == pytest.approx(0.001)
    assert schedule.factor(500, 10_000, 100.0) == 1.0


def test_a_constant_rate_stays() -> None:
    assert [Schedule(shape="constant").factor(step, 10, 1.0) for step in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize(
    "mistake",
    [
        {"warmup_steps": 1, "warmup_epochs": 1},
        {"shape": "step", "milestones": [170]},
        {"shape": "step"},
        {"shape": "cosine", "milestones": [0.5]},
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(mistake: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Schedule.model_validate(mistake)


def test_the_rate_of_a_group_carries_its_scale() -> None:
    config = training(optimizer={"base_lr": 1e-3}, schedule={"shape": "cosine", "warmup_epochs": 1})
    rate = config.learning_rate(total_steps=100, samples_per_epoch=5120)
    assert rate(5, {}) == pytest.approx(2e-3 * 0.5)
    assert rate(10, {"lr_scale": 0.75}) == pytest.approx(2e-3 * 0.75)
    assert rate(55, {}) == pytest.approx(2e-3 * 0.5)


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [(210, 149_813, 512, 61_447), (1, 10, 4, 3), (0.5, 100, 10, 5), (0.001, 10, 100, 1), (1.1, 100, 10, 11)],
)
def test_epochs_become_steps_rounded_up(epochs: float, samples: int, batch: int, steps: int) -> None:
    assert training(steps=None, epochs=epochs, global_batch_size=batch).total_steps(samples) == steps


def test_steps_stay_what_they_are() -> None:
    assert training(steps=123).total_steps(5) == 123


@pytest.mark.parametrize("lengths", [{"steps": 1, "epochs": 1}, {"steps": None}])
def test_exactly_one_length_is_given(lengths: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either steps or epochs"):
        training(**lengths)


@pytest.mark.parametrize(("total", "every"), [(5, 1), (100, 10), (1_000_000, 1000)])
def test_a_resume_point_is_due_every_tenth_or_thousand_steps(total: int, every: int) -> None:
    assert training().save_interval(total) == every
    assert training(save_every=7).save_interval(total) == 7
