"""COCO-WholeBody, AP-10K and APT-36K files of the public form: what is used, what is reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import read
from pipeline.data.check import check
from pipeline.data.definitions import DatasetSource
from tests.data.readers.helpers import kinds, read_data
from tests.evaluation.whole_bodies import PARTS, whole_body_file

SPECIES = [{"id": 3, "name": "dog", "supercategory": "Canidae"}, {"id": 21, "name": "cow", "supercategory": "Bovidae"}]


def changed(**changes: Any) -> dict[str, Any]:
    """A file of sound people, the second of them changed."""
    data = whole_body_file(2, 12, seed=2)
    data["annotations"] = [one for one in data["annotations"] if not one["iscrowd"]][:3]
    data["annotations"][1] |= changes
    return data


def animals() -> dict[str, Any]:
    """An AP-10K file: species for categories, no crowd flag."""
    points = [number for joint in range(17) for number in (10 + joint, 20 + 2 * joint, 2)]
    shared = {"keypoints": points, "num_keypoints": 17, "bbox": [5, 10, 40, 60], "area": 2400}
    images = [{"id": 1, "file_name": "000000000001.jpg", "width": 100, "height": 80, "background": 1, "license": 1}]
    annotations = [{"id": n, "image_id": 1, "category_id": 3 + 18 * (n % 2), **shared} for n in (1, 2)]
    annotations[1] = annotations[1] | {"bbox": [30, 5, 50, 70]}
    return {"images": images, "annotations": annotations, "categories": SPECIES, "info": {}}


def test_all_fields_of_a_person_are_one_row_of_keypoints(tmp_path: Path) -> None:
    data = changed()
    annotations = read_data(tmp_path, data, "wholebody", split="val")
    assert not annotations.problems and len(annotations.instances) == 3
    for record, instance in zip(data["annotations"], annotations.instances, strict=True):
        rows = np.array([number for field in PARTS for number in record[field]]).reshape(133, 3)
        assert np.array_equal(instance.keypoints[:, :2], rows[:, :2])
        assert np.array_equal(instance.keypoints[:, 2], np.where(rows[:, 2] > 0, 2, 0))
    counts = [int((instance.keypoints[:, 2] > 0).sum()) for instance in annotations.instances]
    assert [record["num_keypoints"] for record in annotations.coco["annotations"]] == counts


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"face_kpts": None}, ("mistyped record", True)),
        ({"foot_kpts": [0.0] * 15}, ("wrong keypoint count", True)),
        ({"lefthand_kpts": [5.0, 5.0, -1.0] + [0.0] * 60}, ("visibility not 0, 1 or 2", True)),
        ({"righthand_kpts": ["5", 5.0, 1.0] + [0.0] * 60}, ("mistyped record", True)),
        ({"foot_kpts": [50.0, 50.0, 2.0] * 6, "foot_valid": False}, ("invalid part labelled", False)),
        ({"keypoints": [0.0] * 51, "num_keypoints": 0}, None),
    ],
)
def test_what_is_wrong_with_a_part_is_named(
    tmp_path: Path, changes: dict[str, Any], problem: tuple[str, bool] | None
) -> None:
    annotations = read_data(tmp_path, changed(**changes), "wholebody", split="val")
    assert kinds(annotations) == ([problem] if problem else [])
    used = problem is not None and not problem[1]  # who has no body is left out in silence, as who has no keypoints
    assert len(annotations.instances) == (3 if used else 2)
    for found in annotations.problems:
        assert found.kind == "visibility not 0, 1 or 2" or next(iter(changes)) in found.what


def test_species_are_kept_and_every_category_is_read(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, animals(), "ap10k")
    assert not annotations.problems
    assert [instance.category for instance in annotations.instances] == [21, 3]
    assert [category["id"] for category in annotations.coco["categories"]] == [21, 3]
    broken = animals()
    del broken["annotations"][0]["category_id"]
    assert kinds(read_data(tmp_path, broken, "ap10k")) == [("mistyped record", True)]


@pytest.mark.parametrize(
    ("name", "split", "annotations", "image"),
    [
        ("wholebody", "train", "coco/annotations/coco_wholebody_train_v1.0.json", "coco/train2017/000000000001.jpg"),
        ("ap10k", "val", "ap10k/annotations/ap10k-val-split1.json", "ap10k/data/000000000001.jpg"),
        ("apt36k", "train", "apt36k/annotations/train_annotations_1.json", "apt36k/dog/clip1/000000000001.jpg"),
    ],
)
def test_the_public_tree_is_found_and_sound(
    tmp_path: Path, name: str, split: str, annotations: str, image: str
) -> None:
    data = whole_body_file(1, 6, seed=1) if name == "wholebody" else animals()
    if name == "apt36k":
        data["images"][0] |= {"file_name": "dog/clip1/000000000001.jpg", "video_id": 1, "frame_id": 0}
    size = data["images"][0]["width"], data["images"][0]["height"]
    for place in (annotations, image):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations).write_text(json.dumps(data))
    Image.new("RGB", size).save(tmp_path / image)
    source = DatasetSource(name=name, split=split)
    report = check(source, tmp_path)
    assert report.sound and report.missing_images == 0
    assert report.people == len(read(source, tmp_path).instances) >= 2
