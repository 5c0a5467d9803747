"""Looks a dataset over before anything is trained on it: what is there, what is suspicious, what is missing."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.annotations import Annotations, Problem, read, read_detections
from pipeline.data.definitions import DatasetSource, ResolvedFiles
from pipeline.data.images import FORMATS, MAX_PIXELS, read_bytes
from pipeline.data.instance import Instance
from pipeline.data.readers import files
from pipeline.data.readers.records import ImageRecord, named
from pipeline.errors import DataError

MAX_ASPECT = 10.0
"""A box more elongated than this is suspicious."""
MIN_PEOPLE, MIN_POINTS = 5, 3
"""Boxes are compared with keypoints where at least so many people have at least so many labelled keypoints."""
MAX_DISTANCE = 0.5
"""A keypoint farther outside its box than this share of the box's side is suspicious."""


@dataclass
class ProblemGroup:
    """All problems of one kind."""

    records: list[Problem] = field(default_factory=list)
    """Each of them."""

    def add(self, problem: Problem) -> None:
        """Takes a problem in."""
        self.records.append(problem)

    @property
    def count(self) -> int:
        """How many."""
        return len(self.records)

    @property
    def dropped(self) -> int:
        """How many of them keep a record from being used."""
        return sum(problem.dropped for problem in self.records)


@dataclass(frozen=True)
class CheckReport:
    """What `check` found."""

    dataset: str
    split: str
    files: ResolvedFiles
    """`detections` and `truth` are None where there are none."""
    images: int
    """Images that the annotation file names."""
    annotations: int
    """Annotations in the file, usable or not."""
    people: int
    """Annotations that are used."""
    keypoints: dict[str, int]
    """How often each keypoint is labelled, over the people used."""
    detections: int | None
    """Usable detector boxes; None where there is no such file."""
    problems: dict[str, ProblemGroup]
    """Suspicious records by kind, the most frequent first; images that are missing or can't be opened among them."""
    missing_images: int
    """Image files that are not there."""
    unreadable_images: int
    """Image files whose header can't be read."""
    size_mismatches: int
    """Images of another size than annotated."""
    digest: str
    """sha256 of the annotation file."""

    @property
    def sound(self) -> bool:
        """True where nothing is suspicious."""
        return not self.problems


def check(source: DatasetSource, root: str | Path) -> CheckReport:
    """Reads a split as training would, and looks at the headers of its images.

    Pixels are not decoded. Raises what `read` and `read_detections` raise: ConfigError and DataError; StorageError
    for a URL that can't be reached.
    """
    annotations = read(source, root)
    detections = len(read_detections(annotations)) if annotations.files.detections else None
    groups: dict[str, ProblemGroup] = {}
    for problem in _all_problems(annotations):
        groups.setdefault(problem.kind, ProblemGroup()).add(problem)

    def count(kind: str) -> int:
        return groups[kind].count if kind in groups else 0

    return CheckReport(
        dataset=annotations.definition.name,
        split=source.split,
        files=annotations.files,
        images=len(annotations.images),
        annotations=annotations.records,
        people=len(annotations.instances),
        keypoints=_labelled(annotations),
        detections=detections,
        problems=dict(sorted(groups.items(), key=lambda item: -item[1].count)),
        missing_images=count("image missing"),
        unreadable_images=count("image unreadable"),
        size_mismatches=count("image size differs"),
        digest=annotations.digest,
    )


def _all_problems(annotations: Annotations) -> Iterator[Problem]:
    yield from annotations.problems
    for instance in annotations.instances:
        who = f"annotation {named(instance.id)} (image {named(instance.image_id)})"
        where = f"{annotations.files.annotations}: {who}"
        for kind, what in _oddities(instance):
            yield Problem(where, what, dropped=False, kind=kind)
    yield from _repetitions(annotations)
    if _look_like_corners(annotations):
        what = "most boxes hold their keypoints if read as x1, y1, x2, y2; expected x, y, width, height"
        yield Problem(annotations.files.annotations, what, dropped=False, kind="boxes look like corners")
    for image in annotations.images.values():
        fault = _image_fault(image)
        if fault:
            kind, what = fault
            yield Problem(image.path, what, dropped=kind != "image size differs", kind=kind)


