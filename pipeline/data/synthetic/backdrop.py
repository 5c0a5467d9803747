"""What is around the synthetic people: backgrounds with clutter, obstacles in front, and the camera's flaws."""

import cv2
import numpy as np

from pipeline.data.synthetic.figure import fill, hull


def paint_background(rng: np.random.Generator, width: int, height: int, variety: float) -> np.ndarray:
    """(height, width, 3) uint8: blurred colour fields, maybe a floor, texture and clutter, some of it limb-like.

    `variety`, from 0 to 1, is the amount of texture and clutter.
    """
    small = (width // 2, height // 2)
    coarse = rng.uniform(0, 255, (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 3))
    coarse = _muted(rng, rng.uniform(50, 205, 3)) + rng.uniform(0.1, 0.2 + variety) * _muted(rng, coarse - 127)
    field = cv2.resize(coarse.astype(np.float32), small, interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        field[int(rng.uniform(0.45, 0.85) * small[1]) :] *= rng.uniform(0.5, 1.4, 3).astype(np.float32)
    cell = int(rng.integers(1, 6))
    grain = rng.standard_normal((small[1] // cell + 1, small[0] // cell + 1, 1), np.float32)
    grain *= np.float32(rng.uniform(0, 40 * variety))
    field += cv2.resize(grain, small, interpolation=cv2.INTER_LINEAR)[..., None]
    canvas = cv2.resize(np.clip(field, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(0, 2 + 30 * variety))):
        _clutter(rng, canvas)
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), float(rng.uniform(0.6, 4.0)))
    return canvas


def paint_obstacle(
    rng: np.random.Generator, canvas: np.ndarray, ids: np.ndarray, label: int, at: np.ndarray, stature: float
) -> None:
    """A box, an ellipse or a pole of 0.08 to 0.35 statures near canvas point `at`, marked in `ids` as `label`."""
    half = stature * rng.uniform(0.05, 0.16, 2)
    kind = int(rng.integers(3))
    if kind == 2:
        half = np.array((stature * rng.uniform(0.012, 0.035), canvas.shape[0]))
    centre = at + rng.normal(0, 0.05 * stature, 2)
    colour = _muted(rng, rng.uniform(10, 245, 3))
    polygon = _outline(centre, half, float(rng.normal(0, 12 if kind == 2 else 40)), round_shape=kind == 1)
    fill(ids, hull(polygon), label)
    fill(canvas, hull(polygon), tuple(0.75 * colour))
    for t in (0.85, 0.3):
        fill(canvas, hull(centre + t * (polygon - centre)), tuple(np.clip(colour * rng.uniform(0.8, 1.3), 0, 255)))


def degrade(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Exposure, colour cast, blur and noise of a cheap camera; one picture in twenty-five is grey."""
    flawed = (image.astype(np.float32) - 127) * rng.uniform(0.65, 1.15) + 127 + rng.normal(0, 14)
    flawed *= rng.uniform(0.88, 1.12, 3).astype(np.float32)
    if rng.random() < 0.04:
        flawed = np.repeat(flawed.mean(2, keepdims=True), 3, 2)
    sigma = float(rng.uniform(0, 1.0))
    if sigma > 0.3:
        flawed = cv2.GaussianBlur(flawed, (0, 0), sigma)
    flawed += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, 10))
    return np.clip(np.round(flawed), 0, 255).astype(np.uint8)


def _muted(rng: np.random.Generator, colours: np.ndarray) -> np.ndarray:
    """(..., 3) colours with some of their saturation taken away: surroundings are rarely gaudy."""
    grey = colours.mean(-1, keepdims=True)
    return grey + rng.uniform(0.1, 0.8) * (colours - grey)


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """One shape somewhere: a box, a disc, or a limb-like bar that a detector of limbs may fall for."""
    height, width = canvas.shape[:2]
    kind = int(rng.integers(3))
    half = rng.uniform(0.02, 0.18, 2) * (width, height)
    if kind == 2:
        half = np.array((rng.uniform(0.01, 0.03), rng.uniform(0.05, 0.25))) * height
    centre = rng.uniform(0, 1, 2) * (width, height)
    turn = float(rng.normal(0, 10)) if kind == 0 else float(rng.uniform(0, 180))
    colour = _muted(rng, rng.uniform(10, 245, 3))
    polygon = _outline(centre, half, turn, round_shape=kind == 1)
    fill(canvas, hull(polygon), tuple(0.7 * colour))
    fill(canvas, hull(centre + 0.82 * (polygon - centre)), tuple(colour))


def _outline(centre: np.ndarray, half: np.ndarray, degrees: float, round_shape: bool) -> np.ndarray:
    """(N, 2) corners of a turned ellipse or rectangle."""
    count = 24 if round_shape else 4
    angles = (np.arange(count) + 0.5) * 2 * np.pi / count
    unit = np.stack([np.cos(angles), np.sin(angles)], 1) * (1.0 if round_shape else np.sqrt(2.0))
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return centre + (unit * half) @ np.array([[c, s], [-s, c]])
