"""Pictures for people: skeletons on images, and sheets of many images. All images are (H, W, 3) uint8 RGB."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.images import encode_jpeg

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {"left": (64, 156, 255), "right": (255, 140, 26), "centre": (120, 220, 120)}
"""RGB by the person's own side; told apart by colour-blind eyes, too."""
_OUTLINE: Colour = (20, 20, 20)
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (40, 40, 40)
_SUBPIXEL = 4  # fractional bits of drawn coordinates
_FAR = 1e5  # pixels; beyond it, cv2's fixed-point coordinates would overflow
_GAP = 6  # pixels between the cells of a sheet
_FONT, _FONT_SCALE, _CAPTION_HEIGHT = cv2.FONT_HERSHEY_SIMPLEX, 0.4, 18


def draw_skeleton(
    image: np.ndarray, keypoints: np.ndarray, definition: DatasetDefinition, *, threshold: float = 0.3
) -> np.ndarray:
    """A copy of the image with one person's limbs and joints, coloured by side.

    keypoints: (K, 3) of x, y, score in pixels, or an annotation's visibility for the score. Drawn are the joints that
    score above the threshold and the limbs between two such. Lines are as thick as suits the person's size.
    """
    canvas = np.ascontiguousarray(image).copy()
    assert canvas.dtype == np.uint8 and canvas.ndim == 3 and keypoints.shape == (definition.num_keypoints, 3)
    drawn = np.isfinite(keypoints).all(axis=1) & (keypoints[:, 2] > threshold)
    if not drawn.any():
        return canvas
    places = np.clip(np.where(drawn[:, None], keypoints[:, :2], 0), -_FAR, _FAR)
    points = [tuple(point) for point in np.rint(places * 2**_SUBPIXEL).astype(int).tolist()]
    extent = float(np.hypot(*np.ptp(places[drawn], axis=0)))
    thickness = int(np.clip(round(extent / 120), 1, 12))
    radius = max(2.0, 1.2 * thickness)
    sides = [_side(name) for name in definition.keypoints]
    limbs = [(first, second) for first, second in definition.skeleton_index.tolist() if drawn[first] and drawn[second]]
    # All outlines lie under all colours, so that a joint of many limbs stays clean.
    for outline in (True, False):
        for first, second in limbs:
            colour = _OUTLINE if outline else COLOURS[_limb_side(sides[first], sides[second])]
            width = thickness + 2 if outline else thickness
            cv2.line(canvas, points[first], points[second], colour, width, cv2.LINE_AA, _SUBPIXEL)
    for joint in np.flatnonzero(drawn):
        for size, colour in ((radius + 1, _OUTLINE), (radius, COLOURS[sides[joint]])):
            cv2.circle(canvas, points[joint], round(size * 2**_SUBPIXEL), colour, -1, cv2.LINE_AA, _SUBPIXEL)
    return canvas


def contact_sheet(
    images: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None, *, cell: int = 480
) -> np.ndarray:
    """Images side by side, row after row, on white; captions (ASCII) below them, cut to the cell's width.

    All cells have the size of the largest image; images with a side of more than `cell` pixels are shrunk to it.
    """
    assert images and columns > 0 and (captions is None or len(captions) == len(images))
    pictures = [_shrink(image, cell) for image in images]
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    step_y, step_x = height + _GAP + (_CAPTION_HEIGHT if captions else 0), width + _GAP
    sheet = np.full((rows * step_y + _GAP, columns * step_x + _GAP, 3), _PAPER, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = _GAP + index // columns * step_y, _GAP + index % columns * step_x
        y, x = top + (height - picture.shape[0]) // 2, left + (width - picture.shape[1]) // 2
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
        if captions:
            baseline = (x, y + picture.shape[0] + _CAPTION_HEIGHT - 5)
            cv2.putText(sheet, _cut(captions[index], width), baseline, _FONT, _FONT_SCALE, _INK, 1, cv2.LINE_AA)
    return sheet


def save_jpg(image: np.ndarray, path: Path, quality: int = 90) -> None:
    """Writes an image as JPEG."""
    path.write_bytes(encode_jpeg(image, quality))


def _side(name: str) -> str:
    """A keypoint's side from its name: left_knee, l_knee, Left Knee."""
    first = name.lower().replace(" ", "_").split("_")[0]
    return {"left": "left", "l": "left", "right": "right", "r": "right"}.get(first, "centre")


def _limb_side(first: str, second: str) -> str:
    """A limb has the side of its ends; from the trunk to a side it has that side, across the body none."""
    sides = {first, second} - {"centre"}
    return sides.pop() if len(sides) == 1 else "centre"


def _shrink(image: np.ndarray, longest: int) -> np.ndarray:
    height, width = image.shape[:2]
    ratio = longest / max(height, width)
    if ratio >= 1:
        return image
    return cv2.resize(
        image, (max(1, round(width * ratio)), max(1, round(height * ratio))), interpolation=cv2.INTER_AREA
    )


def _cut(text: str, width: int) -> str:
    while text and cv2.getTextSize(text, _FONT, _FONT_SCALE, 1)[0][0] > width:
        text = text[:-1]
    return text
