"""MPII as the json list that HRNet and mmpose distribute: joints, joints_vis, center, scale and image."""

from typing import Any

import numpy as np

from pipeline.data.definitions import DatasetDefinition
from pipeline.data.instance import Instance
from pipeline.data.readers import files
from pipeline.data.readers.coco import TOLERANCE
from pipeline.data.readers.records import LARGEST, ImageRecord, Parsed, is_number, number_rows, shown
from pipeline.errors import DataError

BODY = 200.0
"""Pixels of body height that MPII's scale 1 stands for."""
PADDING = 1.25
"""Context around the body in the window."""


def read_mpii(data: Any, definition: DatasetDefinition, file: str, folder: str) -> Parsed:
    """Reads the list; ids are the records' positions, image ids the image names, image sizes unknown.

    Raises DataError if the content as a whole has another form.
    """
    if not isinstance(data, list):
        raise DataError(f"{file}: expected a list of records, found a {type(data).__name__}")
    if not data:
        raise DataError(f"{file}: the list of records is empty")
    parsed = Parsed(file, records=len(data))
    for position, record in enumerate(data):
        where = f"record {position}"
        fault = _fault(record, definition.num_keypoints)
        if fault:
            parsed.note(where, *fault, dropped=True)
            continue
        name = record["image"]
        parsed.images.setdefault(name, ImageRecord(name, name, files.join(folder, name), None, None))
        points = _keypoints(record, where, parsed)
        if (points[:, 2] > 0).any():
            box, window = geometry(*record["center"], record["scale"])
            image = parsed.images[name]
            parsed.instances.append(
                Instance(definition.name, position, name, image.path, None, box, points, box[2] * box[3], window)
            )
    return parsed


def geometry(
    centre_x: float, centre_y: float, scale: float
) -> tuple[tuple[float, float, float, float], tuple[float, float, float, float]]:
    """Box (x, y, width, height) and window (centre x, centre y, width, height) of a person, in 0-based pixels.

    The centre moves down by 15 x scale, so that feet are not cut, and by -1 from MATLAB's counting. The box is the
    square of side 200 x scale around it, not clipped as the image size is unknown; the window is 1.25 x as large.
    As in mmpose (TopDownMpiiDataset) and HRNet.
    """
    x, y, side = centre_x - 1.0, centre_y + 15.0 * scale - 1.0, BODY * scale
    return (x - side / 2, y - side / 2, side, side), (x, y, side * PADDING, side * PADDING)


def _fault(record: Any, keypoints: int) -> tuple[str, str] | None:
    """Kind and description of what makes a record unusable."""
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        return "mistyped record", f"expected an object with image, found {shown(record)}"
    if not files.stays_below(record["image"]):
        return "image outside its folder", f"image {shown(record['image'])}: not looked at"
    joints, visible, centre, scale = (record.get(field) for field in ("joints", "joints_vis", "center", "scale"))
    if not isinstance(joints, list) or not isinstance(visible, list):
        return "mistyped record", f"joints and joints_vis: expected lists, found {shown(joints)} and {shown(visible)}"
    if len(joints) != keypoints or len(visible) != keypoints:
        found = f"{len(joints)} joints and {len(visible)} joints_vis"
        return "wrong keypoint count", f"expected {keypoints} of each, found {found}"
    if not all(isinstance(joint, list) and len(joint) == 2 for joint in joints) or not number_rows(joints, 2)[1].all():
        return "mistyped record", f"joints: expected pairs of numbers, found {shown(joints)}"
    wrong = [flag for flag in visible if not is_number(flag) or flag not in (0, 1)]
    if wrong:
        return "visibility not 0 or 1", f"joints_vis: found {shown(wrong[0])}"
    if not isinstance(centre, list) or len(centre) != 2 or not all(is_number(value) for value in [*centre, scale]):
        return "mistyped record", f"center and scale: expected numbers, found {shown(centre)} and {shown(scale)}"
    if centre[0] == -1 or not all(abs(value) <= LARGEST for value in [*centre, BODY * scale]) or scale <= 0:
        return "box without size", f"center {shown(centre)}, scale {shown(scale)}: the person has no place"
    return None


def _keypoints(record: dict[str, Any], where: str, parsed: Parsed) -> np.ndarray:
    """(K, 3): 0-based pixels; joints_vis 1 is COCO's 2. Those not labelled lie at (0, 0)."""
    points = np.zeros((len(record["joints"]), 3))
    points[:, :2] = np.array(record["joints"], dtype=np.float64) - 1.0
    points[:, 2] = np.array(record["joints_vis"], dtype=np.float64) * 2
    broken = (points[:, 2] > 0) & ~(np.abs(points[:, :2]) <= LARGEST).all(axis=1)
    if broken.any():
        what = f"{broken.sum()} labelled keypoints are not finite or huge: taken as not labelled"
        parsed.note(where, "keypoint not finite", what, dropped=False)
    points[broken | (points[:, 2] == 0)] = 0
    outside = (points[:, :2] < -TOLERANCE).any(axis=1)
    if outside.any():
        what = f"{outside.sum()} keypoints, such as {points[outside][0, :2].round(2).tolist()}"
        parsed.note(where, "keypoint outside its image", what, dropped=False)
    return points
