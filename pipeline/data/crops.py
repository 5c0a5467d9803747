"""The crop that is stored for a person: wide enough for every augmentation, no denser than training can see.

A window of width w and height h that is turned about its centre stays inside the square of side hypot(w, h), and at
the largest scale inside 1.5 of that. For the 1.25 x padded window of a 3:4 input this square is 2.34 times the box's
aspect-fixed long side L (1.5 x 1.25 x hypot(3/4, 1) = 2.34). Two draws may leave it: the centre jitter (up to 0.2 of
the box to either side, in three of ten samples, and only matters at the largest scales) and a half-body window about
a keypoint mean that is far off the centre. Covering the jitter too would take 2.75 L, 38 % more pixels for all
samples; it saves less than one pixel in 10 000 on COCO. `lost_share` measures it.
"""

import math
from typing import Literal, NamedTuple

import cv2
import numpy as np
from pydantic import Field

from pipeline.data.augmentation import PoseAugmentation, draw_matrix
from pipeline.data.definitions import DatasetDefinition
from pipeline.data.geometry import Box, Window, apply_affine, instance_window, invert_affine
from pipeline.data.instance import Instance
from pipeline.data.shard_index import SampleMeta
from pipeline.errors import DataError
from pipeline.strict import Strict


class CropConfig(Strict):
    """What is stored of an image for one instance."""

    mode: Literal["person", "image"] = "person"
    """person: the surroundings of one box; image: the whole image, for pretraining without boxes."""
    input_size: tuple[int, int] = (256, 192)
    """Height and width of the largest network input that the crops serve."""
    largest_scale: float = Field(1.5, ge=1)
    """The stored square holds every rotation of the padded window times this: 1.5 is the augmentation's largest."""
    density: float = Field(1.5, ge=1)
    """Stored pixels per input pixel over the upright window; denser images are shrunk by area. 1.5 keeps 3 of 4
    augmented windows from being enlarged, 2 all of them (their smallest scale is 0.5), 1 only unscaled ones."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality."""


class Crop(NamedTuple):
    """A stored crop. Crop pixels are (image pixels - (x, y)) * (scale_x, scale_y)."""

    image: np.ndarray
    """(h, w, 3) uint8 RGB."""
    matrix: np.ndarray
    """(2, 3) float64, image pixels to crop pixels."""
    keypoints: np.ndarray
    """(K, 3) float64, crop pixels and visibility."""
    bbox: Box
    """x, y, width, height in crop pixels."""
    window: Window | None
    """The prescribed window in crop pixels, where the dataset has one."""
    rectangle: tuple[int, int, int, int]
    """Left, top, right, bottom (exclusive) in whole image pixels: what of the image was kept."""


def crop_instance(image: np.ndarray, instance: Instance, config: CropConfig) -> Crop:
    """The stored crop of one instance of the image (H, W, 3) uint8. Raises DataError for a box outside the image."""
    height, width = image.shape[:2]
    window = instance_window(instance, config.input_size[1] / config.input_size[0])
    if not (all(map(math.isfinite, window)) and window[2] > 0 and window[3] > 0):
        raise DataError(f"{instance.dataset} instance {instance.id}: empty box {instance.bbox} in {instance.image}")
    rectangle = (0, 0, width, height)
    needed = (window[2], window[3])
    if config.mode == "image":
        needed = (width, height)
    else:
        rectangle = _surroundings(window, config.largest_scale, width, height)
    left, top, right, bottom = rectangle
    if left >= right or top >= bottom:
        where = f"{instance.image} of {width}x{height} pixels"
        raise DataError(f"{instance.dataset} instance {instance.id}: box {instance.bbox} outside of {where}")
    kept = image[top:bottom, left:right]
    stored = _shrink(kept, config.density * max(config.input_size[1] / needed[0], config.input_size[0] / needed[1]))
    matrix = _crop_matrix(rectangle, stored.shape[1], stored.shape[0])
    return Crop(stored, matrix, *_moved(instance, matrix), rectangle)


