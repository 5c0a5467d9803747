"""What every reader speaks in: images, problems, and the rows it found in an annotation file."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.data.instance import Instance

LARGEST = 1e6
"""Pixels: no image has a side as long, and no coordinate in one is as large."""

MALFORMED = frozenset(
    {
        "mistyped record",
        "wrong keypoint count",
        "visibility not 0 or 1",
        "visibility not 0, 1 or 2",
        "visibility not 1, 2 or 3",
        "box not finite",
    }
)
"""Kinds of problems that no intact file has. Of the others, some records of the published files are dropped, too."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One suspicious record."""

    where: str
    """File and record."""
    what: str
    """What was found, with its value."""
    dropped: bool
    """True where the record is not used; otherwise it is, as far as `what` says."""
    kind: str
    """The same few words for all problems of a kind: they are counted by it."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image that an annotation file names."""

    id: int | str
    file_name: str
    path: str
    """Path or fsspec URL."""
    width: int | None
    """Pixels; None where the annotation file does not say."""
    height: int | None
    crowd_index: float | None = None
    """CrowdPose's crowdIndex, 0 to 1."""


@dataclass
class Parsed:
    """What a reader makes of one annotation file."""

    file: str
    """Path or URL, for messages."""
    images: dict[int | str, ImageRecord] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    coco: dict[str, Any] | None = None
    records: int = 0
    """Annotations in the file, usable or not."""

    def note(self, record: str, kind: str, what: str, dropped: bool) -> None:
        """Adds a problem."""
        self.problems.append(Problem(f"{self.file}: {record}", what, dropped, kind))


def shown(value: Any) -> str:
    """A value as a message shows it: short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(value: Any) -> str:
    """An id or a name as a message shows it: on one line."""
    text = str(value)
    return text if len(text) <= 60 and text.isprintable() else shown(text)


def is_number(value: Any) -> bool:
    """True for a float and for an int (no bool) that a float can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float)


def is_id(value: Any) -> bool:
    """True for what may identify a record."""
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def number_rows(rows: list[list[Any]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `width` JSON values each as (N, width) float64, and an (N,) bool mask of the rows that are all numbers.

    The other rows are NaN. One conversion for all rows: per-row checks would take most of the time of reading COCO.
    """
    if not rows or width == 0:
        return np.zeros((len(rows), width)), np.ones(len(rows), dtype=bool)
    whole = _as_numbers(rows)
    if whole is not None and whole.shape == (len(rows), width):
        return whole.astype(np.float64), np.ones(len(rows), dtype=bool)
    values, good = np.full((len(rows), width), np.nan), np.zeros(len(rows), dtype=bool)
    for index, row in enumerate(rows):
        numbers = _as_numbers(row)
        if numbers is not None and numbers.shape == (width,):
            values[index], good[index] = numbers, True
    return values, good


def _as_numbers(value: list[Any]) -> np.ndarray | None:
    try:
        array = np.array(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "iuf" else None
