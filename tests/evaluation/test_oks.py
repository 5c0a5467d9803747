import math

import numpy as np
import pytest

from pipeline.data.definitions import load_definition
from pipeline.data.instance import Instance
from pipeline.evaluation.oks import oks, oks_nms, per_instance_oks, rescore
from tests.evaluation.people import prediction

COCO = load_definition("coco")


def people(*offsets: float) -> list[np.ndarray]:
    base = np.random.default_rng(3).uniform(20, 80, (17, 3))
    return [base + [offset, 0, 0] for offset in offsets]


def test_similarity_is_one_at_no_distance_and_one_over_e_where_the_formula_says() -> None:
    sigma, area = 0.05, 400.0
    distance = math.sqrt(2 * area) * 2 * sigma
    points = np.array([[10.0, 20.0], [10.0 + distance, 20.0], [10.0, 20.0 - 2 * distance]])
    origin = np.tile([10.0, 20.0], (3, 1))
    assert oks(points, origin, area, [sigma] * 3) == pytest.approx([1, math.exp(-1), math.exp(-4)], rel=1e-9)


def test_the_score_is_the_box_score_times_the_mean_of_joints_above_the_threshold() -> None:
    points = np.zeros((4, 3))
    points[:, 2] = [0.9, 0.5, 0.2, 0.1]
    assert rescore(prediction(points, box_score=0.5)) == pytest.approx(0.35)
    assert rescore(prediction(points, box_score=0.5), threshold=0.95) == 0.0


def test_nms_keeps_the_best_drops_its_duplicate_and_leaves_the_neighbour() -> None:
    found = [prediction(points) for points in people(0.0, 0.5, 60.0)]
    assert oks_nms(found, [0.4, 0.9, 0.6], COCO.sigmas).tolist() == [1, 2]


def test_nms_measures_by_the_mean_area_of_both_padded_windows() -> None:
    # All sigmas equal and all joints shifted by d: OKS = exp(-d^2 / (8 sigma^2 area)), which is 0.9 at this d.
    sigma, sizes = 0.1, (40.0, 80.0)
    area = (sizes[0] ** 2 + sizes[1] ** 2) / 2
    limit = math.sqrt(-math.log(0.9) * 8 * sigma**2 * area)
    for shift, kept in ((0.99 * limit, [0]), (1.01 * limit, [0, 1])):
        first, second = people(0.0, shift)
        found = [prediction(first, size=sizes[0]), prediction(second, size=sizes[1])]
        assert oks_nms(found, [0.9, 0.8], [sigma] * 17).tolist() == kept


def test_nms_compares_with_kept_people_only() -> None:
    sigma, size = 0.1, 100.0
    limit = math.sqrt(-math.log(0.9) * 8 * sigma**2 * size**2)
    found = [prediction(points, size=size) for points in people(0.0, 0.7 * limit, 1.4 * limit)]
    assert oks_nms(found, [0.9, 0.8, 0.7], [sigma] * 17).tolist() == [0, 2]


def test_among_equal_scores_the_first_wins() -> None:
    found = [prediction(points) for points in people(0.0, 0.1, 60.0, 60.1)]
    assert oks_nms(found, [0.5] * 4, COCO.sigmas).tolist() == [0, 2]
    assert oks_nms([], [], COCO.sigmas).tolist() == []


def test_per_instance_oks_counts_labelled_joints_with_the_metrics_area() -> None:
    points = np.zeros((14, 3))
    points[:3] = [[30.0, 40.0, 2], [50.0, 40.0, 1], [50.0, 60.0, 2]]
    instance = Instance("x", 7, 1, "a.jpg", (100, 100), (10.0, 10.0, 60.0, 80.0), points, area=1000.0)
    found = points.copy()
    found[0, 0] += 5.0
    found[5:, :2] = 99.0
    for name, area in (("crowdpose", 0.53 * 60 * 80), ("aic", 0.53 * 60 * 80)):
        definition = load_definition(name)
        off = math.exp(-25 / (2 * area * (2 * definition.sigmas[0]) ** 2))
        values = per_instance_oks([prediction(found, instance_id=7)], [instance], definition)
        assert values == pytest.approx([(off + 2) / 3], rel=1e-9)
    by_area = definition.model_copy(update={"metric": "coco"})
    off = math.exp(-25 / (2 * 1000.0 * (2 * definition.sigmas[0]) ** 2))
    assert per_instance_oks([prediction(found, instance_id=7)], [instance], by_area)[0] == pytest.approx((off + 2) / 3)