def sample_meta(
    instance: Instance, crop: Crop, config: CropConfig, *, split: str, image_sha256: str, image_size: tuple[int, int]
) -> SampleMeta:
    """What a shard says about a crop. `image_size` is the original's (width, height)."""
    scale_x, scale_y = float(crop.matrix[0, 0]), float(crop.matrix[1, 1])
    x, y = -float(crop.matrix[0, 2]) / scale_x, -float(crop.matrix[1, 2]) / scale_y
    return SampleMeta(
        dataset=instance.dataset,
        split=split,
        id=instance.id,
        image_id=instance.image_id,
        keypoints=[tuple(map(float, point)) for point in crop.keypoints],
        bbox=crop.bbox,
        window=crop.window,
        crop={"x": x, "y": y, "scale_x": scale_x, "scale_y": scale_y},
        image_sha256=image_sha256,
        image_size=image_size,
        max_input=config.input_size,
        mode=config.mode,
    )


def lost_share(
    instance: Instance,
    crop: Crop,
    image_size: tuple[int, int],
    config: CropConfig,
    definition: DatasetDefinition,
    augmentation: PoseAugmentation,
    rng: np.random.Generator,
    *,
    draws: int = 16,
) -> float:
    """Share of the input's pixels that lie in the image of `image_size` (width, height) but not in the stored crop.

    Averaged over `draws` augmentations, on a 24 x 24 grid of each window.
    """
    height, width = config.input_size
    window = instance_window(instance, width / height)
    grid = np.stack(np.meshgrid(np.linspace(0, width - 1, 24), np.linspace(0, height - 1, 24)), -1).reshape(-1, 2)
    bbox = None if instance.window is not None else instance.bbox
    lost = 0.0
    for _ in range(draws):
        matrix, _ = draw_matrix(instance.keypoints, window, config.input_size, definition, augmentation, rng, bbox=bbox)
        points = apply_affine(grid, invert_affine(matrix))
        in_image = _within(points, (0, 0, *image_size))
        lost += float((in_image & ~_within(points, crop.rectangle)).mean())
    return lost / draws


def _surroundings(window: Window, largest_scale: float, width: int, height: int) -> tuple[int, int, int, int]:
    x, y, wide, high = window
    reach = largest_scale * math.hypot(wide, high) / 2
    left, top = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
    right, bottom = min(width, math.ceil(x + reach) + 1), min(height, math.ceil(y + reach) + 1)
    return left, top, right, bottom


def _shrink(image: np.ndarray, factor: float) -> np.ndarray:
    if factor >= 1:
        return np.ascontiguousarray(image)
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _crop_matrix(rectangle: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    """Pixel areas scale about their corner, so centres move: (x - left + 0.5) * scale - 0.5, exact for INTER_AREA.

    Width and height are whole pixels, so the two scales differ a little.
    """
    left, top, right, bottom = rectangle
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    return np.array(
        [[scale_x, 0.0, (0.5 - left) * scale_x - 0.5], [0.0, scale_y, (0.5 - top) * scale_y - 0.5]], np.float64
    )


def _moved(instance: Instance, matrix: np.ndarray) -> tuple[np.ndarray, Box, Window | None]:
    """Keypoints, box and window through an upright matrix."""
    scale_x, scale_y = float(matrix[0, 0]), float(matrix[1, 1])
    keypoints = np.array(instance.keypoints, np.float64)
    keypoints[:, :2] = apply_affine(keypoints[:, :2], matrix)
    x, y = map(float, apply_affine(np.array(instance.bbox[:2]), matrix))
    bbox = (x, y, float(instance.bbox[2]) * scale_x, float(instance.bbox[3]) * scale_y)
    if instance.window is None:
        return keypoints, bbox, None
    x, y = map(float, apply_affine(np.array(instance.window[:2]), matrix))
    return keypoints, bbox, (x, y, instance.window[2] * scale_x, instance.window[3] * scale_y)


def _within(points: np.ndarray, rectangle: tuple[int, int, int, int]) -> np.ndarray:
    left, top, right, bottom = rectangle
    x, y = points[:, 0], points[:, 1]
    return (x >= left - 0.5) & (x < right - 0.5) & (y >= top - 0.5) & (y < bottom - 0.5)
