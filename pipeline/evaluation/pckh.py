"""PCKh on MPII: a joint is right within half a head's size (Andriluka et al., "2D Human Pose Estimation", CVPR 2014).

Computed as HRNet and mmpose do (`TopDownMpiiDataset.evaluate`), from whose code the published numbers come.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from pipeline.data.instance import Instance
from pipeline.data.readers.files import read_bytes
from pipeline.errors import DataError
from pipeline.evaluation.predictions import Prediction

UNDEFINED = -1.0
"""Where no joint is labelled, as for AP."""
HEAD_SHARE = 0.6
"""A head's size is this share of its box's diagonal."""
FINE_THRESHOLD = 0.11
"""What is published as PCKh@0.1: HRNet's and mmpose's code take the entry for 0.11 from their table."""

JOINTS = (
    *("rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelv", "thor"),
    *("neck", "head", "rwri", "relb", "rsho", "lsho", "lelb", "lwri"),
)
"""Short names of MPII's joints, in the order of its annotations."""

_GROUPS = {
    "Head": ("head",),
    "Shoulder": ("lsho", "rsho"),
    "Elbow": ("lelb", "relb"),
    "Wrist": ("lwri", "rwri"),
    "Hip": ("lhip", "rhip"),
    "Knee": ("lkne", "rkne"),
    "Ankle": ("lank", "rank"),
}
_NOT_IN_MEAN = (6, 7)  # pelvis and thorax
_FIELDS = ("dataset_joints", "jnt_missing", "pos_gt_src", "headboxes_src")
_JOINTS = len(JOINTS)


@dataclass(frozen=True, slots=True, eq=False)
class MpiiTruth:
    """Ground truth of N people, in the order of the annotation list (an instance's id is its position)."""

    joints: tuple[str, ...]
    """MPII's short names of the 16 joints, such as rank (right ankle)."""
    positions: np.ndarray
    """(N, 16, 2) float64 pixels, counted from 1 as in MATLAB."""
    labelled: np.ndarray
    """(N, 16) bool."""
    head_sizes: np.ndarray
    """(N,) float64 pixels: 0.6 x the diagonal of the head's box."""


def load_truth(path: str | Path | None) -> MpiiTruth:
    """Reads `mpii_gt_val.mat`, a path or an fsspec URL.

    Only plain arrays are read; nothing in the file is run. Raises DataError if there is none, or one of another form.
    """
    if path is None:
        raise DataError(
            "PCKh needs mpii_gt_val.mat, with the head sizes of MPII's validation people: put it into mpii/annotations "
            "below the data root (as gt_valid.mat into mpii/annot), or give the source's 'truth'"
        )
    try:
        content = loadmat(io.BytesIO(read_bytes(str(path))), variable_names=_FIELDS)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise ValueError, TypeError, zlib.error and more
        raise DataError(f"{path}: not a MATLAB file of version 5 to 7 ({type(error).__name__}: {error})") from None
    missing, positions, boxes = (_numbers(content, field, path) for field in _FIELDS[1:])
    people = positions.shape[-1]
    expected = {"jnt_missing": (_JOINTS, people), "pos_gt_src": (_JOINTS, 2, people), "headboxes_src": (2, 2, people)}
    for (field, shape), found in zip(expected.items(), (missing, positions, boxes), strict=True):
        if found.shape != shape:
            raise DataError(f"{path}: {field}: expected the shape {shape}, found {found.shape}")
    return MpiiTruth(
        joints=_names(content, path),
        positions=positions.transpose(2, 0, 1),
        labelled=missing.T == 0,
        head_sizes=HEAD_SHARE * np.linalg.norm(boxes[1] - boxes[0], axis=0),
    )


