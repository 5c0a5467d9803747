"""AP by part: body, feet, face and hands of COCO-WholeBody, each on its own.

As in the dataset's own evaluation (xtcocotools, COCOeval with `keypoints_foot` and so on): a person counts for a part
where a keypoint of it is labelled, distances are scaled by the area of the whole person, scores are those of the whole
person, and a detection's area is that around its first part, the body.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.evaluation.coco import evaluate_images


def evaluate_parts(
    truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    definition: DatasetDefinition,
    *,
    image_ids: Collection[int | str] | None = None,
) -> dict[str, float]:
    """AP_<part> and AR_<part> in percent for each part of the definition, -1 where nobody has it; arguments as
    `evaluate_images`."""
    areas = [_area(result["keypoints"], definition.parts[0].count) for result in results] if definition.parts else []
    values: dict[str, float] = {}
    start = 0
    for part in definition.parts:
        cut = slice(3 * start, 3 * (start + part.count))
        people = [_part_of(annotation, cut) for annotation in truth["annotations"]]
        found = [
            {**result, "keypoints": result["keypoints"][cut], "area": area}
            for result, area in zip(results, areas, strict=True)
            if any(score > 0 for score in result["keypoints"][cut][2::3])
        ]
        alone = _alone(definition, start, part.count)
        metrics = evaluate_images({**truth, "annotations": people}, found, alone, image_ids=image_ids).metrics()
        values |= {f"{metric}_{part.name}": metrics[metric] for metric in ("AP", "AR")}
        start += part.count
    return values


def _part_of(annotation: dict[str, Any], cut: slice) -> dict[str, Any]:
    keypoints = annotation["keypoints"][cut]
    return {**annotation, "keypoints": keypoints, "num_keypoints": sum(flag > 0 for flag in keypoints[2::3])}


def _alone(definition: DatasetDefinition, start: int, count: int) -> DatasetDefinition:
    """The definition as far as the metric reads it, of one part."""
    own = slice(start, start + count)
    return definition.model_copy(
        update={"keypoints": definition.keypoints[own], "sigmas": definition.sigmas[own], "parts": ()}
    )


def _area(keypoints: Sequence[float], count: int) -> float:
    width, height = np.ptp(np.reshape(keypoints, (-1, 3))[:count, :2], axis=0)
    return float(width * height)