def _repetitions(annotations: Annotations) -> Iterator[Problem]:
    """What is there twice under two ids, and so counts twice in training and in AP."""
    files_seen: dict[str, int | str] = {}
    for image in annotations.images.values():
        first = files_seen.setdefault(image.path, image.id)
        if first != image.id:
            what = f"the file of image {named(first)}, too"
            yield Problem(image.path, what, dropped=False, kind="image under two ids")
    people_seen: dict[tuple[int | str, object, bytes], int | str] = {}
    for instance in annotations.instances:
        same = (instance.image_id, instance.bbox, instance.keypoints.tobytes())
        first = people_seen.setdefault(same, instance.id)
        if first != instance.id:
            where = f"{annotations.files.annotations}: annotation {named(instance.id)}"
            what = f"box and keypoints are those of annotation {named(first)}"
            yield Problem(where, what, dropped=False, kind="person annotated twice")


def _look_like_corners(annotations: Annotations) -> bool:
    """True where most boxes hold their person's keypoints if they are read as x1, y1, x2, y2.

    Of sound boxes up to a fifth do (people near the top left corner), of corners three quarters and more.
    """
    fitting = judged = 0
    for record in annotations.coco["annotations"] if annotations.coco else ():
        points = np.array(record["keypoints"], np.float64).reshape(-1, 3)
        points = points[points[:, 2] > 0, :2]
        if len(points) < MIN_POINTS:
            continue
        judged += 1
        start, end = np.array(record["bbox"], np.float64).reshape(2, 2)
        slack = 0.05 * (end - start)
        fitting += bool((end > start).all() and (points >= start - slack).all() and (points <= end + slack).all())
    return judged >= MIN_PEOPLE and fitting > judged / 2


def _labelled(annotations: Annotations) -> dict[str, int]:
    names = annotations.definition.keypoints
    counts = np.zeros(len(names), dtype=np.int64)
    for instance in annotations.instances:
        counts += instance.keypoints[:, 2] > 0
    return dict(zip(names, counts.tolist(), strict=True))


def _oddities(instance: Instance) -> Iterator[tuple[str, str]]:
    """Kind and description of what is possible, but rarely meant."""
    x, y, width, height = instance.bbox
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield "box very elongated", f"width {width:.1f}, height {height:.1f}"
    points = instance.keypoints[instance.keypoints[:, 2] > 0, :2]
    if not len(points):
        return
    start, side = np.array([x, y]), np.array([width, height])
    far = ((points < start - MAX_DISTANCE * side) | (points > start + (1 + MAX_DISTANCE) * side)).any(axis=1)
    if far.any():
        box = [round(value, 1) for value in instance.bbox]
        yield "keypoint far outside its box", f"{far.sum()} keypoints, such as {points[far][0].tolist()}, bbox {box}"
    if len(points) > 1 and (points == points[0]).all():
        yield "keypoints all at one place", f"{len(points)} keypoints at {points[0].tolist()}"


def _image_fault(image: ImageRecord) -> tuple[str, str] | None:
    """Kind and description of what is wrong with an image file, by its header."""
    try:
        source = io.BytesIO(read_bytes(image.path)) if files.is_url(image.path) else image.path
        with Image.open(source, formats=FORMATS) as picture:
            width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, the limit is {MAX_PIXELS}")
    except FileNotFoundError:
        return "image missing", "no such file"
    except DataError as error:  # of what lies behind a URL
        return "image missing", str(error)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "image unreadable", " ".join(str(error).split())
    if image.width is not None and (width, height) != (image.width, image.height):
        return "image size differs", f"{width} x {height}, annotated {image.width} x {image.height}"
    return None
