"""The look over a dataset before training."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.check import CheckReport, check
from pipeline.data.definitions import DatasetSource
from pipeline.errors import DataError

SPREAD = [coordinate for number in range(17) for coordinate in (10 + number, 20 + number, 2)]


def person(number: int, image: int, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "bbox": [5, 10, 40, 50], "keypoints": SPREAD} | changes


def checked(
    folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], **source: Any
) -> CheckReport:
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return check(DatasetSource(name="coco", annotations="a.json", images=".", **source), folder)


def image(folder: Path, number: int, width: int = 100, height: int = 80) -> dict[str, Any]:
    """An image file of 100 x 80 pixels, with a record that says width x height."""
    Image.new("RGB", (100, 80)).save(folder / f"{number}.jpg")
    return {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height}


@pytest.mark.parametrize("name", ["coco", "aic", "mpii", "ochuman"])
def test_the_samples_are_sound(samples: Path, name: str) -> None:
    report = check(DatasetSource(name=name, split="val"), samples)
    assert report.sound
    assert report.missing_images == report.unreadable_images == report.size_mismatches == 0
    assert report.files.truth is None
    assert report.detections == (118 if name == "coco" else None)


def test_keypoints_are_counted_by_name_over_the_people_used(samples: Path) -> None:
    report = check(DatasetSource(name="coco", split="val"), samples)
    raw = json.loads((samples / "coco/annotations/person_keypoints_val2017.json").read_text())["annotations"]
    used = [record for record in raw if record["num_keypoints"] and not record["iscrowd"]]
    assert (report.images, report.annotations, report.people) == (4, 14, len(used))
    assert report.keypoints["nose"] == sum(record["keypoints"][2] > 0 for record in used)
    assert report.keypoints["right_ankle"] == sum(record["keypoints"][50] > 0 for record in used)
    assert sum(report.keypoints.values()) == sum(record["num_keypoints"] for record in used)


def test_crowdpose_counts_without_head_and_neck_and_the_report_says_so(samples: Path) -> None:
    report = check(DatasetSource(name="crowdpose", split="test"), samples)
    group = report.problems["num_keypoints inconsistent"]
    assert (group.count, group.dropped, list(report.problems)) == (4, 0, ["num_keypoints inconsistent"])


def test_images_that_are_missing_broken_or_of_another_size_are_counted_and_named(tmp_path: Path) -> None:
    images = [
        image(tmp_path, 1),
        image(tmp_path, 2),
        image(tmp_path, 3, width=200),
        image(tmp_path, 4),
        image(tmp_path, 5),
    ]
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "4.jpg").write_bytes(b"no image")
    (tmp_path / "5.jpg").write_bytes(b"")
    report = checked(tmp_path, images, [person(1, 1)])
    assert (report.missing_images, report.unreadable_images, report.size_mismatches) == (1, 2, 1)
    assert not report.sound
    assert report.problems["image missing"].records[0].where.endswith("2.jpg")
    assert report.problems["image size differs"].records[0].what == "100 x 80, annotated 200 x 80"
    assert report.problems["image unreadable"].dropped == 2
    assert report.problems["image size differs"].dropped == 0


def test_a_folder_in_an_image_s_place_is_unreadable(tmp_path: Path) -> None:
    record = image(tmp_path, 1)
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "1.jpg").mkdir()
    assert checked(tmp_path, [record], [person(1, 1)]).unreadable_images == 1


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bbox": [5, 10, 3.5, 50]}, "box very elongated"),
        ({"bbox": [5, 10, 90, 8]}, "box very elongated"),
        ({"keypoints": [75, 20, 2, *SPREAD[3:]]}, "keypoint far outside its box"),
        ({"keypoints": [20, 30, 2] * 17}, "keypoints all at one place"),
    ],
)
def test_what_is_possible_but_rarely_meant_is_reported(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    report = checked(tmp_path, [image(tmp_path, 1)], [person(1, 1, **changes), person(2, 1)])
    assert report.people == 2
    assert report.problems[kind].count == 1
    assert "annotation 1 (image 1)" in report.problems[kind].records[0].where


def test_keypoints_a_little_outside_and_single_keypoints_are_fine(tmp_path: Path) -> None:
    # the clipped box ends at 5 + 39 = 44; half its width beyond is 63.5
    near = person(1, 1, keypoints=[63, 20, 2, *SPREAD[3:]])
    single = person(2, 1, keypoints=[20, 30, 2] + [0] * 48)
    assert checked(tmp_path, [image(tmp_path, 1)], [near, single]).sound


def test_problems_are_grouped_by_kind(tmp_path: Path) -> None:
    bad = [person(number, 9) for number in range(10, 20)] + [person(20, 1, num_keypoints=3, bbox=[6, 10, 40, 50])]
    report = checked(tmp_path, [image(tmp_path, 1)], [person(1, 1), *bad])
    assert list(report.problems) == ["unknown image", "num_keypoints inconsistent"]
    group = report.problems["unknown image"]
    assert (group.count, group.dropped, len(group.records)) == (10, 10, 10)
    assert (report.annotations, report.people) == (12, 2)


def test_truth_and_detections_are_reported_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "t.mat").write_bytes(b"")
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    (tmp_path / "d.json").write_text(json.dumps(boxes))
    report = checked(tmp_path, [image(tmp_path, 1)], [person(1, 1)], truth="t.mat", detections="d.json")
    assert Path(report.files.truth).name == "t.mat"
    assert report.detections == 1


def test_an_unusable_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'annotations' is empty"):
        checked(tmp_path, [image(tmp_path, 1)], [])
