"""How far AP would move on another sample of images: percentile intervals by resampling images with replacement.

People of one image are not independent, so images are drawn, not people (Efron and Tibshirani, "An Introduction to the
Bootstrap", chapter 13). Matching is done once; a resample only weighs the images anew.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.errors import DataError
from pipeline.evaluation.coco import UNDEFINED, Matches


def bootstrap_ap(matches: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Low and high end of the interval of AP, in percent. Raises DataError where AP is undefined: no people."""
    values = resampled_ap(matches, resamples=resamples, seed=seed)
    return _interval(values[values != UNDEFINED], level)


def bootstrap_difference(
    a: Matches, b: Matches, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Low and high end of the interval of AP(a) - AP(b), in percentage points, both on the same resamples.

    Narrower than two separate intervals suggest, as what makes images hard is hard for both. Raises DataError if the
    two were evaluated on different images, and where AP is undefined.
    """
    if a.image_ids != b.image_ids:
        sizes = f"{len(a.image_ids)} and {len(b.image_ids)} images"
        raise DataError(f"comparison of two evaluations: expected the same images, found different sets ({sizes})")
    first, second = (resampled_ap(matches, resamples=resamples, seed=seed) for matches in (a, b))
    return _interval((first - second)[(first != UNDEFINED) & (second != UNDEFINED)], level)


def resampled_ap(matches: Matches, *, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """AP in percent on each resample, (R,) float64; UNDEFINED where none of its people counts.

    A seed draws the same images for every evaluation of a split: two models' values pair up, resample by resample.
    """
    counts = _draws(len(matches.image_ids), resamples, seed)
    return np.array([matches.average_precision(drawn) for drawn in counts])


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (I,) int64, resample after resample."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(images, size=images), minlength=images)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    if not len(values):
        raise DataError("bootstrap: AP is undefined, as the ground truth has no people who count")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