def truth_from_joints(instances: Sequence[Instance]) -> MpiiTruth:
    """Ground truth from the annotations alone, for want of mpii_gt_val.mat.

    The head's size is the distance from upper neck to head top, which 0.6 x the diagonal of the head's box was made to
    approximate. Close to PCKh, not equal to it. People without both joints do not count.
    """
    count = 1 + max((int(instance.id) for instance in instances), default=-1)
    positions, labelled = np.zeros((count, _JOINTS, 2)), np.zeros((count, _JOINTS), bool)
    sizes = np.ones(count)
    for instance in instances:
        place = int(instance.id)
        neck, top = instance.keypoints[JOINTS.index("neck")], instance.keypoints[JOINTS.index("head")]
        if neck[2] > 0 and top[2] > 0 and (neck[:2] != top[:2]).any():
            positions[place] = instance.keypoints[:, :2] + 1.0
            labelled[place] = instance.keypoints[:, 2] > 0
            sizes[place] = np.linalg.norm(top[:2] - neck[:2])
    return MpiiTruth(JOINTS, positions, labelled, sizes)


def evaluate_pckh(
    predictions: Sequence[Prediction], truth: MpiiTruth, *, instance_ids: Collection[int] | None = None
) -> dict[str, float]:
    """Head, Shoulder, Elbow, Wrist, Hip, Knee, Ankle, PCKh (their joints' mean, weighted by how often each is labelled)
    and PCKh@0.1, in percent of the labelled joints; -1 where none is.

    predictions: 0-based pixels, matched by instance id, in any order; of several for one person the first is taken.
    People without a prediction, and coordinates that are not finite, count as wrong: silence gains nothing.
    `instance_ids` restricts the evaluation. Raises DataError for an id that the truth does not have.
    """
    found = np.full(truth.positions.shape, np.nan)
    for prediction in reversed(predictions):
        assert prediction.keypoints.shape == (_JOINTS, 3)
        found[_position(prediction.instance_id, truth)] = prediction.keypoints[:, :2] + 1.0
    labelled = truth.labelled
    if instance_ids is not None:
        chosen = np.zeros(len(labelled), bool)
        chosen[[_position(instance_id, truth) for instance_id in instance_ids]] = True
        labelled = labelled & chosen[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.linalg.norm(found - truth.positions, axis=-1) / truth.head_sizes[:, None]
    count = labelled.sum(axis=0)
    right = (labelled & (errors <= 0.5)).sum(axis=0)  # NaN is not <= 0.5
    fine = (labelled & (errors <= FINE_THRESHOLD)).sum(axis=0)
    values = {row: _group_rate(right, count, [truth.joints.index(name) for name in _GROUPS[row]]) for row in _GROUPS}
    mean = np.delete(np.arange(_JOINTS), _NOT_IN_MEAN)
    values["PCKh"] = _percent(right[mean].sum(), count[mean].sum())
    values["PCKh@0.1"] = _percent(fine[mean].sum(), count[mean].sum())
    return values


def _group_rate(right: np.ndarray, count: np.ndarray, joints: list[int]) -> float:
    """The mean of the rates of left and right, as far as they are labelled."""
    rates = [_percent(right[joint], count[joint]) for joint in joints if count[joint]]
    return float(np.mean(rates)) if rates else UNDEFINED


def _percent(right: int, count: int) -> float:
    return float(100.0 * right / count) if count else UNDEFINED


def _position(instance_id: int | str | None, truth: MpiiTruth) -> int:
    if not isinstance(instance_id, int | np.integer) or not 0 <= instance_id < len(truth.labelled):
        raise DataError(
            f"PCKh: instance {instance_id!r} is not among the {len(truth.labelled)} people of the ground truth; "
            "do annotations and mpii_gt_val.mat belong together?"
        )
    return int(instance_id)


def _numbers(content: dict[str, Any], field: str, path: str | Path) -> np.ndarray:
    value = content.get(field)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "buif":
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{path}: {field}: expected an array of numbers, found {found}")
    return value.astype(np.float64)


def _names(content: dict[str, Any], path: str | Path) -> tuple[str, ...]:
    """The joint names; the file has a cell array of strings."""
    value = content.get("dataset_joints")
    cells = value.ravel().tolist() if isinstance(value, np.ndarray) and value.dtype.kind in "OU" else []
    names = tuple(str(np.squeeze(cell)) for cell in cells)
    wanted = {name for group in _GROUPS.values() for name in group}
    if len(names) != _JOINTS or wanted - set(names):
        raise DataError(f"{path}: dataset_joints: expected {_JOINTS} names with {sorted(wanted)}, found {list(names)}")
    return names
