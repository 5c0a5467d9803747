"""COCO-WholeBody annotation files, made up in the exact public form (data_format.md of jin-s13/COCO-WholeBody)."""

from typing import Any

import numpy as np

PARTS = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
VALID = {"foot_kpts": "foot_valid", "face_kpts": "face_valid"}
VALID |= {"lefthand_kpts": "lefthand_valid", "righthand_kpts": "righthand_valid"}


def whole_body_file(images: int, people: int, seed: int = 0) -> dict[str, Any]:
    """Some parts are not valid and all zero; face and hands have confidences for visibilities; some are crowds."""
    rng = np.random.default_rng(seed)
    annotations = [_person(number, int(rng.integers(images)) + 1, rng) for number in range(1, people + 1)]
    described = [{"id": n, "file_name": f"{n:012}.jpg", "width": 640, "height": 640} for n in range(1, images + 1)]
    return {"images": described, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def _person(number: int, image: int, rng: np.random.Generator) -> dict[str, Any]:
    side, (x, y) = rng.uniform(60, 220), rng.uniform(0, 400, 2)
    crowd = rng.random() < 0.1
    record: dict[str, Any] = {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [x, y, side, side],
        "area": 0.6 * side**2,
        "iscrowd": int(crowd),
    }
    for field, count in PARTS.items():
        points = np.column_stack([rng.uniform((x, y), (x + side, y + side), (count, 2)), np.full(count, 2.0)])
        points[rng.random(count) < 0.2] = 0
        if field in VALID:
            valid = bool(rng.random() < 0.6)
            record[VALID[field]] = valid
            points[points[:, 2] > 0, 2] = rng.uniform(0.3, 1, (points[:, 2] > 0).sum())
            points *= valid
        if crowd:
            points *= 0
        record[field] = points.ravel().tolist()
    for box in ("face_box", "lefthand_box", "righthand_box"):
        record[box] = [0.0, 0.0, 0.0, 0.0]
    record["num_keypoints"] = int(sum(flag > 0 for flag in record["keypoints"][2::3]))
    return record
