"""MPII's list of records."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from tests.data.readers.helpers import kinds, read_data


def mpii(**changes: Any) -> dict[str, Any]:
    joints = [[10.0 + number, 20.0 + number] for number in range(16)]
    return {"joints": joints, "joints_vis": [1] * 16, "image": "a.jpg", "center": [100, 90], "scale": 0.5} | changes


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"joints": [[1, 2]] * 15}, "wrong keypoint count"),
        ({"joints_vis": [1] * 15}, "wrong keypoint count"),
        ({"joints": "none"}, "mistyped record"),
        ({"joints": [[1, "2"]] * 16}, "mistyped record"),
        ({"joints": [1] * 16}, "mistyped record"),
        ({"joints_vis": [2] * 16}, "visibility not 0 or 1"),
        ({"joints_vis": [[]] * 16}, "visibility not 0 or 1"),
        ({"image": None}, "mistyped record"),
        ({"center": [100]}, "mistyped record"),
        ({"scale": "0.5"}, "mistyped record"),
        ({"scale": 0}, "box without size"),
        ({"scale": float("nan")}, "box without size"),
        ({"center": [-1, -1]}, "box without size"),
    ],
)
def test_a_bad_mpii_record_is_a_dropped_problem(tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    annotations = read_data(tmp_path, [mpii(**changes), mpii()], "mpii")
    assert kinds(annotations) == [(kind, True)]
    assert annotations.problems[0].where.endswith("a.json: record 0")
    assert [instance.id for instance in annotations.instances] == [1]
    assert annotations.coco is None


@pytest.mark.fault(23)
def test_mpii_joints_that_are_odd_are_reported(tmp_path: Path) -> None:
    joints = mpii()["joints"]
    annotations = read_data(
        tmp_path,
        [
            mpii(joints=[[float("nan"), 1], *joints[1:]]),
            mpii(joints=[[-30, 1], *joints[1:]]),
            mpii(joints_vis=[0] * 16),
        ],
        "mpii",
    )
    assert kinds(annotations) == [("keypoint not finite", False), ("keypoint outside its image", False)]
    assert [instance.keypoints[0].tolist() for instance in annotations.instances] == [[0, 0, 0], [-31, 0, 2]]


@pytest.mark.parametrize(("data", "message"), [({}, "expected a list"), ([], "is empty")])
def test_an_mpii_file_of_another_form_is_a_data_error(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_data(tmp_path, data, "mpii")
