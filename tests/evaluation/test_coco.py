import contextlib
import copy
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.data.annotations import Annotations, read, read_detections
from pipeline.data.definitions import DatasetDefinition, DatasetSource, load_definition
from pipeline.data.geometry import box_to_window
from pipeline.errors import DataError
from pipeline.evaluation.coco import coco_results, evaluate_images
from pipeline.evaluation.predictions import Prediction
from tests.evaluation.people import ap_and_ar, crowd_of, perturbed, prediction, result

COCO_SET = load_definition("coco")
NAMES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


def by_hand(truth: dict[str, Any], results: list[dict[str, Any]], definition: DatasetDefinition) -> dict[str, float]:
    """pycocotools as its demo drives it."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(definition.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * value if value >= 0 else -1 for name, value in zip(NAMES, evaluation.stats, strict=True)}


def annotations(samples: Path, name: str = "coco", split: str = "val") -> Annotations:
    return read(DatasetSource(name=name, split=split), samples)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.08])
def test_real_people_found_with_noise_score_as_pycocotools_says(samples: Path, split: str, noise: float) -> None:
    data = annotations(samples, split=split)
    rng = np.random.default_rng(1)
    results = coco_results([perturbed(one, rng, noise) for one in data.instances], data.definition)
    expected = by_hand(data.coco, results, data.definition)
    assert ap_and_ar(data.coco, results, data.definition) == pytest.approx(expected, abs=1e-9)
    assert noise != 0.02 or 0 < expected["AP"] < 100


def test_detector_boxes_on_real_images_score_as_pycocotools_says(samples: Path) -> None:
    data = annotations(samples)
    rng = np.random.default_rng(2)
    found = []
    for detection in read_detections(data):
        x, y, width, height = detection.bbox
        points = np.column_stack([rng.uniform(x, x + width, 17), rng.uniform(y, y + height, 17), rng.random(17)])
        overlaps = [one for one in data.instances if one.image_id == detection.image_id and abs(one.bbox[0] - x) < 20]
        if overlaps:
            points[:, :2] = overlaps[0].keypoints[:, :2] + rng.normal(0, 0.02 * height, (17, 2))
        window = (x + width / 2, y + height / 2, 1.25 * width, 1.25 * height)
        found.append(Prediction(detection.image_id, None, points, window, detection.score))
    for nms in (True, False):
        results = coco_results(found, data.definition, nms)
        expected = by_hand(data.coco, results, data.definition)
        assert ap_and_ar(data.coco, results, data.definition) == pytest.approx(expected, abs=1e-9)
        assert 0 < expected["AP"] < 100
    assert len(coco_results(found, data.definition, nms=False)) == len(found) == 118


def by_the_released_code(found: list[Prediction]) -> list[tuple[float, np.ndarray]]:
    """Rescoring and OKS-NMS of one image, written out after mmpose's `TopDownCocoDataset.evaluate` and `oks_nms`."""
    people = []
    for one in found:
        above = [score for score in one.keypoints[:, 2] if score > 0.2]
        joints = sum(above) / len(above) if above else 0.0
        scale = np.array(one.window[2:]) / 200
        people.append((joints * one.box_score, one.keypoints, np.prod(scale * 200)))
    people.sort(key=lambda person: -person[0])
    kept: list[tuple[float, np.ndarray, float]] = []
    for score, points, area in people:
        similar = []
        for _, other, other_area in kept:
            variances = (2 * np.array(COCO_SET.sigmas)) ** 2
            squared = (points[:, 0] - other[:, 0]) ** 2 + (points[:, 1] - other[:, 1]) ** 2
            e = squared / variances / ((area + other_area) / 2 + np.spacing(1)) / 2
            similar.append(np.sum(np.exp(-e)) / len(e))
        if all(value <= 0.9 for value in similar):
            kept.append((score, points, area))
    return [(score, points) for score, points, _ in kept]


def test_real_detections_are_rescored_and_suppressed_as_by_the_released_code(samples: Path) -> None:
    """Each detector box sees the nearest person, with an error: boxes of one person give near duplicates."""
    data = annotations(samples)
    rng = np.random.default_rng(3)
    found: dict[int | str, list[Prediction]] = {}
    for detection in read_detections(data):
        x, y, width, height = detection.bbox
        centre = np.array([x + width / 2, y + height / 2])
        near = [one for one in data.instances if one.image_id == detection.image_id]
        points = np.column_stack([rng.uniform(x, x + width, 17), rng.uniform(y, y + height, 17), rng.uniform(0, 1, 17)])
        if near:
            middles = [np.array(one.bbox[:2]) + np.array(one.bbox[2:]) / 2 for one in near]
            person = near[int(np.argmin([np.linalg.norm(middle - centre) for middle in middles]))]
            points[:, :2] = person.keypoints[:, :2] + rng.normal(0, 0.005 * max(person.bbox[2:]), (17, 2))
        window = box_to_window(detection.bbox, 0.75)
        one = Prediction(detection.image_id, None, points, window, detection.score)
        found.setdefault(detection.image_id, []).append(one)
    everyone = [one for group in found.values() for one in group]
    results = coco_results(everyone, data.definition)
    expected = [(image_id, *kept) for image_id, group in found.items() for kept in by_the_released_code(group)]
    assert 0 < len(expected) < len(everyone) - 10, "nothing was suppressed: the boxes prove nothing"
    assert [one["image_id"] for one in results] == [image_id for image_id, _, _ in expected]
    for one, (_, score, points) in zip(results, expected, strict=True):
        assert one["score"] == pytest.approx(score, rel=1e-12)
        assert one["keypoints"] == points.ravel().tolist()
    by_pycocotools = by_hand(data.coco, results, data.definition)
    assert ap_and_ar(data.coco, results, data.definition) == pytest.approx(by_pycocotools, abs=1e-9)


