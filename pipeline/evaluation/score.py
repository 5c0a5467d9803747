"""The metric of a dataset, whichever it is: predictions in, numbers in percent out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.data.annotations import Annotations
from pipeline.data.definitions import DatasetDefinition
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.coco import Matches, coco_results, evaluate_images
from pipeline.evaluation.parts import evaluate_parts
from pipeline.evaluation.pckh import evaluate_pckh, load_truth, truth_from_joints
from pipeline.evaluation.predictions import Prediction


@dataclass(frozen=True)
class Score:
    """What an evaluation says."""

    metrics: dict[str, float]
    matches: Matches | None
    """For intervals; None for PCKh."""


def headline(definition: DatasetDefinition) -> str:
    """The metric that counts. Raises ConfigError for a dataset without one."""
    if definition.metric == "none":
        raise ConfigError(f"dataset {definition.name!r} has no metric: it can't be evaluated")
    return "PCKh" if definition.metric == "pckh" else "AP"


def score(
    annotations: Annotations, predictions: Sequence[Prediction], image_ids: Collection[int | str] | None = None
) -> Score:
    """Scores predictions on a split, or on some of its images.

    A definition with parts adds the metrics of each. MPII without its mpii_gt_val.mat is scored with head sizes from the
    head's two joints: see `truth_from_joints`. Raises DataError where a metric by category meets a detector's boxes.
    """
    definition = annotations.definition
    if headline(definition) == "PCKh":
        path = annotations.files.truth
        truth = load_truth(path) if path else truth_from_joints(annotations.instances)
        chosen = None
        if image_ids is not None:
            chosen = [int(one.id) for one in annotations.instances if one.image_id in image_ids]
        found = evaluate_pckh(predictions, truth, instance_ids=chosen)
        # Trackers do not take every character in a metric's name.
        return Score({name.replace("@", "_at_"): value for name, value in found.items()}, None)
    assert annotations.coco is not None
    results = coco_results(predictions, definition, categories=_categories(annotations, predictions))
    matches = evaluate_images(annotations.coco, results, definition, image_ids=image_ids)
    parts = evaluate_parts(annotations.coco, results, definition, image_ids=image_ids)
    return Score(matches.metrics() | parts, matches)


def _categories(annotations: Annotations, predictions: Sequence[Prediction]) -> dict[int | str, int | str] | None:
    """Category by instance, where the metric is by category. Raises DataError for a detector's box, which has none."""
    if not annotations.definition.average_over_categories:
        return None
    if any(prediction.instance_id is None for prediction in predictions):
        name = annotations.definition.name
        raise DataError(
            f"dataset {name!r}: its metric is by category, which a detector's boxes lack; use annotated boxes"
        )
    return {one.id: one.category for one in annotations.instances if one.category is not None}
