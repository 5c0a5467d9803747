"""Object keypoint similarity (OKS), and what top-down evaluation does with it before AP: rescoring and OKS-NMS."""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.instance import Instance
from pipeline.evaluation.predictions import Prediction

AREA_PER_BOX = 0.53
"""Share of a box that a person covers: stands in for the segment's area where none is annotated (AI Challenger and
CrowdPose evaluation code)."""


def oks(
    points: np.ndarray, others: np.ndarray, areas: np.ndarray | float, sigmas: Sequence[float] | np.ndarray
) -> np.ndarray:
    """The similarity of each keypoint, exp(-d^2 / (2 area (2 sigma)^2)); OKS is its mean over the keypoints that count.

    points, others: (..., K, 2) pixels; areas: (...) pixels squared, or one for all; sigmas: (K,). Returns (..., K).
    As in the COCO keypoint evaluation and pycocotools (`computeOks`).
    """
    squared = np.square(np.asarray(points, np.float64) - np.asarray(others, np.float64)).sum(axis=-1)
    variances = np.square(2 * np.asarray(sigmas, np.float64))
    return np.exp(-squared / variances / (np.asarray(areas, np.float64)[..., None] + np.spacing(1)) / 2)


def rescore(prediction: Prediction, threshold: float = 0.2) -> float:
    """Box score times the mean score of the joints that score above the threshold (0 if none does).

    The score by which published top-down results rank people (mmpose `TopDownCocoDataset.evaluate`, vis_thr 0.2).
    """
    scores = prediction.keypoints[:, 2]
    confident = scores[scores > threshold]
    return float(confident.mean() * prediction.box_score) if len(confident) else 0.0


def oks_nms(
    predictions: Sequence[Prediction],
    scores: Sequence[float] | np.ndarray,
    sigmas: Sequence[float] | np.ndarray,
    threshold: float = 0.9,
) -> np.ndarray:
    """Indices of the people of one image that stay when each drops those with an OKS above the threshold to it.

    Greedy from the highest score, in which order the indices come; among equals the first wins. All joints count, and
    the area is the mean of the two padded windows' (mmpose `oks_nms`).
    """
    if not predictions:
        return np.zeros(0, np.int64)
    points = np.stack([prediction.keypoints[:, :2] for prediction in predictions])
    areas = np.array([prediction.window[2] * prediction.window[3] for prediction in predictions])
    waiting = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    kept = []
    while len(waiting):
        best, rest = waiting[0], waiting[1:]
        kept.append(best)
        similar = oks(points[rest], points[best], (areas[rest] + areas[best]) / 2, sigmas).mean(axis=-1)
        waiting = rest[~(similar > threshold)]
    return np.array(kept, np.int64)


def per_instance_oks(
    predictions: Sequence[Prediction], instances: Iterable[Instance], definition: DatasetDefinition
) -> np.ndarray:
    """(N,) OKS of each prediction to the person whose box it was cropped from, for a look at the best and the worst.

    Only labelled keypoints count; NaN where none is. The area is the one that the dataset's metric uses.
    """
    by_id = {instance.id: instance for instance in instances}
    values = np.full(len(predictions), np.nan)
    for index, prediction in enumerate(predictions):
        assert prediction.instance_id in by_id, f"no instance {prediction.instance_id!r} for a prediction"
        instance = by_id[prediction.instance_id]
        labelled = instance.keypoints[:, 2] > 0
        if labelled.any():
            area = metric_area(definition, instance.bbox, instance.area)
            similar = oks(prediction.keypoints[:, :2], instance.keypoints[:, :2], area, definition.sigmas)
            values[index] = similar[labelled].mean()
    return values


def metric_area(definition: DatasetDefinition, bbox: Sequence[float], area: float) -> float:
    """The area (pixels squared) by which the dataset's metric scales distances; bbox is x, y, width, height."""
    return AREA_PER_BOX * bbox[2] * bbox[3] if definition.metric in ("aic", "crowdpose") else area
