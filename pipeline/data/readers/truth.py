"""Ground truth in the form that pycocotools evaluates."""

from collections.abc import Iterable
from typing import Any

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.readers.records import ImageRecord


def ground_truth(
    annotations: list[dict[str, Any]], images: Iterable[ImageRecord], definition: DatasetDefinition
) -> dict[str, Any]:
    """Images, annotations and the one category that all of them have (id 1), or their own for a metric by category.

    Annotation ids are the file's, unless one is not a positive integer: pycocotools needs such, as 0 means "no match"
    to it; then all are renumbered from 1.
    """
    keep_ids = all(isinstance(annotation["id"], int) and annotation["id"] > 0 for annotation in annotations)
    for number, annotation in enumerate(annotations, start=1):
        if not definition.average_over_categories:
            annotation["category_id"] = 1
        if not keep_ids:
            annotation["id"] = number
    described_by = {
        "keypoints": list(definition.keypoints),
        "skeleton": (definition.skeleton_index + 1).tolist(),
    }
    names = {1: "person"}
    if definition.average_over_categories:
        names = {annotation["category_id"]: str(annotation["category_id"]) for annotation in annotations}
    categories = [{"id": number, "name": name, **described_by} for number, name in names.items()]
    described = [
        {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
        | ({} if image.crowd_index is None else {"crowdIndex": image.crowd_index})
        for image in images
    ]
    return {"images": described, "annotations": annotations, "categories": categories}
