"""Raw annotation files to instances: one call for every format, and every suspicious record by name."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.definitions import DatasetDefinition, DatasetSource, ResolvedFiles, load_definition, resolve
from pipeline.data.instance import Instance
from pipeline.data.readers import files
from pipeline.data.readers.aic import read_aic
from pipeline.data.readers.coco import read_coco
from pipeline.data.readers.mpii import read_mpii
from pipeline.data.readers.records import LARGEST, ImageRecord, Problem, is_id, is_number, number_rows, shown
from pipeline.errors import DataError

__all__ = ["Annotations", "Detection", "ImageRecord", "Problem", "read", "read_detections"]

log = logging.getLogger(__name__)

READERS = {"coco": read_coco, "boxes": read_coco, "aic": read_aic, "mpii": read_mpii}


@dataclass(frozen=True)
class Annotations:
    """One split of a dataset, read and checked."""

    definition: DatasetDefinition
    source: DatasetSource
    files: ResolvedFiles
    images: dict[int | str, ImageRecord]
    """Every image of the annotation file, by id."""
    instances: list[Instance]
    """The people that training and evaluation with ground-truth boxes use, in file order."""
    problems: list[Problem]
    """Every suspicious record."""
    records: int
    """Annotations in the file, usable or not."""
    coco: dict[str, Any] | None
    """Ground truth for pycocotools: images, annotations (crowds and people without keypoints, too) and one category
    with id 1. None for MPII."""
    digest: str
    """sha256 of the annotation file's bytes."""


class Detection(NamedTuple):
    """A box of a person detector."""

    image_id: int | str
    bbox: tuple[float, float, float, float]
    """x, y, width, height in pixels, as the detector gave it."""
    score: float


def read(source: DatasetSource, root: str | Path) -> Annotations:
    """Reads one split of a dataset below the data root.

    Images are not opened. A record that can't be used is dropped and named in `problems`, never raised. Raises
    ConfigError for an unknown definition or split; DataError for a missing file, for a file that is empty, not JSON
    or of another form than the definition's format, and for one without annotations.
    """
    definition = load_definition(source.name)
    found = resolve(source, root)
    with files.collector_paused():
        data, digest = files.read_json(found.annotations)
        parsed = READERS[definition.format](data, definition, found.annotations, found.images)
    dropped = sum(problem.dropped for problem in parsed.problems)
    log.info(
        "%s: %d of %d annotations used, %d suspicious records, %d of them dropped",
        found.annotations,
        len(parsed.instances),
        parsed.records,
        len(parsed.problems),
        dropped,
    )
    return Annotations(
        definition=definition,
        source=source,
        files=found,
        images=parsed.images,
        instances=parsed.instances,
        problems=parsed.problems,
        records=parsed.records,
        coco=parsed.coco,
        digest=digest,
    )


def read_detections(annotations: Annotations) -> list[Detection]:
    """The detector's person boxes (category 1) on the annotated images, in file order, whatever their score.

    Boxes without size, and huge ones, are left out, and counted in the log. Raises DataError if the split has no detections, names
    the first malformed entry, and if none of the boxes lies on an annotated image.
    """
    file = annotations.files.detections
    if file is None:
        split = f"dataset {annotations.definition.name}, split {annotations.source.split}"
        places = annotations.definition.splits.get(annotations.source.split)
        looked = ", ".join(places.detections) if places and places.detections else "none"
        raise DataError(f"{split}: no detections (places of the definition: {looked}); give the source's 'detections'")
    entries, _ = files.read_json(file)
    if not isinstance(entries, list) or not entries:
        found = "an empty one" if entries == [] else f"a {type(entries).__name__}"
        raise DataError(f"{file}: expected a list of detections (image_id, category_id, bbox, score), found {found}")
    for position, entry in enumerate(entries):
        fault = _detection_fault(entry)
        if fault:
            raise DataError(f"{file}: detection {position}: {fault}")
    boxes, numeric = number_rows([entry["bbox"] for entry in entries], 4)
    broken = np.flatnonzero(~(numeric & np.isfinite(boxes).all(axis=1)))
    if len(broken):
        raise DataError(
            f"{file}: detection {broken[0]}: bbox: expected numbers, found {shown(entries[broken[0]]['bbox'])}"
        )
    sized = ((boxes[:, 2:] > 0).all(axis=1) & (np.abs(boxes) <= LARGEST).all(axis=1)).tolist()
    rows = zip(entries, boxes.tolist(), sized, strict=True)
    people = [row for row in rows if row[0]["category_id"] == 1 and row[0]["image_id"] in annotations.images]
    detections = [
        Detection(entry["image_id"], tuple(box), float(entry["score"])) for entry, box, fine in people if fine
    ]
    log.info(
        "%s: %d of %d boxes used, %d without size or huge left out",
        file,
        len(detections),
        len(entries),
        len(people) - len(detections),
    )
    if not detections:
        raise DataError(f"{file}: none of {len(entries)} boxes is of category 1 on an image of {annotations.files[0]}")
    return detections


def _detection_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object, found {shown(entry)}"
    for field in ("image_id", "category_id"):
        if not is_id(entry.get(field)):
            return f"{field}: expected a number or a string, found {shown(entry.get(field))}"
    if not isinstance(entry.get("bbox"), list) or len(entry["bbox"]) != 4:
        return f"bbox: expected a list of x, y, width, height, found {shown(entry.get('bbox'))}"
    if not is_number(entry.get("score")) or not np.isfinite(entry["score"]):
        return f"score: expected a number, found {shown(entry.get('score'))}"
    return None
