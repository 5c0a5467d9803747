"""The COCO format: bad input as named problems, and what is usable."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.readers.coco import clip_boxes
from pipeline.data.readers.records import number_rows
from pipeline.errors import DataError
from tests.data.readers.helpers import POINTS, content, kinds, person, points_with, read_data, read_text


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"image_id": 8}, "unknown image"),
        ({"image_id": "7"}, "unknown image"),
        ({"image_id": [7]}, "mistyped record"),
        ({"id": None}, "mistyped record"),
        ({"keypoints": POINTS[:-3]}, "wrong keypoint count"),
        ({"keypoints": "none"}, "mistyped record"),
        ({"keypoints": None}, "mistyped record"),
        ({"keypoints": points_with(3, "12", 20, 2)}, "mistyped record"),
        ({"keypoints": points_with(3, None, 20, 2)}, "mistyped record"),
        ({"keypoints": points_with(3, [1], 20, 2)}, "mistyped record"),
        ({"keypoints": points_with(3, 12, 20, 3)}, "visibility not 0, 1 or 2"),
        ({"keypoints": points_with(3, 12, 20, -1)}, "visibility not 0, 1 or 2"),
        ({"keypoints": points_with(3, 12, 20, 0.9)}, "visibility not 0, 1 or 2"),
        ({"keypoints": points_with(3, 12, 20, float("nan"))}, "visibility not 0, 1 or 2"),
        ({"bbox": "5 10 40 50"}, "mistyped record"),
        ({"bbox": [5, 10, 40]}, "mistyped record"),
        ({"bbox": [5, 10, 40, "50"]}, "mistyped record"),
        ({"bbox": [5, 10, 40, 10**400]}, "mistyped record"),
        ({"bbox": [5, 10, float("nan"), 50]}, "box not finite"),
        ({"bbox": [5, 10, float("inf"), 50]}, "box not finite"),
        ({"bbox": [5, 10, 0, 50]}, "box without size"),
        ({"bbox": [5, 10, 40, -50]}, "box without size"),
        ({"bbox": [5, 10, 1, 50]}, "box without size"),
        ({"bbox": [100, 10, 40, 50]}, "box outside its image"),
        ({"bbox": [-60, 10, 40, 50]}, "box outside its image"),
        ({"area": 0}, "area not positive"),
        ({"area": float("nan")}, "area not positive"),
        ({"area": "900"}, "mistyped record"),
        ({"area": 10**400}, "mistyped record"),
        ({"iscrowd": "no"}, "mistyped record"),
        ({"category_id": {}}, "mistyped record"),
        ({"num_keypoints": 0}, "num_keypoints inconsistent"),
    ],
)
def test_a_bad_annotation_is_a_dropped_problem_and_its_neighbour_is_used(
    tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    annotations = read_data(tmp_path, content(person(**{"id": 2} | changes), person(id=3)))
    assert kinds(annotations) == [(kind, True)]
    assert [instance.id for instance in annotations.instances] == [3]
    assert annotations.records == 2
    assert "a.json" in annotations.problems[0].where
    # what can't be judged is not in the ground truth; what only can't be trained on is
    in_truth = len(annotations.coco["annotations"])
    judged = ("box without size", "box outside its image", "area not positive", "num_keypoints inconsistent")
    assert in_truth == (2 if kind in judged and changes.get("area") == changes.get("area") else 1)


@pytest.mark.parametrize("record", [None, "person", 5, [1], {}])
def test_an_annotation_that_is_no_object_is_named_by_its_position(tmp_path: Path, record: Any) -> None:
    annotations = read_data(tmp_path, content(person(), record))
    assert kinds(annotations) == [("mistyped record", True)]
    assert annotations.problems[0].where.endswith("a.json: annotations[1]")


@pytest.mark.fault(21)
def test_the_second_of_two_equal_annotation_ids_is_dropped(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, content(person(), person(area=1.0)))
    assert kinds(annotations) == [("duplicate annotation id", True)]
    assert [instance.area for instance in annotations.instances] == [900.0]


@pytest.mark.fault(21)
def test_bad_image_records_are_problems(tmp_path: Path) -> None:
    good = {"id": 7, "file_name": "seven.jpg", "width": 100, "height": 80}
    images = [good, good | {"file_name": "other.jpg"}, "eight.jpg", {"id": 9}, {"id": 10, "file_name": 10}]
    annotations = read_data(tmp_path, content(person(), images=images))
    assert kinds(annotations) == [("duplicate image id", True)] + [("mistyped record", True)] * 3
    assert [image.file_name for image in annotations.images.values()] == ["seven.jpg"]


@pytest.mark.parametrize("width", [0, -5, "100", 99.5])
def test_an_image_size_that_makes_no_sense_is_reported_and_taken_as_unknown(tmp_path: Path, width: Any) -> None:
    image = {"id": 7, "file_name": "seven.jpg", "width": width, "height": 80}
    annotations = read_data(tmp_path, content(person(bbox=[90, 10, 40, 50]), images=[image]))
    assert kinds(annotations) == [("image size not positive", False)]
    assert annotations.instances[0].image_size is None
    assert annotations.instances[0].bbox == (90, 10, 39, 49)


@pytest.mark.fault(23)
def test_suspicious_values_are_reported_and_used(tmp_path: Path) -> None:
    annotations = read_data(
        tmp_path,
        content(
            person(id=1, keypoints=points_with(3, 150, 20, 2)),
            person(id=2, bbox=[80, -20, 40, 50]),
            person(id=3, num_keypoints=5),
            person(id=4, keypoints=points_with(3, float("nan"), 20, 2), num_keypoints=16),
        ),
    )
    assert kinds(annotations) == [
        ("box leaves its image", False),
        ("keypoint not finite", False),
        ("keypoint outside its image", False),
        ("num_keypoints inconsistent", False),
    ]
    assert "[150.0, 20.0], image size 100 x 80" in annotations.problems[2].what
    outside, leaving, _, broken = annotations.instances
    assert outside.keypoints[3].tolist() == [150, 20, 2]
    assert leaving.bbox == (80, 0, 19, 49)
    assert broken.keypoints[3].tolist() == [0, 0, 0]
    assert [item["num_keypoints"] for item in annotations.coco["annotations"]] == [17, 17, 17, 16]
    assert np.isfinite(annotations.coco["annotations"][3]["keypoints"]).all()


@pytest.mark.fault(22)
def test_crowds_and_people_without_keypoints_are_no_problem_but_ground_truth_only(tmp_path: Path) -> None:
    crowd = person(id=1, iscrowd=1)
    unlabelled = person(id=2, keypoints=[0] * 51, num_keypoints=0)
    annotations = read_data(tmp_path, content(crowd, unlabelled, person(id=3)))
    assert not annotations.problems
    assert [instance.id for instance in annotations.instances] == [3]
    assert [item["id"] for item in annotations.coco["annotations"]] == [1, 2, 3]
    assert [item["iscrowd"] for item in annotations.coco["annotations"]] == [1, 0, 0]


def test_missing_optional_fields_have_their_defaults(tmp_path: Path) -> None:
    bare = {"id": 1, "image_id": 7, "bbox": [5, 10, 40, 50], "keypoints": POINTS}
    data = {"images": content()["images"], "annotations": [bare]}
    annotations = read_data(tmp_path, data)
    truth = annotations.coco["annotations"][0]
    assert annotations.instances[0].area == 2000
    assert (truth["area"], truth["iscrowd"], truth["num_keypoints"], truth["category_id"]) == (2000, 0, 17, 1)


def test_annotation_ids_that_pycocotools_can_not_use_are_renumbered_in_the_ground_truth(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, content(person(id=0), person(id="b", bbox=[50, 10, 40, 50])))
    assert [instance.id for instance in annotations.instances] == [0, "b"]
    assert [item["id"] for item in annotations.coco["annotations"]] == [1, 2]


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('{"images": [},\n', "line 1, column 13"),
        ('{"images":\n [1, 2', "line 2"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[1, 2]", "expected an object with 'images' and 'annotations', found a list"),
        ('"text"', "found a str"),
        ("{}", "expected a list 'images', found only nothing"),
        ('{"images": [1]}', "expected a list 'annotations', found only images"),
        ('{"images": [1], "annotations": {}}', "'annotations', found a dict"),
        ('{"images": [1], "annotations": []}', "'annotations' is empty"),
        ('{"images": [], "annotations": [1]}', "'images' is empty"),
        ("[" * 100000, "not usable JSON|not JSON"),
        ("1" * 5000, "not usable JSON"),
    ],
)
def test_a_file_of_another_form_is_a_data_error(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_text(tmp_path, text)
    assert "a.json" in str(error.value)


@pytest.mark.fault(22)
def test_a_file_without_a_usable_person_still_reads(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, content(person(keypoints=[])))
    assert not annotations.instances
    assert annotations.coco["annotations"] == []


def test_boxes_need_no_keypoints_and_only_people_count(tmp_path: Path) -> None:
    data = content(
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 10, 40, 50]},
        person(id=2, keypoints=[]),
        {"id": 3, "image_id": 7, "category_id": 18, "bbox": "a dog, never looked at"},
        person(id=4, iscrowd=1),
        {"id": 5, "image_id": 7, "category_id": 1, "bbox": [5, 10, 40, 0]},
    )
    annotations = read_data(tmp_path, data, "people")
    assert [instance.id for instance in annotations.instances] == [1, 2]
    assert all(instance.keypoints.shape == (0, 3) for instance in annotations.instances)
    assert kinds(annotations) == [("box without size", True)]


def test_boxes_are_clipped_by_the_published_rule() -> None:
    boxes = np.array([[10, 20, 30, 40], [-5, -5, 30, 40], [90, 70, 30, 40], [5, 5, 1, 1]], dtype=float)
    clipped = clip_boxes(boxes, np.tile([100.0, 80.0], (4, 1)))
    assert clipped.tolist() == [[10, 20, 29, 39], [0, 0, 29, 39], [90, 70, 9, 9], [5, 5, 0, 0]]
    assert clip_boxes(boxes[2:3], np.full((1, 2), np.inf)).tolist() == [[90, 70, 29, 39]]


def test_rows_of_numbers_are_told_from_others() -> None:
    values, good = number_rows([[1, 2.5], ["1", 2], [None, 1], [[1], [2]], [3, 4]], 2)
    assert good.tolist() == [True, False, False, False, True]
    assert values[good].tolist() == [[1, 2.5], [3, 4]]
    assert number_rows([["1", "2"], ["3", "4"]], 2)[1].tolist() == [False, False]
    assert number_rows([[[1, 2], [3, 4]]], 2)[1].tolist() == [False]
    assert number_rows([], 4)[0].shape == (0, 4)
