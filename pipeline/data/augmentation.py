"""What a training sample looks like: one random warp for pose, one random crop for MAE.

Everything random comes from the generator that is passed in, so a sample is a pure function of the seed and its
position in the order. Pictures stay uint8; normalisation happens on the device.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from pydantic import Field

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.geometry import Box, Window, apply_affine, fix_aspect, udp_matrix, warp
from pipeline.strict import Strict


class PoseAugmentation(Strict):
    """Random geometry of a person crop, in ViTPose's released order and numbers; the defaults are those of COCO."""

    enabled: bool = True
    """Off: every sample is its upright window."""
    center_jitter_probability: float = Field(0.3, ge=0, le=1)
    """How often the window's centre moves. Drawn per sample and epoch, not once when the data set is built."""
    center_jitter: float = Field(0.4, ge=0, le=1)
    """Width of that uniform move, in box widths and heights: 0.4 is up to 0.2 to either side."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring."""
    half_body: float = Field(0.3, ge=0, le=1)
    """Probability of a window around the upper or the lower body alone, where enough keypoints are labelled."""
    half_body_padding: float = Field(1.5, gt=0)
    """The half-body window over the extent of its keypoints."""
    scale: float = Field(0.5, ge=0, lt=1)
    """Sigma of the window's random scale, which is clipped to 1 - scale ... 1 + scale."""
    rotation: float = Field(40.0, ge=0)
    """Sigma of the random rotation, degrees; clipped at twice that."""
    rotation_probability: float = Field(0.6, ge=0, le=1)
    """How often a window is turned."""


