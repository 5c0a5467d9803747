"""Whether a row lies where the paper puts it: paired differences over seeds, their interval and a verdict.

A seed draws everything anew: training and evaluation people, initialisation, order, augmentation. Two runs of one seed
share all of it but what the row changes, so their difference is paired, and the spread of the differences over seeds
holds every source of chance, the images of the evaluation included.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from benchmarks.mini.results import Result
from pipeline.errors import DataError
from pipeline.evaluation.coco import UNDEFINED

LEVEL = 0.95

Verdict = Literal["holds", "reversed", "inconclusive", "not finished"]


@dataclass(frozen=True)
class Comparison:
    """One row minus another."""

    seeds: int
    """How many have both."""
    gap: float | None
    """Mean difference of AP over the seeds; None without any."""
    reach: float | None
    """Half of the interval's width, which is the smallest gap that it would have told from none; None below two seeds."""
    images: float | None
    """What `reach` would be if the images of the evaluation were the only chance; None without any seed."""
    verdict: Verdict

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high end of the 95 % interval of the gap."""
        if self.gap is None or self.reach is None:
            return None
        return self.gap - self.reach, self.gap + self.reach


def compare(
    row: Sequence[Result | None], other: Sequence[Result | None], side: Literal["above", "below"]
) -> Comparison:
    """Results of two runs, seed by seed; None where a seed has none. Raises DataError for other evaluation people."""
    pairs = [(a, b) for a, b in zip(row, other, strict=True) if a is not None and b is not None]
    for a, b in pairs:
        if a.evaluated != b.evaluated:
            raise DataError(f"{a.file} and {b.file}: evaluated on different people; run one of them again with --again")
    if not pairs:
        return Comparison(0, None, None, None, "not finished")
    gaps = [a.ap - b.ap for a, b in pairs]
    gap, images = float(np.mean(gaps)), _reach_of_images(pairs)
    if len(pairs) == 1:
        return Comparison(1, gap, None, images, "not finished")
    # Three differences may lie close together by luck, but never closer than the images let them be known.
    reach = max(_reach_of_seeds(gaps), images)
    finished = len(pairs) == len(row)
    return Comparison(len(pairs), gap, reach, images, _verdict(gap, reach, side) if finished else "not finished")


def _reach_of_seeds(gaps: Sequence[float]) -> float:
    """Half-width of Student's interval of the mean: t(n - 1) s / sqrt(n)."""
    n = len(gaps)
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(gaps, ddof=1) / math.sqrt(n))


def _reach_of_images(pairs: Sequence[tuple[Result, Result]]) -> float:
    """Half-width of the normal interval of the mean, from the paired bootstrap over the images of each seed."""
    variances = []
    for a, b in pairs:
        first, second = np.array(a.resampled), np.array(b.resampled)
        both = (first != UNDEFINED) & (second != UNDEFINED)
        variances.append(np.var((first - second)[both], ddof=1))
    return float(stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(sum(variances)) / len(pairs))


def _verdict(gap: float, reach: float, side: Literal["above", "below"]) -> Verdict:
    towards = gap if side == "above" else -gap
    if towards - reach > 0:
        return "holds"
    return "reversed" if towards + reach < 0 else "inconclusive"
