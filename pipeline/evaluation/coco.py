"""COCO's AP and AR for keypoints, and the variants of AI Challenger and CrowdPose.

pycocotools matches predictions to people, once an image. The curves are accumulated here from those matches, the same
numbers as `COCOeval.accumulate` gives, so that AP can be had for any multiset of images: a crowd level, a bootstrap
resample.
"""

import contextlib
import io
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from pipeline.data.definitions import DatasetDefinition
from pipeline.errors import DataError
from pipeline.evaluation.oks import metric_area, oks_nms, rescore
from pipeline.evaluation.predictions import Prediction

logger = logging.getLogger(__name__)

UNDEFINED = -1.0
"""Where there are no people to find, as in pycocotools."""
CROWD_LEVELS = {"AP_easy": (-np.inf, 0.2), "AP_medium": (0.2, 0.8), "AP_hard": (0.8, np.inf)}
"""Half-open ranges of an image's crowd index. The CrowdPose paper says 0.1, but its released evaluation splits easy
from medium at 0.2, and so do all published numbers."""

_OKS_50, _OKS_75 = 0, 5
_RECALLS = Params("keypoints").recThrs


@dataclass(frozen=True, eq=False)
class AreaMatches:
    """The matches of one range of areas, detections by falling score: D of them, T OKS thresholds, I images."""

    image: np.ndarray
    """(D,) int64 position of each detection's image."""
    hits: np.ndarray
    """(T, D) bool: found a person who counts."""
    misses: np.ndarray
    """(T, D) bool: found none. Neither a hit nor a miss: found someone who does not count."""
    positives: np.ndarray
    """(I,) int64 people who count."""

    def accumulate(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Interpolated precision (T, 101) and recall (T,) when image i is there counts[i] times; None without people.

        Equals `COCOeval.accumulate` on the repeated images: among copies of a detection the last has the highest
        precision, and the interpolation looks no further than that.
        """
        positives = int(counts @ self.positives)
        if positives == 0:
            return None
        thresholds, detections = self.hits.shape
        sampled = np.zeros((thresholds, len(_RECALLS)))
        if detections == 0:
            return sampled, np.zeros(thresholds)
        weights = counts[self.image]
        hits = np.cumsum(self.hits * weights, axis=1, dtype=np.float64)
        misses = np.cumsum(self.misses * weights, axis=1, dtype=np.float64)
        recall = hits / positives
        precision = hits / (misses + hits + np.spacing(1))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for row in range(thresholds):
            at = np.searchsorted(recall[row], _RECALLS, side="left")
            reached = at < detections
            sampled[row, reached] = envelope[row, at[reached]]
        return sampled, recall[:, -1]


@dataclass(frozen=True, eq=False)
class Matches:
    """All images of an evaluation, matched."""

    image_ids: tuple[int | str, ...]
    crowd: np.ndarray | None
    """(I,) float64 crowd index of each image (NaN where it has none) for metric crowdpose; else None."""
    areas: dict[str, tuple[AreaMatches, ...]]
    """By range of areas (all, medium, large), those of each category; one category unless the metric is by category."""

    def average_precision(self, counts: np.ndarray | None = None) -> float:
        """AP in percent when image i is there counts[i] times, by default once; -1 where there are no people."""
        return _mean(self._accumulate("all", self._counts(counts)), 0)

    def metrics(self, counts: np.ndarray | None = None) -> dict[str, float]:
        """AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL in percent; -1 where there are no people of that kind.

        Image i is there counts[i] times, by default once. Metric crowdpose adds AP_easy, AP_medium and AP_hard: AP on the
        images of each level of `CROWD_LEVELS`.
        """
        counts = self._counts(counts)
        found = {name: self._accumulate(name, counts) for name in self.areas}
        values = {}
        for kind, prefix in enumerate(("AP", "AR")):
            values[prefix] = _mean(found["all"], kind)
            values[f"{prefix}50"] = _mean(found["all"], kind, _OKS_50)
            values[f"{prefix}75"] = _mean(found["all"], kind, _OKS_75)
            values[f"{prefix}M"] = _mean(found["medium"], kind)
            values[f"{prefix}L"] = _mean(found["large"], kind)
        if self.crowd is not None:
            for name, (low, high) in CROWD_LEVELS.items():
                values[name] = self.average_precision(counts * ((self.crowd >= low) & (self.crowd < high)))
        return values

    def _accumulate(self, area: str, counts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Precision and recall of each category that has people."""
        return [found for one in self.areas[area] if (found := one.accumulate(counts)) is not None]

    def _counts(self, counts: np.ndarray | None) -> np.ndarray:
        return np.ones(len(self.image_ids), np.int64) if counts is None else counts


def coco_results(
    predictions: Sequence[Prediction],
    definition: DatasetDefinition,
    nms: bool = True,
    categories: Mapping[int | str, int | str] | None = None,
) -> list[dict[str, Any]]:
    """COCO's results list: image_id, category_id, keypoints (3 K numbers) and score, rescored and after OKS-NMS.

    categories: of the annotated people, by instance id; unset: 1 for everybody. Of several predictions for one annotated
    person the first is taken. A prediction that is not finite is left out, with a warning: to pycocotools, NaN matches
    anything.
    """
    assert all(len(prediction.keypoints) == definition.num_keypoints for prediction in predictions)
    people: dict[int | str, list[Prediction]] = {}
    seen, broken = set(), 0
    for prediction in predictions:
        if prediction.instance_id is not None and prediction.instance_id in seen:
            continue
        seen.add(prediction.instance_id)
        if np.isfinite(prediction.keypoints).all() and np.isfinite(prediction.box_score):
            people.setdefault(prediction.image_id, []).append(prediction)
        else:
            broken += 1
    if broken:
        logger.warning("%d of %d predictions are not finite and count as missing", broken, len(predictions))
    results = []
    for image_id, group in people.items():
        scores = [rescore(prediction) for prediction in group]
        kept = oks_nms(group, scores, definition.sigmas).tolist() if nms else range(len(group))
        for index in kept:
            keypoints = group[index].keypoints.astype(np.float64).ravel().tolist()
            category = 1 if categories is None else categories[group[index].instance_id]
            found = {"image_id": image_id, "category_id": category, "keypoints": keypoints, "score": scores[index]}
            results.append(found)
    return results


def evaluate_images(
    truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    definition: DatasetDefinition,
    *,
    image_ids: Collection[int | str] | None = None,
) -> Matches:
    """Matches results to people in every image.

    At most 20 detections an image; areas as annotated, for aic and crowdpose 0.53 x width x height of the annotated box.
    `truth` and `results` are in COCO's form and stay as they are; `image_ids` restricts the evaluation. Raises DataError
    for an image that the truth does not have, and for a result whose keypoints are not 3 K finite numbers.
    """
    records = {image["id"]: image for image in truth["images"]}
    order = _ordered(records if image_ids is None else _known(set(image_ids), records))
    number = {image_id: position for position, image_id in enumerate(order, start=1)}
    _known({result["image_id"] for result in results}, records)
    kinds = _categories(truth, results) if definition.average_over_categories else {}
    people = [_person(one, definition, number, kinds) for one in truth["annotations"] if one["image_id"] in number]
    found = [_found(result, definition, number, kinds) for result in results if result["image_id"] in number]
    crowd = None
    if definition.metric == "crowdpose":
        crowd = np.array([records[image_id].get("crowdIndex", np.nan) for image_id in order], np.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(people, number, len(kinds)), _index(found, number, len(kinds)), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(definition.sigmas)
        evaluation.evaluate()
    # By category, then range of areas, then image.
    labels, size, images = evaluation.params.areaRngLbl, len(order), evaluation.evalImgs
    ranges = [_gather(images[i * size : (i + 1) * size]) for i in range(max(len(kinds), 1) * len(labels))]
    return Matches(tuple(order), crowd, {name: tuple(ranges[i :: len(labels)]) for i, name in enumerate(labels)})


def _gather(images: list[dict[str, Any] | None]) -> AreaMatches:
    """pycocotools' `evalImgs` of one range of areas, flattened and sorted as `COCOeval.accumulate` does."""
    thresholds = len(Params("keypoints").iouThrs)
    positives = np.array([0 if one is None else np.count_nonzero(one["gtIgnore"] == 0) for one in images], np.int64)
    sizes = [0 if one is None else len(one["dtScores"]) for one in images]
    known = [one for one in images if one is not None]
    scores = np.array([score for one in known for score in one["dtScores"]], np.float64)
    order = np.argsort(-scores, kind="stable")
    empty = np.zeros((thresholds, 0), bool)
    matched = np.concatenate([empty, *(one["dtMatches"] > 0 for one in known)], axis=1)[:, order]
    counts = ~np.concatenate([empty, *(one["dtIgnore"] for one in known)], axis=1).astype(bool)[:, order]
    return AreaMatches(np.repeat(np.arange(len(images)), sizes)[order], matched & counts, ~matched & counts, positives)


def _mean(found: list[tuple[np.ndarray, np.ndarray]], kind: int, row: int | None = None) -> float:
    """Mean precision (kind 0) or recall (1) over categories in percent, of one OKS threshold or of all."""
    if not found:
        return UNDEFINED
    return 100.0 * float(np.mean([one[kind].mean() if row is None else one[kind][row].mean() for one in found]))


def _categories(truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[int | str, int]:
    """Category ids, renumbered from 1. One without people has no AP, so results of it count for nothing."""
    ids = {record["category_id"] for record in (*truth["annotations"], *results)}
    return {category: position for position, category in enumerate(_ordered(ids), start=1)}


def _ordered(image_ids: Collection[int | str]) -> list[int | str]:
    """COCOeval sorts by image id, which decides between equal scores; strings follow the numbers."""
    return sorted(image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))


def _known(wanted: set[int | str], records: dict[int | str, Any]) -> set[int | str]:
    unknown = _ordered(wanted - records.keys())
    if unknown:
        shown = f"image {unknown[0]!r}" + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
        raise DataError(f"evaluation: {shown} not among the {len(records)} images of the ground truth; wrong split?")
    return wanted


def _person(
    annotation: dict[str, Any],
    definition: DatasetDefinition,
    number: dict[int | str, int],
    kinds: dict[int | str, int],
) -> dict[str, Any]:
    """An annotation of our own, as COCOeval writes into it. Its id follows in `_index`."""
    bbox, keypoints = annotation["bbox"], annotation["keypoints"]
    labelled = sum(flag > 0 for flag in keypoints[2::3])
    return {
        "image_id": number[annotation["image_id"]],
        "category_id": kinds[annotation["category_id"]] if kinds else 1,
        "bbox": bbox,
        "area": metric_area(definition, bbox, annotation.get("area", bbox[2] * bbox[3])),
        "iscrowd": annotation.get("iscrowd", 0),
        "num_keypoints": annotation.get("num_keypoints", labelled),
        "keypoints": keypoints,
    }


def _found(
    result: dict[str, Any], definition: DatasetDefinition, number: dict[int | str, int], kinds: dict[int | str, int]
) -> dict[str, Any]:
    """A detection as `COCO.loadRes` makes it: box and area are those around all keypoints, or around the first part's
    where there are parts, as in the whole-body API. An `area` that the result has wins."""
    keypoints = np.asarray(result["keypoints"], np.float64)
    if keypoints.shape != (3 * definition.num_keypoints,) or not np.isfinite([*keypoints, result["score"]]).all():
        expected = f"{3 * definition.num_keypoints} finite keypoint numbers and a finite score"
        raise DataError(f"evaluation: a result on image {result['image_id']!r}: expected {expected}")
    first = definition.fields[0][1]
    x, y = keypoints[0 : 3 * first : 3], keypoints[1 : 3 * first : 3]
    width, height = float(np.ptp(x)), float(np.ptp(y))
    return {
        "image_id": number[result["image_id"]],
        "category_id": kinds[result["category_id"]] if kinds else 1,
        "bbox": [float(x.min()), float(y.min()), width, height],
        "area": result.get("area", width * height),
        "keypoints": keypoints.tolist(),
        "score": float(result["score"]),
    }


def _index(annotations: list[dict[str, Any]], number: dict[int | str, int], kinds: int) -> COCO:
    """A COCO object of renumbered images and annotations; ids from 1, as 0 means "no match" to pycocotools.

    kinds: how many categories there are; 0 where all are one.
    """
    for position, annotation in enumerate(annotations, start=1):
        annotation["id"] = position
    coco = COCO()
    coco.dataset = {
        "images": [{"id": position} for position in number.values()],
        "annotations": annotations,
        "categories": [{"id": kind} for kind in range(1, max(kinds, 1) + 1)],
    }
    coco.createIndex()
    return coco
