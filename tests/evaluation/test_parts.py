"""COCO-WholeBody's AP by part and AP-10K's by species, against pycocotools on files of the public form."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.annotations import Annotations, read
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import DataError
from pipeline.evaluation.coco import coco_results
from pipeline.evaluation.score import score
from tests.evaluation.people import ap_and_ar, crowd_of, perturbed
from tests.evaluation.test_coco import by_hand
from tests.evaluation.whole_bodies import PARTS, whole_body_file

NAMES = dict(zip(PARTS, ("body", "foot", "face", "left_hand", "right_hand"), strict=True))


def read_whole_bodies(folder: Path, data: dict[str, Any]) -> Annotations:
    (folder / "a.json").write_text(json.dumps(data))
    return read(DatasetSource(name="wholebody", split="val", annotations="a.json", images="."), folder)


def only(
    field: str, data: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The public file and the results as if the part's keypoints were all that there are."""
    truth = copy.deepcopy(data)
    for record in truth["annotations"]:
        record["keypoints"] = record[field]
        record["num_keypoints"] = sum(flag > 0 for flag in record[field][2::3])
    start = 3 * sum(list(PARTS.values())[: list(PARTS).index(field)])
    cut = slice(start, start + 3 * PARTS[field])
    return truth, [
        {**one, "keypoints": one["keypoints"][cut]} for one in results if max(one["keypoints"][cut][2::3]) > 0
    ]


def test_each_part_scores_as_pycocotools_says_of_its_keypoints_alone(tmp_path: Path) -> None:
    data = whole_body_file(12, 60)
    annotations = read_whole_bodies(tmp_path, data)
    rng = np.random.default_rng(1)
    predictions = [perturbed(one, rng, 0.008) for one in annotations.instances]
    for prediction in predictions[::5]:
        prediction.keypoints[23:91, 2] = -0.1  # no face found
    found = score(annotations, predictions).metrics
    results = coco_results(predictions, annotations.definition)
    sigmas, start = annotations.definition.sigmas, 0
    for field, count in PARTS.items():
        alone = annotations.definition.model_copy(update={"sigmas": sigmas[start : start + count]})
        expected = by_hand(*only(field, data, results), alone)
        for metric in ("AP", "AR"):
            assert found[f"{metric}_{NAMES[field]}"] == pytest.approx(expected[metric], abs=1e-9), field
        start += count
    assert 0 < found["AP_face"] < found["AP"] < found["AP_body"] == pytest.approx(100)


def test_all_keypoints_together_score_as_pycocotools_says_and_who_has_none_of_a_part_does_not_count(
    tmp_path: Path,
) -> None:
    data = whole_body_file(8, 40, seed=3)
    for record in data["annotations"]:
        record["righthand_kpts"], record["righthand_valid"] = [0.0] * 63, False
    annotations = read_whole_bodies(tmp_path, data)
    rng = np.random.default_rng(2)
    predictions = [perturbed(one, rng, 0.01) for one in annotations.instances]
    found = score(annotations, predictions).metrics
    truth = copy.deepcopy(data)
    for record in truth["annotations"]:
        record["keypoints"] = [number for field in PARTS for number in record[field]]
        record["num_keypoints"] = sum(flag > 0 for flag in record["keypoints"][2::3])
    expected = by_hand(truth, coco_results(predictions, annotations.definition), annotations.definition)
    for metric in ("AP", "AP50", "AP75", "AR"):
        assert found[metric] == pytest.approx(expected[metric], abs=1e-9)
    assert found["AP_right_hand"] == found["AR_right_hand"] == -1


def test_ap_by_species_is_pycocotools_mean_over_categories() -> None:
    definition = load_definition("ap10k")
    truth, results = crowd_of(definition, 20, 90, np.random.default_rng(4), 0.05)
    for number, record in enumerate(truth["annotations"], start=1):
        record["id"], record["category_id"] = number, 10 + number % 4
    truth["categories"] = [{"id": 10 + kind, "name": f"species {kind}"} for kind in range(6)]
    for number, record in enumerate(results):
        record["category_id"] = 10 + number % 5  # 14 has no animals
    found = ap_and_ar(truth, results, definition)
    assert found == pytest.approx(by_hand(truth, results, definition), abs=1e-9)
    together = definition.model_copy(update={"average_over_categories": False})
    assert found["AP"] != ap_and_ar(truth, results, together)["AP"]


def test_each_animal_is_found_as_its_own_species_and_a_detectors_box_has_none(tmp_path: Path) -> None:
    definition = load_definition("ap10k")
    truth, _ = crowd_of(definition, 6, 30, np.random.default_rng(5), 0.0)
    truth["images"] = [{"id": image["id"], "file_name": f"{image['id']}.jpg"} for image in truth["images"]]
    truth["categories"] = [{"id": kind, "name": f"species {kind}"} for kind in (1, 2, 3)]
    for number, record in enumerate(truth["annotations"], start=1):
        record["id"], record["category_id"] = number, 1 + number % 3
    (tmp_path / "a.json").write_text(json.dumps(truth))
    annotations = read(DatasetSource(name="ap10k", annotations="a.json", images="."), tmp_path)
    predictions = [perturbed(one, np.random.default_rng(0), 0.0) for one in annotations.instances]
    assert score(annotations, predictions).metrics["AP"] == pytest.approx(100)
    wrong = [one.id for one in annotations.instances if one.category == 2]
    kept = [one for one in predictions if one.instance_id not in wrong]
    assert score(annotations, kept).metrics["AP"] == pytest.approx(100 * 2 / 3)
    object.__setattr__(predictions[0], "instance_id", None)
    with pytest.raises(DataError, match="'ap10k': its metric is by category, which a detector's boxes lack"):
        score(annotations, predictions)
