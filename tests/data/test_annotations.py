"""The real samples by values computed by hand, and the detector's boxes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.annotations import Annotations, read, read_detections
from pipeline.data.definitions import DatasetSource
from pipeline.errors import DataError
from tests.data.readers.helpers import content, kinds, perfect_score, person, read_data


@pytest.mark.parametrize(
    ("name", "split", "images", "records", "people"),
    [
        ("coco", "train", 28, 147, 86),
        ("coco", "val", 4, 14, 12),
        ("aic", "train", 3, 9, 9),
        ("aic", "val", 3, 9, 9),
        ("mpii", "train", 5, 5, 5),
        ("mpii", "val", 5, 5, 5),
        ("crowdpose", "test", 2, 5, 4),
        ("ochuman", "test", 3, 5, 5),
    ],
)
def test_every_sample_file_reads(samples: Path, name: str, split: str, images: int, records: int, people: int) -> None:
    annotations = read(DatasetSource(name=name, split=split), samples)
    assert (len(annotations.images), annotations.records, len(annotations.instances)) == (images, records, people)
    assert not any(problem.dropped for problem in annotations.problems)
    assert annotations.digest == hashlib.sha256(Path(annotations.files.annotations).read_bytes()).hexdigest()
    assert all(Path(image.path).is_file() for image in annotations.images.values())
    assert all(instance.image == annotations.images[instance.image_id].path for instance in annotations.instances)
    assert {instance.dataset for instance in annotations.instances} == {name}


def test_a_coco_person_has_the_values_of_the_file(samples: Path) -> None:
    annotations = read(DatasetSource(name="coco", split="val"), samples)
    first = annotations.instances[0]
    assert (first.id, first.image_id, first.image_size, first.window) == (442619, 785, (640, 425), None)
    # bbox 280.79, 44.73, 218.7, 346.68 lies inside: one pixel less of each side
    np.testing.assert_allclose(first.bbox, (280.79, 44.73, 217.7, 345.68))
    assert first.area == 27789.11055
    assert first.keypoints.shape == (17, 3)
    assert first.keypoints.dtype == np.float64
    assert first.keypoints[[0, 9, 16]].tolist() == [[367, 81, 2], [449, 165, 2], [396, 341, 2]]


def test_the_boxes_used_are_those_of_the_published_rule(samples: Path) -> None:
    raw = json.loads((samples / "coco/annotations/person_keypoints_train2017.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in raw["images"]}
    expected = {}
    for record in raw["annotations"]:
        (x, y, w, h), (width, height) = record["bbox"], sizes[record["image_id"]]
        x1, y1 = max(0, x), max(0, y)
        x2, y2 = min(width - 1, x1 + max(0, w - 1)), min(height - 1, y1 + max(0, h - 1))
        if not record["iscrowd"] and max(record["keypoints"]) > 0 and record["area"] > 0 and x2 > x1 and y2 > y1:
            expected[record["id"]] = (x1, y1, x2 - x1, y2 - y1)
    used = {instance.id: instance.bbox for instance in read(DatasetSource(name="coco"), samples).instances}
    assert list(used) == list(expected)
    np.testing.assert_allclose(list(used.values()), list(expected.values()))


def test_an_aic_person_has_the_values_of_the_file(samples: Path) -> None:
    first = read(DatasetSource(name="aic"), samples).instances[0]
    assert (first.id, first.image_id, first.image_size) == (4, 1, (900, 600))
    assert first.bbox == (279, 55, 212, 543)
    assert first.area == 213 * 544
    assert first.keypoints[:2].tolist() == [[313, 201, 2], [312, 313, 1]]
    assert first.keypoints[7].tolist() == [0, 0, 0]


def test_an_mpii_person_has_the_centre_and_scale_of_the_lineage(samples: Path) -> None:
    first, _, third, *_ = read(DatasetSource(name="mpii", split="val"), samples).instances
    # record 0: center 966, 340; scale 4.718488
    assert (first.id, first.image_id, first.image_size) == (0, "005808361.jpg", None)
    np.testing.assert_allclose(first.window, (965.0, 340 + 15 * 4.718488 - 1, 250 * 4.718488, 250 * 4.718488))
    side = 200 * 4.718488
    np.testing.assert_allclose(first.bbox, (965 - side / 2, 340 + 15 * 4.718488 - 1 - side / 2, side, side))
    assert first.area == pytest.approx(side * side)
    np.testing.assert_allclose(first.keypoints[[0, 9]], [[803, 710, 2], [961.2409, 79.0306, 2]])
    assert third.keypoints[0].tolist() == [0, 0, 0]
    assert third.keypoints[1].tolist() == [1032, 648, 2]


def test_a_crowdpose_person_and_its_crowd_index_have_the_values_of_the_file(samples: Path) -> None:
    annotations = read(DatasetSource(name="crowdpose", split="test"), samples)
    first = annotations.instances[0]
    assert annotations.images[106848].crowd_index == 0.33
    assert next(image for image in annotations.coco["images"] if image["id"] == 106848)["crowdIndex"] == 0.33
    assert (first.id, first.area) == (123803, pytest.approx(273.15 * 352.42))
    np.testing.assert_allclose(first.bbox, (106.01, 13.43, 272.15, 351.42))
    assert first.keypoints[[1, 12]].tolist() == [[208, 108, 2], [256, 27, 1]]
    # CrowdPose counts neither head nor neck: 5 in the file, 7 labelled
    assert annotations.coco["annotations"][0]["num_keypoints"] == 7
    assert kinds(annotations) == [("num_keypoints inconsistent", False)] * 4


def test_an_ochuman_person_has_the_values_of_the_file(samples: Path) -> None:
    first = read(DatasetSource(name="ochuman", split="val"), samples).instances[0]
    assert (first.id, first.image_size, first.area) == (1, (900, 864), 356725)
    assert first.bbox == (250, 112, 474, 750)
    assert first.keypoints[0].tolist() == [371.5701271305881, 188.86769422623237, 2]


def test_the_ground_truth_is_what_pycocotools_evaluates(samples: Path) -> None:
    annotations = read(DatasetSource(name="coco", split="val"), samples)
    raw = json.loads((samples / "coco/annotations/person_keypoints_val2017.json").read_text())
    fields = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "num_keypoints", "keypoints"]
    assert annotations.coco["annotations"] == [{field: item[field] for field in fields} for item in raw["annotations"]]
    assert perfect_score(annotations) == pytest.approx(1.0)


def test_the_sample_detections_are_all_read(samples: Path) -> None:
    source = DatasetSource(name="coco", split="val")
    detections = read_detections(read(source, samples))
    assert len(detections) == 118
    assert detections[0].image_id == 785
    assert detections[0].score == 0.9999731779098511
    assert detections[0].bbox == (277.1183158543966, 45.699667786163765, 225.09126579259754, 333.5602652943344)
    assert len(read_detections(read(DatasetSource(name="crowdpose", split="test"), samples))) == 6


def detection(**changes: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.01} | changes


def detected(folder: Path, detections: Any) -> Annotations:
    (folder / "d.json").write_text(json.dumps(detections))
    return read_data(folder, content(person()), detections="d.json")


def test_detections_of_other_categories_and_images_and_without_size_are_left_out(tmp_path: Path) -> None:
    others = [detection(category_id=2), detection(image_id=8), detection(bbox=[1, 2, 0, 4]), detection()]
    assert read_detections(detected(tmp_path, others)) == [(7, (1, 2, 3, 4), 0.01)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (detection(bbox=[1, 2, 3]), "detection 1: bbox"),
        (detection(bbox=[1, 2, 3, "4"]), "detection 1: bbox"),
        (detection(bbox=[1, 2, 3, float("nan")]), "detection 1: bbox"),
        (detection(score=None), "detection 1: score"),
        (detection(score=float("inf")), "detection 1: score"),
        (detection(image_id=[7]), "detection 1: image_id"),
        (detection(category_id=None), "detection 1: category_id"),
        ("box", "detection 1: expected an object"),
    ],
)
def test_a_malformed_detection_is_a_data_error_that_names_it(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_detections(detected(tmp_path, [detection(), bad]))


@pytest.mark.parametrize(
    ("detections", "message"),
    [({}, "found a dict"), ([], "found an empty one"), ([detection(image_id=8)], "none of 1 boxes")],
)
def test_a_file_without_detections_is_a_data_error(tmp_path: Path, detections: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_detections(detected(tmp_path, detections))


def test_a_split_without_detections_says_where_they_could_be(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, content(person()), split="val")
    with pytest.raises(DataError, match=r"no detections.*COCO_val2017_detections_AP_H_56_person\.json"):
        read_detections(annotations)