class PoseSample(NamedTuple):
    """What the network and the codec get for one person."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    keypoints: np.ndarray
    """(K, 2) float32, input pixels; zero where not visible."""
    visible: np.ndarray
    """(K,) float32, 0 or 1. Occluded but labelled counts as visible."""


def pose_view(
    image: np.ndarray,
    keypoints: np.ndarray,
    window: Window,
    input_hw: tuple[int, int],
    definition: DatasetDefinition,
    config: PoseAugmentation | None,
    rng: np.random.Generator,
    *,
    bbox: Box | None = None,
) -> PoseSample:
    """One person's network input: the image (H, W, 3) uint8 through exactly one bilinear warp.

    `keypoints` (K, 3), `window` and `bbox` are in the image's pixels. The centre jitter is measured in `bbox` and left
    out where that is None. A mirrored sample has left and right swapped by the definition. ViTPose, section 4.1, by
    mmpose's top-down transforms in their order: jitter, flip, half body, scale and rotation, UDP warp.
    """
    labelled = keypoints[:, 2] > 0
    matrix, flipped = draw_matrix(keypoints, window, input_hw, definition, config, rng, bbox=bbox)
    points = apply_affine(keypoints[:, :2], matrix)
    if flipped:
        points, labelled = points[definition.flip_index], labelled[definition.flip_index]
    points = np.where(labelled[:, None], points, 0.0).astype(np.float32)
    return PoseSample(warp(image, matrix, input_hw), points, labelled.astype(np.float32))


def draw_matrix(
    keypoints: np.ndarray,
    window: Window,
    input_hw: tuple[int, int],
    definition: DatasetDefinition,
    config: PoseAugmentation | None,
    rng: np.random.Generator,
    *,
    bbox: Box | None = None,
) -> tuple[np.ndarray, bool]:
    """The random UDP warp (2, 3) of `pose_view`, and whether it mirrors."""
    centre, size = (window[0], window[1]), (window[2], window[3])
    if config is None or not config.enabled:
        return udp_matrix(centre, size, 0.0, input_hw), False
    if bbox is not None and rng.random() < config.center_jitter_probability:
        shift = config.center_jitter * (rng.random(2) - 0.5) * bbox[2:]
        centre = (centre[0] + shift[0], centre[1] + shift[1])
    flipped = rng.random() < config.flip
    half = _half_body(keypoints, input_hw, definition, config, rng)
    if half is not None:
        centre, size = (half[0], half[1]), (half[2], half[3])
    factor = float(np.clip(1 + config.scale * rng.standard_normal(), 1 - config.scale, 1 + config.scale))
    rotation = 0.0
    if rng.random() < config.rotation_probability:
        rotation = config.rotation * float(np.clip(rng.standard_normal(), -2, 2))
    return udp_matrix(centre, (size[0] * factor, size[1] * factor), rotation, input_hw, flipped), flipped


def mae_view(
    image: np.ndarray,
    window: Window | None,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: float = 0.5,
) -> np.ndarray:
    """A random resized crop (H, W, 3) uint8 of the person's window, or of the whole image where `window` is None.

    torchvision's RandomResizedCrop inside the part of the window that the image has, so no black border is learned.
    The random aspect, between 3/4 and 4/3, is relative to the output's: the same for a square output, and a person
    in a 256x192 input is as often widened as narrowed. Bicubic, but by area where it shrinks more than twice: OpenCV's
    bicubic does not low-pass. MAE (He et al.), appendix A.1.
    """
    left, top, wide, high = _inside(image, window)
    x, y, width, height = _random_crop(wide, high, size[1] / size[0], scale, rng)
    cut = image[top + y : top + y + height, left + x : left + x + width]
    shrink = max(width / size[1], height / size[0])
    view = cv2.resize(cut, size[::-1], interpolation=cv2.INTER_AREA if shrink > 2 else cv2.INTER_CUBIC)
    return view[:, ::-1] if rng.random() < flip else view


def _half_body(
    keypoints: np.ndarray,
    input_hw: tuple[int, int],
    definition: DatasetDefinition,
    config: PoseAugmentation,
    rng: np.random.Generator,
) -> Window | None:
    """The window around one half's keypoints, or None.

    Chosen before mirroring, which changes nothing: halves are symmetric and a window mirrors with its keypoints. The
    upper half wins where N(0, 1) < 0.5, so in 69 % rather than half of the cases: that is what the released models
    were trained with.
    """
    labelled = np.flatnonzero(keypoints[:, 2] > 0)
    least = definition.half_body_min_keypoints
    if least is None or len(labelled) <= least or rng.random() >= config.half_body:
        return None
    upper = np.isin(labelled, definition.upper_body_index)
    above, below = labelled[upper], labelled[~upper]
    prefers_above = rng.standard_normal() < 0.5 and len(above) > 2
    chosen = above if prefers_above or len(below) <= 2 else below
    points = keypoints[chosen, :2]
    if len(chosen) < 2 or not np.ptp(points, axis=0).any():
        return None
    wide, high = fix_aspect(*map(float, np.ptp(points, axis=0)), input_hw[1] / input_hw[0])
    x, y = map(float, points.mean(axis=0))
    return x, y, wide * config.half_body_padding, high * config.half_body_padding


def _inside(image: np.ndarray, window: Window | None) -> tuple[int, int, int, int]:
    """The window's part of the image: left, top, width, height in whole pixels, at least one each."""
    rows, columns = image.shape[:2]
    if window is None:
        return 0, 0, columns, rows
    x, y, width, height = window
    left = min(max(round(x - width / 2), 0), columns - 1)
    top = min(max(round(y - height / 2), 0), rows - 1)
    right = min(max(round(x + width / 2) + 1, left + 1), columns)
    bottom = min(max(round(y + height / 2) + 1, top + 1), rows)
    return left, top, right - left, bottom - top


def _random_crop(
    wide: int, high: int, aspect: float, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """x, y, width, height of a crop that covers a `scale` share of wide x high. Ten tries, then the central one."""
    for _ in range(10):
        area = wide * high * rng.uniform(*scale)
        ratio = aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= wide and 0 < height <= high:
            x, y = rng.integers(0, wide - width + 1), rng.integers(0, high - height + 1)
            return int(x), int(y), width, height
    ratio = min(max(wide / high, aspect * 3 / 4), aspect * 4 / 3)
    width = max(1, min(wide, round(high * ratio)))
    height = max(1, min(high, round(wide / ratio)))
    return (wide - width) // 2, (high - height) // 2, width, height
