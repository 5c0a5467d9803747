"""The original AI Challenger 2017 release: a list of images, each with its people by name (human1, human2, ...)."""

from collections.abc import Iterator
from typing import Any

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.readers.coco import read_coco
from pipeline.data.readers.records import Parsed, Problem, is_id, is_number, named, shown
from pipeline.errors import DataError

VISIBILITY = {1: 2, 2: 1, 3: 0}
"""AI Challenger's visible, occluded, not labelled in COCO's numbers."""


def read_aic(data: Any, definition: DatasetDefinition, file: str, folder: str) -> Parsed:
    """Reads either form of AI Challenger's annotations: the original list, or an object as COCO's (mmpose's file).

    From the original, image ids are the file names' stems, annotation ids count from 1 in file order, boxes are
    x1, y1, x2 - x1, y2 - y1, and image sizes are unknown, so boxes are not clipped at the far side.
    Raises DataError if the content as a whole has neither form.
    """
    if not isinstance(data, list):
        return read_coco(data, definition, file, folder)
    if not data:
        raise DataError(f"{file}: the list of images is empty")
    problems: list[Problem] = []
    images, annotations, records = [], [], 0
    seen: set[int | str] = set()
    for position, record in enumerate(data):
        fault = _fault(record)
        if fault:
            problems.append(Problem(f"{file}: [{position}]", fault, True, "mistyped record"))
            continue
        records += len(record["keypoint_annotations"])
        if record["image_id"] in seen:  # its people are there already: they would count twice
            what = f"the image is there before; its {len(record['keypoint_annotations'])} people are left out"
            place = f"{file}: image {named(record['image_id'])}"
            problems.append(Problem(place, what, True, "duplicate image id"))
            continue
        seen.add(record["image_id"])
        images.append({"id": record["image_id"], "file_name": f"{record['image_id']}.jpg"})
        for annotation in _people(record, definition.num_keypoints, file, problems):
            annotations.append(annotation | {"id": len(annotations) + 1})
    if not annotations:
        raise DataError(f"{file}: none of {records} people in {len(data)} records can be read{_first(problems)}")
    parsed = read_coco({"images": images, "annotations": annotations}, definition, file, folder)
    parsed.problems[:0] = problems
    parsed.records = records
    return parsed


def _fault(record: Any) -> str | None:
    if not isinstance(record, dict) or not is_id(record.get("image_id")):
        return f"expected an object with image_id, found {shown(record)}"
    for field in ("human_annotations", "keypoint_annotations"):
        if not isinstance(record.get(field), dict):
            return f"{field}: expected an object of people, found {shown(record.get(field))}"
    return None


def _people(record: dict[str, Any], keypoints: int, file: str, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """The people of one image in COCO's form, without ids."""
    for person, points in record["keypoint_annotations"].items():
        where = f"{file}: image {named(record['image_id'])}, {named(person)}"
        box = record["human_annotations"].get(person)
        if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
            what = f"human_annotations: expected x1, y1, x2, y2, found {shown(box)}"
            problems.append(Problem(where, what, True, "mistyped record"))
        elif not isinstance(points, list):
            problems.append(Problem(where, f"expected a list, found {shown(points)}", True, "mistyped record"))
        elif len(points) != 3 * keypoints:
            what = f"expected {3 * keypoints} ({keypoints} keypoints of x, y, v) numbers, found {len(points)}"
            problems.append(Problem(where, what, True, "wrong keypoint count"))
        elif wrong := [flag for flag in points[2::3] if not is_number(flag) or flag not in VISIBILITY]:
            problems.append(Problem(where, f"found {shown(wrong[0])}", True, "visibility not 1, 2 or 3"))
        else:
            points = list(points)
            points[2::3] = [VISIBILITY[flag] for flag in points[2::3]]
            x1, y1, x2, y2 = box
            yield {"image_id": record["image_id"], "bbox": [x1, y1, x2 - x1, y2 - y1], "keypoints": points}


def _first(problems: list[Problem]) -> str:
    return f"; the first: {problems[0].where}: {problems[0].what}" if problems else ""
