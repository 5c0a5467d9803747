"""Small truths and predictions that the tests of this folder share."""

from typing import Any

import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.instance import Instance
from pipeline.evaluation.coco import evaluate_images
from pipeline.evaluation.predictions import Prediction


def prediction(
    keypoints: np.ndarray,
    image_id: int | str = 1,
    instance_id: int | str | None = None,
    size: float = 100.0,
    box_score: float = 1.0,
) -> Prediction:
    """A prediction with a square window of the given side."""
    return Prediction(image_id, instance_id, keypoints, (50.0, 50.0, size, size), box_score)


def perturbed(instance: Instance, rng: np.random.Generator, noise: float) -> Prediction:
    """A person found with an error of `noise` x the box's longer side; unlabelled joints lie anywhere in the box."""
    x, y, width, height = instance.bbox
    points = instance.keypoints.copy()
    unlabelled = points[:, 2] == 0
    points[unlabelled, :2] = rng.uniform((x, y), (x + width, y + height), (int(unlabelled.sum()), 2))
    points[:, :2] += rng.normal(0, noise * max(width, height) + 1e-9, (len(points), 2))
    points[:, 2] = rng.uniform(0.1, 1, len(points))
    window = (x + width / 2, y + height / 2, 1.25 * width, 1.25 * height)
    return Prediction(instance.image_id, instance.id, points, window, float(rng.uniform(0.5, 1)))


def crowd_of(
    definition: DatasetDefinition, images: int, people: int, rng: np.random.Generator, noise: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO truth and results: `people` random people over images 0, 1, ..., some of them unlabelled crowds or found
    twice, and as many false alarms as a quarter of the people."""
    annotations, results = [], []
    joints = definition.num_keypoints
    for number in range(people):
        side = rng.uniform(40, 200)
        corner = rng.uniform(0, 400, 2)
        points = np.concatenate([corner + rng.uniform(0, side, (joints, 2)), np.full((joints, 1), 2.0)], axis=1)
        points[rng.random(joints) < 0.2] = 0
        hidden = rng.random() < 0.1
        annotations.append(
            {
                "id": number,
                "image_id": int(rng.integers(images)),
                "category_id": 1,
                "bbox": [*corner.tolist(), side, side],
                "area": 0.6 * side**2,
                "iscrowd": int(hidden),
                "num_keypoints": 0 if hidden else int((points[:, 2] > 0).sum()),
                "keypoints": (0 * points if hidden else points).ravel().tolist(),
            }
        )
        for _ in range(2 if rng.random() < 0.2 else 1):
            found = points + rng.normal(0, noise * side, points.shape)
            results.append(result(annotations[-1]["image_id"], found, float(rng.random())))
    for _ in range(people // 4):
        results.append(result(int(rng.integers(images)), rng.uniform(0, 600, (joints, 3)), float(rng.random())))
    truth = {
        "images": [{"id": image} for image in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    return truth, results


def result(image_id: int | str, keypoints: np.ndarray, score: float) -> dict[str, Any]:
    """One entry of a results list."""
    return {"image_id": image_id, "category_id": 1, "keypoints": keypoints.ravel().tolist(), "score": score}


def ap_and_ar(
    truth: dict[str, Any], results: list[dict[str, Any]], definition: DatasetDefinition, **options: Any
) -> dict[str, float]:
    """What `evaluate_images` finds, in numbers."""
    return evaluate_images(truth, results, definition, **options).metrics()