def test_random_crowds_with_duplicates_and_false_alarms_score_as_pycocotools_says() -> None:
    for seed in range(4):
        truth, results = crowd_of(COCO_SET, 20, 60, np.random.default_rng(seed), 0.05)
        for number, annotation in enumerate(truth["annotations"], start=1):
            annotation["id"] = number
        before = copy.deepcopy((truth, results))
        assert ap_and_ar(truth, results, COCO_SET) == pytest.approx(by_hand(truth, results, COCO_SET), abs=1e-9)
        assert (truth, results) == before


def test_perfect_predictions_give_100(samples: Path) -> None:
    for name in ("coco", "aic", "crowdpose", "ochuman"):
        data = annotations(samples, name)
        rng = np.random.default_rng(0)
        metrics = ap_and_ar(
            data.coco,
            coco_results([perturbed(one, rng, 0.0) for one in data.instances], data.definition),
            data.definition,
        )
        assert metrics["AP"] == pytest.approx(100.0), name
        assert metrics["AR"] == 100.0


def test_missing_half_of_the_people_halves_recall() -> None:
    truth, _ = crowd_of(COCO_SET, 10, 40, np.random.default_rng(5), 0.0)
    people = [one for one in truth["annotations"] if one["num_keypoints"]]
    results = [result(one["image_id"], np.array(one["keypoints"]), 0.5) for one in people]
    assert ap_and_ar(truth, results, COCO_SET)["AR"] == 100.0
    half = ap_and_ar(truth, results[: len(people) // 2], COCO_SET)
    assert half["AR"] == pytest.approx(100 * (len(people) // 2) / len(people))
    assert half["AP"] < 55


def test_a_person_with_id_0_can_be_found() -> None:
    truth, results = crowd_of(COCO_SET, 1, 1, np.random.default_rng(0), 0.0)
    assert truth["annotations"][0]["id"] == 0
    assert ap_and_ar(truth, results[:1], COCO_SET)["AP"] == pytest.approx(100.0)


def test_string_image_ids_score_as_the_same_images_with_numbers() -> None:
    truth, results = crowd_of(COCO_SET, 9, 30, np.random.default_rng(7), 0.05)
    expected = ap_and_ar(truth, results, COCO_SET)
    for record in [*truth["annotations"], *results]:
        record["image_id"] = f"photo-{record['image_id']}"
    for image in truth["images"]:
        image["id"] = f"photo-{image['id']}"
    assert ap_and_ar(truth, results, COCO_SET) == expected


def test_no_results_give_zeros_and_no_people_give_minus_one() -> None:
    truth, results = crowd_of(COCO_SET, 3, 30, np.random.default_rng(0), 0.0)
    assert set(ap_and_ar(truth, [], COCO_SET).values()) == {0.0}
    truth["annotations"] = []
    assert set(ap_and_ar(truth, results, COCO_SET).values()) == {-1.0}
    assert set(ap_and_ar(truth, [], COCO_SET).values()) == {-1.0}


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    ap_and_ar(*crowd_of(COCO_SET, 3, 9, np.random.default_rng(0), 0.0), COCO_SET)
    assert capsys.readouterr() == ("", "")


def test_image_ids_restrict_the_evaluation() -> None:
    truth, results = crowd_of(COCO_SET, 12, 40, np.random.default_rng(8), 0.05)
    chosen = {1, 4, 5, 9}
    small = truth | {
        "images": [image for image in truth["images"] if image["id"] in chosen],
        "annotations": [one for one in truth["annotations"] if one["image_id"] in chosen],
    }
    expected = ap_and_ar(small, [one for one in results if one["image_id"] in chosen], COCO_SET)
    assert ap_and_ar(truth, results, COCO_SET, image_ids=chosen) == expected
    assert expected != ap_and_ar(truth, results, COCO_SET)


def test_unknown_images_and_broken_results_are_named() -> None:
    truth, results = crowd_of(COCO_SET, 3, 9, np.random.default_rng(0), 0.0)
    with pytest.raises(DataError, match="image 77 not among the 3 images"):
        ap_and_ar(truth, [*results, result(77, np.zeros((17, 3)), 0.5)], COCO_SET)
    with pytest.raises(DataError, match="image 55 "):
        ap_and_ar(truth, results, COCO_SET, image_ids=[0, 55])
    for broken in (np.zeros((14, 3)), np.full((17, 3), np.nan)):
        with pytest.raises(DataError, match="image 2: expected 51 finite"):
            ap_and_ar(truth, [result(2, broken, 0.5)], COCO_SET)


def test_areas_of_aic_and_crowdpose_come_from_the_box() -> None:
    """One joint is off by so much that OKS lies between two thresholds only if the area is 0.53 w h."""
    for name in ("aic", "crowdpose"):
        definition = load_definition(name)
        points = np.column_stack([np.arange(14.0) * 5, np.arange(14.0) * 3, np.full(14, 2.0)])
        width, height = 70.0, 50.0
        area = 0.53 * width * height
        off = points.copy()
        off[:, 0] += np.sqrt(-np.log(0.72) * 2 * area) * 2 * np.array(definition.sigmas)  # OKS 0.72: 5 of 10 pass
        one = {"id": 1, "image_id": 1, "bbox": [0, 0, width, height], "keypoints": points.ravel().tolist(), "area": 1.0}
        truth = {"images": [{"id": 1, "crowdIndex": 0.5}], "annotations": [one]}
        metrics = ap_and_ar(truth, [result(1, off, 0.9)], definition)
        assert metrics["AP"] == pytest.approx(50.0)
        assert metrics["APM"] == pytest.approx(50.0) and metrics["APL"] == -1.0
        annotated = definition.model_copy(update={"metric": "coco"})
        assert ap_and_ar(truth, [result(1, off, 0.9)], annotated)["AP"] == 0.0


def test_crowd_levels_are_the_ap_of_their_images() -> None:
    definition = load_definition("crowdpose")
    truth, results = crowd_of(definition, 24, 80, np.random.default_rng(4), 0.06)
    levels = {"AP_easy": [], "AP_medium": [], "AP_hard": []}
    for image, index in zip(truth["images"], [0.0, 0.19, 0.2, 0.5, 0.79, 0.8, 0.9, 1.0] * 3, strict=True):
        image["crowdIndex"] = index
        levels["AP_easy" if index < 0.2 else "AP_medium" if index < 0.8 else "AP_hard"].append(image["id"])
    metrics = ap_and_ar(truth, results, definition)
    for name, image_ids in levels.items():
        assert metrics[name] == ap_and_ar(truth, results, definition, image_ids=image_ids)["AP"]
    assert len({metrics[name] for name in ("AP", *levels)}) == 4
    assert (
        not {"AP_easy", "AP_hard"} & ap_and_ar(truth, results, definition.model_copy(update={"metric": "aic"})).keys()
    )


def test_at_most_20_people_an_image_count() -> None:
    points = [np.column_stack([np.arange(17.0) + 100 * n, np.zeros(17), np.full(17, 2.0)]) for n in range(25)]
    people = [
        {"id": n, "image_id": 1, "bbox": [100 * n, 0, 80, 80], "area": 5000.0, "keypoints": one.ravel().tolist()}
        for n, one in enumerate(points)
    ]
    truth = {"images": [{"id": 1}], "annotations": people}
    results = [result(1, one, 0.5) for one in points]
    assert ap_and_ar(truth, results, COCO_SET)["AR"] == pytest.approx(80.0)


def test_results_are_ranked_deduplicated_and_finite(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(0, 99, (17, 2)), np.full(17, 0.5)])
    broken = points.copy()
    broken[3, 1] = np.nan
    found = [
        prediction(points, image_id=4, instance_id=1, box_score=0.5),
        prediction(points + [0, 0, 0.2], image_id=4, instance_id=1),
        prediction(points + [300, 0, 0], image_id=4, instance_id=2),
        prediction(broken, image_id=4, instance_id=3),
        prediction(points, image_id=9, instance_id=4),
        prediction(points + [0.1, 0, -0.1], image_id=4, instance_id=5),
    ]
    with caplog.at_level(logging.WARNING):
        results = coco_results(found, COCO_SET)
    assert [(one["image_id"], one["score"]) for one in results] == [
        (4, pytest.approx(0.5)),
        (4, pytest.approx(0.4)),
        (9, pytest.approx(0.5)),
    ]
    assert results[1]["keypoints"] == pytest.approx((points + [0.1, 0, -0.1]).ravel())
    assert "1 of 6 predictions are not finite" in caplog.text
    assert len(coco_results(found, COCO_SET, nms=False)) == 4


def test_matches_of_all_images_once_are_the_evaluation() -> None:
    truth, results = crowd_of(COCO_SET, 15, 50, np.random.default_rng(9), 0.05)
    matches = evaluate_images(truth, results, COCO_SET)
    assert matches.image_ids == tuple(range(15))
    assert matches.metrics() == ap_and_ar(truth, results, COCO_SET)
    assert matches.average_precision(np.ones(15, np.int64)) == matches.metrics()["AP"]
