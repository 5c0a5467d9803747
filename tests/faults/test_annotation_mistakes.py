"""Annotation files with mistakes, in every format: found, counted, decided by rule, and the same each time.

What each reader makes of each mistake of a record is in tests/data/readers; here is what must hold across them.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.annotations import Annotations, read, read_detections
from pipeline.data.check import check
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.score import score
from tests.data.readers.helpers import read_text

SIZE = (400, 300)
COCO_LIKE = ("coco", "aic", "crowdpose", "ochuman")


def points(name: str, visibility: int = 2, person: int = 0) -> list[float]:
    """Keypoints within 20..40 x 20..50, 40 pixels to the right for each further person."""
    count = load_definition(name).num_keypoints
    return [value for n in range(count) for value in (20.0 + n + 40 * person, 20.0 + 1.5 * n, visibility)]


def coco_file(name: str, *people: dict[str, Any], images: list[Any] | None = None) -> dict[str, Any]:
    base = {"image_id": 7, "category_id": 1, "bbox": [15, 15, 40, 50], "area": 900.0, "iscrowd": 0}
    sound = {**base, "num_keypoints": load_definition(name).num_keypoints}
    records = [
        {"id": number, **sound, "keypoints": points(name, person=number - 1), **person}
        for number, person in enumerate(people, start=1)
    ]
    images = images or [{"id": 7, "file_name": "7.jpg", "width": SIZE[0], "height": SIZE[1]}]
    return {"images": images, "annotations": records, "categories": [{"id": 1, "name": "person"}]}


def aic_file(*people: dict[str, Any]) -> list[dict[str, Any]]:
    """The original release: a box by its corners, visibilities 1, 2, 3."""
    record: dict[str, Any] = {"image_id": "7", "human_annotations": {}, "keypoint_annotations": {}}
    for number, person in enumerate(people):
        x, y, width, height = person.get("bbox", [15, 15, 40, 50])
        record["human_annotations"][f"human{number}"] = [x, y, x + width, y + height]
        record["keypoint_annotations"][f"human{number}"] = points("aic", 1, number)
    return [record]


def mpii_file(*people: dict[str, Any]) -> list[dict[str, Any]]:
    joints = np.array(points("mpii")).reshape(-1, 3)[:, :2].tolist()
    sound = {"joints": joints, "joints_vis": [1] * 16, "image": "7.jpg", "center": [35, 40], "scale": 0.3}
    return [{**sound, **person} for person in people]


def written(folder: Path, data: Any, name: str) -> Annotations:
    return read_text(folder, json.dumps(data), name)


def summary(annotations: Annotations) -> list[Any]:
    people = [(one.id, one.image_id, one.bbox, one.keypoints.tobytes(), one.area) for one in annotations.instances]
    return [people, annotations.problems, annotations.coco, annotations.records]


def perfect(annotations: Annotations, times: int = 1) -> list[Prediction]:
    """Every person found where it is annotated, `times` over."""
    found = []
    for one in annotations.instances * times:
        keypoints = one.keypoints.copy()
        keypoints[:, 2] = 1.0
        window = (one.bbox[0] + one.bbox[2] / 2, one.bbox[1] + one.bbox[3] / 2, one.bbox[2] * 1.25, one.bbox[3] * 1.25)
        found.append(Prediction(one.image_id, one.id, keypoints, window, 1.0))
    return found


# 21: duplicates and unknown images


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", COCO_LIKE)
def test_duplicates_and_unknown_images_are_dropped_counted_and_do_not_change_ap(tmp_path: Path, name: str) -> None:
    """Of equal ids the first counts; AP of perfect predictions is 100, and a doubled person is not counted twice."""
    sound = coco_file(name, {}, {"bbox": [50, 20, 40, 50]})
    doubled = json.loads(json.dumps(sound))
    doubled["annotations"] += [sound["annotations"][0], {**sound["annotations"][1], "id": 9, "image_id": 8}]
    doubled["images"] += [{"id": 7, "file_name": "other.jpg", "width": 5, "height": 5}]
    plain, found = written(tmp_path, sound, name), written(tmp_path, doubled, name)
    assert [(p.kind, p.dropped) for p in found.problems] == [
        ("duplicate image id", True),
        ("duplicate annotation id", True),
        ("unknown image", True),
    ]
    assert found.records == 4
    assert [one.id for one in found.instances] == [one.id for one in plain.instances] == [1, 2]
    assert found.coco == plain.coco
    assert score(found, perfect(found)).metrics == score(plain, perfect(plain)).metrics
    assert score(found, perfect(found)).metrics["AP"] == pytest.approx(100)
    assert score(found, perfect(found, times=2)).metrics == score(plain, perfect(plain)).metrics


@pytest.mark.fault(21)
def test_an_image_twice_in_the_original_aic_release_counts_once(tmp_path: Path) -> None:
    """Its people were read with the first record; those of the second would be found missing by every model."""
    [record] = aic_file({}, {"bbox": [50, 20, 40, 50]})
    found = written(tmp_path, [record, record], "aic")
    assert len(found.instances) == len(found.coco["annotations"]) == 2 and found.records == 4
    assert [(p.kind, p.dropped) for p in found.problems] == [("duplicate image id", True)]
    assert "its 2 people are left out" in found.problems[0].what
    assert score(found, perfect(found)).metrics["AP"] == pytest.approx(100)


@pytest.mark.fault(21)
def test_people_and_images_under_two_ids_are_told_by_data_check(tmp_path: Path) -> None:
    """Nobody can say which of two ids is meant, so they are used, and `data check` names both."""
    images = [{"id": n, "file_name": "7.jpg", "width": SIZE[0], "height": SIZE[1]} for n in (7, 8)]
    people = [{"keypoints": points("coco")}, {"keypoints": points("coco")}, {"bbox": [55, 15, 140, 150]}]
    (tmp_path / "a.json").write_text(json.dumps(coco_file("coco", *people, images=images)))
    Image.new("RGB", SIZE).save(tmp_path / "7.jpg")
    report = check(DatasetSource(name="coco", annotations="a.json", images="."), tmp_path)
    assert {kind: (group.count, group.dropped) for kind, group in report.problems.items()} == {
        "person annotated twice": (1, 0),
        "image under two ids": (1, 0),
    }
    assert "annotation 2" in report.problems["person annotated twice"].records[0].where


# 22: nobody there


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", [*COCO_LIKE, "mpii"])
@pytest.mark.parametrize("text", ["", " \n", "{}", "[]", '{"images": [], "annotations": []}', "null", "0", '""'])
def test_an_empty_annotation_file_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    """Nothing to read is no dataset, in every format."""
    with pytest.raises(DataError, match=r"a\.json: ") as caught:
        read_text(tmp_path, text, name)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", COCO_LIKE)
def test_people_without_keypoints_and_images_without_people_are_left_out_as_published(
    tmp_path: Path, name: str
) -> None:
    """As mmpose and pycocotools: not used, no miss, no false alarm; num_keypoints is recounted unless it is 0."""
    count = load_definition(name).num_keypoints
    images = [{"id": n, "file_name": f"{n}.jpg", "width": SIZE[0], "height": SIZE[1]} for n in (7, 8)]
    nobody = {"keypoints": points(name, 0), "num_keypoints": 0}
    people = [{}, nobody, {"num_keypoints": 3}, {"num_keypoints": 0}, {**nobody, "num_keypoints": 5}]
    found = written(tmp_path, coco_file(name, *people, images=images), name)
    assert [one.id for one in found.instances] == [1, 3]
    assert list(found.images) == [7, 8]
    assert [(p.kind, p.dropped) for p in found.problems] == [
        ("num_keypoints inconsistent", False),
        ("num_keypoints inconsistent", True),
        ("num_keypoints inconsistent", False),
    ]
    assert [record["num_keypoints"] for record in found.coco["annotations"]] == [count, 0, count, 0, 0]
    assert score(found, perfect(found)).metrics["AP"] == pytest.approx(100)


@pytest.mark.fault(22)
def test_mpii_people_without_joints_are_left_out(tmp_path: Path) -> None:
    """Their ids stay: the others keep their place in mpii_gt_val.mat."""
    found = written(tmp_path, mpii_file({"joints_vis": [0] * 16}, {}), "mpii")
    assert [one.id for one in found.instances] == [1] and not found.problems


# 23: boxes and keypoints

NAN, INF = float("nan"), float("inf")
BOXES = [
    ([15, 15, 0, 50], True),
    ([15, 15, 40, 0], True),
    ([15, 15, -40, 50], True),
    ([15, 15, 40, -50], True),
    ([NAN, 15, 40, 50], True),
    ([15, 15, INF, 50], True),
    ([15, 15, 1e300, 1e300], True),
    ([-1e300, 15, 40, 50], True),
    ([1e7, 1e7, 40, 50], True),
    ([-200, -200, 40, 50], True),
    ([-5, -5, 40, 50], False),
]


@pytest.mark.fault(23)
@pytest.mark.parametrize(("box", "dropped"), BOXES, ids=[str(box) for box, _ in BOXES])
@pytest.mark.parametrize("name", [*COCO_LIKE, "aic original"])
def test_impossible_boxes_are_dropped_and_those_that_reach_out_are_clipped(
    tmp_path: Path, name: str, box: list[float], dropped: bool
) -> None:
    """By rule, counted, the same each time, and no warning of numpy; the neighbour is used."""
    kind = name.removesuffix(" original")
    data = aic_file({"bbox": box}, {}) if name != kind else coco_file(kind, {"bbox": box}, {})
    found = written(tmp_path, data, kind)
    assert [(p.dropped) for p in found.problems] == [dropped]
    assert [one.id for one in found.instances] == ([2] if dropped else [1, 2])
    if not dropped:
        assert found.instances[0].bbox[:2] == (0, 0)
    assert np.isfinite([value for one in found.instances for value in (*one.bbox, one.area)]).all()
    assert np.isfinite([value for one in found.coco["annotations"] for value in (*one["bbox"], one["area"])]).all()
    again = written(tmp_path, data, kind)
    assert repr(summary(again)) == repr(summary(found))


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "change",
    [{"scale": value} for value in (0, -1, NAN, INF, 1e300, 1e6)]
    + [{"center": value} for value in ([NAN, 5], [1e300, 5], [5, INF], [-1, -1])],
)
def test_impossible_mpii_places_are_dropped(tmp_path: Path, change: dict[str, Any]) -> None:
    """A window that is not finite, or larger than any image, never reaches training."""
    found = written(tmp_path, mpii_file(change, {}), "mpii")
    assert [(p.kind, p.dropped) for p in found.problems] == [("box without size", True)]
    assert [one.id for one in found.instances] == [1]


KEYPOINTS = [
    ([500, 30, 2], "keypoint outside its image", False),
    ([-30, 30, 1], "keypoint outside its image", False),
    ([NAN, 30, 2], "keypoint not finite", False),
    ([1e300, 30, 2], "keypoint not finite", False),
    ([20, 30, 3], "visibility", True),
    ([20, 30, -1], "visibility", True),
    ([20, 30, 0.5], "visibility", True),
    ([20, 30, NAN], "visibility", True),
    ([20, 30], "wrong keypoint count", True),
    ([20, 30, 2, 20, 30, 2], "wrong keypoint count", True),
]


@pytest.mark.fault(23)
@pytest.mark.parametrize(("point", "kind", "dropped"), KEYPOINTS, ids=[f"{kind}-{p}" for p, kind, _ in KEYPOINTS])
@pytest.mark.parametrize("name", COCO_LIKE)
def test_impossible_keypoints_are_dropped_or_not_labelled_by_rule(
    tmp_path: Path, name: str, point: list[float], kind: str, dropped: bool
) -> None:
    """Outside the image: used and told. Nowhere: not labelled. Of another kind or number: the person is dropped."""
    first = [*point, *points(name)[3:]]
    found = written(tmp_path, coco_file(name, {"keypoints": first}, {}), name)
    assert found.problems[0].kind.startswith(kind) and found.problems[0].dropped == dropped
    assert [one.id for one in found.instances] == ([2] if dropped else [1, 2])
    if kind == "keypoint not finite":
        assert found.instances[0].keypoints[0].tolist() == [0, 0, 0]
        assert [p.kind for p in found.problems[1:]] == ["num_keypoints inconsistent"]
    values = [value for one in found.coco["annotations"] for value in one["keypoints"]]
    assert np.isfinite(values).all() and np.abs(values).max() < 1e6
    assert score(found, perfect(found)).metrics["AP"] == pytest.approx(100)


@pytest.mark.fault(23)
@pytest.mark.parametrize("joint", [[NAN, 1], [1e300, 1], [5, INF]])
def test_mpii_joints_that_lie_nowhere_are_not_labelled(tmp_path: Path, joint: list[float]) -> None:
    """The person is used without the joint."""
    joints = mpii_file({})[0]["joints"]
    found = written(tmp_path, mpii_file({"joints": [joint, *joints[1:]]}), "mpii")
    assert [(p.kind, p.dropped) for p in found.problems] == [("keypoint not finite", False)]
    assert found.instances[0].keypoints[0].tolist() == [0, 0, 0]


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", COCO_LIKE)
def test_corners_given_as_width_and_height_are_told_by_data_check(tmp_path: Path, name: str) -> None:
    """x1, y1, x2, y2 in the place of x, y, width, height is the commonest mistake of all: said in one line, once."""
    rng = np.random.default_rng(1)
    people = []
    for number in range(12):
        x, y = rng.uniform(5, 200, 2).tolist()
        width, height = rng.uniform(30, 80, 2).tolist()
        spread = rng.uniform(0.1, 0.9, (load_definition(name).num_keypoints, 2)) * (width, height) + (x, y)
        flat = [value for px, py in spread.tolist() for value in (px, py, 2)]
        people.append({"id": number + 1, "bbox": [x, y, width, height], "keypoints": flat})
    images = [{"id": 7, "file_name": "7.jpg", "width": 320, "height": 300}]
    Image.new("RGB", (320, 300)).save(tmp_path / "7.jpg")
    source = DatasetSource(name=name, annotations="a.json", images=".")

    def told(corners: bool) -> bool:
        boxes = [p["bbox"] for p in people]
        wrong = [[x, y, x + w, y + h] if corners else [x, y, w, h] for x, y, w, h in boxes]
        changed = [{**person, "bbox": box} for person, box in zip(people, wrong, strict=True)]
        (tmp_path / "a.json").write_text(json.dumps(coco_file(name, *changed, images=images)))
        return "boxes look like corners" in check(source, tmp_path).problems

    assert told(corners=True) and not told(corners=False)


@pytest.mark.fault(23)
def test_real_boxes_do_not_look_like_corners(samples: Path) -> None:
    """No false alarm on the real datasets."""
    for name, split in [("coco", "train"), ("coco", "val"), ("aic", "val"), ("ochuman", "val"), ("crowdpose", "test")]:
        assert "boxes look like corners" not in check(DatasetSource(name=name, split=split), samples).problems


@pytest.mark.fault(23)
def test_huge_detections_are_left_out(tmp_path: Path) -> None:
    """A detector's box larger than any image is as good as one without a size."""
    boxes = [[15, 15, 40, 50], [15, 15, 1e300, 1e300], [1e9, 15, 40, 50]]
    entries = [{"image_id": 7, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    found = read_text(tmp_path, json.dumps(coco_file("coco", {})), "coco", detections="d.json")
    assert [detection.bbox for detection in read_detections(found)] == [(15, 15, 40, 50)]


# JSON as such, and names

HOSTILE_JSON = [
    "[" * 200_000,
    '{"images": ' + "[" * 200_000,
    '{"a":' * 100_000,
    "1" * 10_000,
    "-",
    '{"images": 1, "images": 2}',
    "NaN",
    "Infinity",
    '"' + "x" * 1000,
    b"\xff\xfe\xfd",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"\x00" * 100,
    '{"images": [{"id": NaN}], "annotations": [NaN]}',
]


@pytest.mark.fault(23)
@pytest.mark.parametrize("number", range(len(HOSTILE_JSON)))
@pytest.mark.parametrize("name", [*COCO_LIKE, "mpii"])
def test_hostile_json_is_one_line_or_no_person_within_seconds(tmp_path: Path, name: str, number: int) -> None:
    """Nested without end, of huge numbers, no text, no JSON: one line with the file, at once."""
    started = time.process_time()
    try:
        assert not read_text(tmp_path, HOSTILE_JSON[number], name).instances
    except DataError as error:
        assert "a.json" in str(error) and "\n" not in str(error) and len(str(error)) < 500
    assert time.process_time() - started < 5


@pytest.mark.fault(23)
@pytest.mark.parametrize("size", [[10**400, 80], [True, 80], [1e300, 80], [10**9, 80], [-1, -1], ["100", "80"]])
def test_impossible_image_sizes_are_taken_as_unknown(tmp_path: Path, size: list[Any]) -> None:
    """And the box is then clipped at the near side only."""
    images = [{"id": 7, "file_name": "7.jpg", "width": size[0], "height": size[1]}]
    found = written(tmp_path, coco_file("coco", {"bbox": [90, 10, 40, 50]}, images=images), "coco")
    assert [(p.kind, p.dropped) for p in found.problems] == [("image size not positive", False)]
    assert found.instances[0].image_size is None and found.instances[0].bbox == (90, 10, 39, 49)


NAMES = ["../7.jpg", "a/../../7.jpg", "/etc/hostname", "http://127.0.0.1:1/7.jpg", "file:///etc/hostname", "a\0.jpg"]


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", [*NAMES, "a\n.jpg", "\ud800.jpg"])
def test_an_annotation_file_does_not_choose_what_else_is_read(tmp_path: Path, name: str) -> None:
    """An image name leads to a file below the image folder: no way up, no other place, no address, in every format."""
    images = [{"id": 7, "file_name": name, "width": 100, "height": 80}, {"id": 8, "file_name": "sub/8.jpg"}]
    found = written(tmp_path, coco_file("coco", {}, {"image_id": 8}, images=images), "coco")
    assert [(p.kind, p.dropped) for p in found.problems] == [
        ("image outside its folder", True),
        ("unknown image", True),
    ]
    assert [one.image for one in found.instances] == [f"{tmp_path}/./sub/8.jpg"]
    found = written(tmp_path, mpii_file({"image": name}, {}), "mpii")
    assert [(p.kind, p.dropped) for p in found.problems] == [("image outside its folder", True)]
    assert [one.image_id for one in found.instances] == ["7.jpg"]
    [record] = aic_file({})
    found = written(tmp_path, [{**record, "image_id": name.removesuffix(".jpg")}, record], "aic")
    assert [one.image_id for one in found.instances] == ["7"]
    assert {p.kind for p in found.problems} == {"image outside its folder", "unknown image"}


@pytest.mark.fault(23)
def test_ids_with_control_characters_do_not_forge_lines_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a file calls its records is shown as one line."""
    evil = "1\n10:00:00 error: everything is lost \ud800"
    data = coco_file("coco", {"id": evil, "bbox": [15, 15, 0, 0]}, {"id": "x" * 5000, "bbox": [15, 15, 0, 0]}, {})
    with caplog.at_level(logging.INFO):
        found = written(tmp_path, data, "coco")
    for problem in found.problems:
        text = f"{problem.where}: {problem.what}"
        assert "\n" not in text and len(text) < 500
        text.encode()


def seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


@pytest.mark.fault(23)
def test_a_file_in_which_every_record_is_wrong_takes_no_longer_than_a_sound_one_by_much(tmp_path: Path) -> None:
    """5,000 wrong records are read in seconds."""
    people = [{"bbox": [15, 15, NAN, "x"], "keypoints": [[]] * 51} for _ in range(5_000)]
    (tmp_path / "a.json").write_text(json.dumps(coco_file("coco", *people, {})))
    source = DatasetSource(name="coco", annotations="a.json", images=".")
    assert seconds(lambda: read(source, tmp_path)) < 5
