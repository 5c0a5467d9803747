"""One person as a model sees it: what inference hands to evaluation."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The keypoints found in one crop of one image. Pixels of the original image, (x, y), as in `Instance`."""

    image_id: int | str
    instance_id: int | str | None
    """The annotated person whose box was cropped; None for a detector's box."""
    keypoints: np.ndarray
    """(K, 3) of x, y, score."""
    window: tuple[float, float, float, float]
    """Centre x, centre y, width, height of the crop, padding included."""
    box_score: float
    """The detector's score; 1 for an annotated box."""
