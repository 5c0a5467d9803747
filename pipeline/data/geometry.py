"""Windows, UDP warps and points: the geometry between an image, a person's window and the network's input.

A window is (centre x, centre y, width, height) in pixels, its centre a point in the coordinates of pixel centres
(x = 0 is the centre of the leftmost pixel). Under UDP the unit of length is the distance between pixel centres, so a
window of width w maps onto W - 1 steps of an input that is W pixels wide (Huang et al., "The Devil is in the Details:
Delving into Unbiased Data Processing", section 3).
"""

import math

import cv2
import numpy as np

from pipeline.data.instance import Instance

Box = tuple[float, float, float, float]
Window = tuple[float, float, float, float]

PADDING = 1.25


def fix_aspect(width: float, height: float, aspect: float) -> tuple[float, float]:
    """The smallest width and height of the ratio `aspect` (width over height) that contain the given ones."""
    if width > aspect * height:
        return width, width / aspect
    return height * aspect, height


def box_to_window(bbox: Box, aspect: float, padding: float = PADDING) -> Window:
    """The window of a box (x, y, width, height): same centre, grown to the input's aspect, then padded.

    `aspect` is the input's width over its height. The rule is mmpose's `_xywh2cs` (ViTPose, section 4.1).
    """
    x, y, width, height = bbox
    wide, high = fix_aspect(width, height, aspect)
    return x + width / 2, y + height / 2, wide * padding, high * padding


def instance_window(instance: Instance, aspect: float, padding: float = PADDING) -> Window:
    """The window that the dataset prescribes (MPII: a square, whatever the aspect), else the box's."""
    if instance.window is not None:
        return instance.window
    return box_to_window(instance.bbox, aspect, padding)


def udp_matrix(
    centre: tuple[float, float],
    size: tuple[float, float],
    rotation_deg: float,
    output_hw: tuple[int, int],
    flip: bool = False,
) -> np.ndarray:
    """The UDP warp of a window onto an output, as a (2, 3) float64 matrix on points (x, y).

    `size` is the window's width and height, `rotation_deg` turns about its centre. With `flip` the image is mirrored
    about the window's centre before it is turned, which equals mirroring the whole image first (x -> W - 1 - x) and
    taking the mirrored window. mmpose `get_warp_matrix`.
    """
    height, width = output_hw
    scale_x, scale_y = (width - 1) / size[0], (height - 1) / size[1]
    cos, sin = math.cos(math.radians(rotation_deg)), math.sin(math.radians(rotation_deg))
    mirror = -1.0 if flip else 1.0
    linear = np.array([[scale_x * cos * mirror, -scale_x * sin], [scale_y * sin * mirror, scale_y * cos]])
    offset = np.array([(width - 1) / 2, (height - 1) / 2]) - linear @ np.asarray(centre, np.float64)
    return np.concatenate([linear, offset[:, None]], axis=1)


def apply_affine(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(..., 2) points through a (2, 3) matrix, in float64."""
    return np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2]


def invert_affine(matrix: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix that undoes `matrix`."""
    inverse = np.linalg.inv(matrix[:, :2])
    return np.concatenate([inverse, -inverse @ matrix[:, 2:]], axis=1)


def warp(image: np.ndarray, matrix: np.ndarray, output_hw: tuple[int, int]) -> np.ndarray:
    """The image (H, W, 3) through a forward (2, 3) matrix: bilinear, black outside, uint8."""
    height, width = output_hw
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR)


def window_to_input(points: np.ndarray, window: Window, input_hw: tuple[int, int]) -> np.ndarray:
    """(..., 2) image pixels into input pixels of an upright window."""
    return apply_affine(points, udp_matrix(window[:2], window[2:], 0.0, input_hw))


def input_to_image(points: np.ndarray, window: Window, input_hw: tuple[int, int]) -> np.ndarray:
    """(..., 2) input pixels back into image pixels of an upright window (the UDP back-projection of mmpose)."""
    return apply_affine(points, invert_affine(udp_matrix(window[:2], window[2:], 0.0, input_hw)))
