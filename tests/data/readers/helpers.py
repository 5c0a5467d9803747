"""Small annotation files made for a test."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.annotations import Annotations, read
from pipeline.data.definitions import DatasetSource

POINTS = [coordinate for number in range(17) for coordinate in (10 + number, 20 + number, 1 + number % 2)]


def person(**changes: Any) -> dict[str, Any]:
    """A sound COCO annotation on image 7, of 100 x 80 pixels."""
    fields = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [5, 10, 40, 50], "area": 900.0, "iscrowd": 0}
    return fields | {"num_keypoints": 17, "keypoints": list(POINTS)} | changes


def points_with(index: int, x: Any, y: Any, v: Any) -> list[Any]:
    """POINTS with one keypoint replaced."""
    points: list[Any] = list(POINTS)
    points[3 * index : 3 * index + 3] = [x, y, v]
    return points


def content(*annotations: Any, images: list[Any] | None = None) -> dict[str, Any]:
    images = [{"id": 7, "file_name": "seven.jpg", "width": 100, "height": 80}] if images is None else images
    return {"images": images, "annotations": list(annotations), "categories": [{"id": 1, "name": "person"}]}


def read_text(folder: Path, text: str | bytes, name: str = "coco", **source: Any) -> Annotations:
    (folder / "a.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return read(DatasetSource(name=name, annotations="a.json", images=".", **source), folder)


def read_data(folder: Path, data: Any, name: str = "coco", **source: Any) -> Annotations:
    return read_text(folder, json.dumps(data), name, **source)


def kinds(annotations: Annotations) -> list[tuple[str, bool]]:
    return [(problem.kind, problem.dropped) for problem in annotations.problems]


def perfect_score(annotations: Annotations) -> float:
    """AP by pycocotools of the ground truth's own keypoints."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = copy.deepcopy(annotations.coco)
    truth.createIndex()
    results = [
        {"image_id": item["image_id"], "category_id": 1, "keypoints": item["keypoints"], "score": 1.0}
        for item in annotations.coco["annotations"]
        if item["num_keypoints"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(annotations.definition.sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])
