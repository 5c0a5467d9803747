import copy
import time

import numpy as np
import pytest

from pipeline.data.definitions import load_definition
from pipeline.errors import DataError
from pipeline.evaluation.bootstrap import bootstrap_ap, bootstrap_difference
from pipeline.evaluation.coco import Matches, evaluate_images
from tests.evaluation.people import crowd_of

COCO = load_definition("coco")


def matches(noise: float = 0.05, images: int = 30, people: int = 80, seed: int = 0) -> Matches:
    return evaluate_images(*crowd_of(COCO, images, people, np.random.default_rng(seed), noise), COCO)


def test_a_resample_equals_the_evaluation_of_the_repeated_images() -> None:
    truth, results = crowd_of(COCO, 12, 50, np.random.default_rng(3), 0.05)
    counts = np.array([0, 3, 1, 0, 2, 1, 1, 0, 4, 0, 2, 1])
    repeated = {"images": [], "annotations": [], "categories": truth["categories"]}
    found = []
    for image, count in enumerate(counts.tolist()):
        for copied in range(count):
            new = 100 * image + copied
            repeated["images"].append({"id": new})
            for one in truth["annotations"]:
                if one["image_id"] == image:
                    number = 1 + len(repeated["annotations"])
                    repeated["annotations"].append(copy.deepcopy(one) | {"id": number, "image_id": new})
            found += [one | {"image_id": new} for one in results if one["image_id"] == image]
    expected = evaluate_images(repeated, found, COCO).metrics()
    assert evaluate_images(truth, results, COCO).metrics(counts) == pytest.approx(expected, abs=1e-9)


def test_the_interval_holds_the_point_estimate_and_is_repeatable() -> None:
    found = matches()
    low, high = bootstrap_ap(found, resamples=300)
    assert 0 < low < found.average_precision() < high < 100
    assert high - low > 1
    assert (low, high) == bootstrap_ap(found, resamples=300)
    assert (low, high) != bootstrap_ap(found, resamples=300, seed=1)
    narrow = bootstrap_ap(found, resamples=300, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_each_resample_draws_as_many_images_as_there_are() -> None:
    found = matches()
    draws = np.random.default_rng(99).multinomial(30, np.full(30, 1 / 30), size=2000)
    expected = np.percentile([found.average_precision(counts) for counts in draws], [2.5, 97.5])
    low, high = bootstrap_ap(found, resamples=2000)
    assert high - low == pytest.approx(expected[1] - expected[0], rel=0.1)
    assert [low, high] == pytest.approx(expected.tolist(), abs=1.0)


def test_more_images_make_a_narrower_interval() -> None:
    few, many = (bootstrap_ap(matches(images=n, people=3 * n), resamples=200) for n in (15, 150))
    assert many[1] - many[0] < 0.6 * (few[1] - few[0])


def test_the_paired_difference_is_zero_with_itself_and_tells_better_from_worse() -> None:
    good, bad = matches(0.03), matches(0.05)
    assert bootstrap_difference(good, good, resamples=50) == (0.0, 0.0)
    low, high = bootstrap_difference(good, bad, resamples=200)
    assert 0 < low < good.average_precision() - bad.average_precision() < high
    assert bootstrap_difference(bad, good, resamples=200) == pytest.approx((-high, -low))


def test_different_images_and_no_people_are_refused() -> None:
    with pytest.raises(DataError, match="30 and 31 images"):
        bootstrap_difference(matches(), matches(images=31))
    truth, results = crowd_of(COCO, 3, 4, np.random.default_rng(0), 0.0)
    with pytest.raises(DataError, match="no people"):
        bootstrap_ap(evaluate_images(truth | {"annotations": []}, results, COCO), resamples=5)


def test_a_thousand_resamples_of_200_images_take_seconds() -> None:
    found = matches(images=200, people=400)
    start = time.perf_counter()
    bootstrap_ap(found)
    assert time.perf_counter() - start < 10
