"""One annotated person, the unit that the whole data path speaks in."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One annotated person in one image.

    All lengths are pixels of the original image, all points (x, y), origin at the centre of the top-left pixel.
    """

    dataset: str
    """Name of the dataset definition; fixes K, the keypoint order and the decoder."""
    id: int | str
    """Unique among the instances of one dataset split."""
    image_id: int | str
    image: str
    """Path or fsspec URL of the image file."""
    image_size: tuple[int, int] | None
    """Width and height as annotated; None where the annotation file does not say (MPII)."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height, clipped to the image."""
    keypoints: np.ndarray
    """(K, 3) float64 of x, y, visibility (0 not labelled, 1 occluded but labelled, 2 visible). (0, 3) for people
    without keypoints."""
    area: float
    """Segment area in pixels squared where the dataset has it, else the box's."""
    window: tuple[float, float, float, float] | None = None
    """Centre x, centre y, width, height of the padded window where the dataset prescribes one (MPII: a square),
    instead of deriving it from `bbox`."""
    category: int | str | None = None
    """The annotation's category id, where there is one: for metrics by category."""
