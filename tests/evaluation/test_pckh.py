from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.data.annotations import read
from pipeline.data.definitions import DatasetSource
from pipeline.errors import DataError
from pipeline.evaluation.pckh import evaluate_pckh, load_truth, truth_from_joints
from pipeline.evaluation.predictions import Prediction
from tests.evaluation.people import prediction

JOINTS = [
    *("rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelv", "thor"),
    *("neck", "head", "rwri", "relb", "rsho", "lsho", "lelb", "lwri"),
]
HEAD = 0.6 * 50.0  # boxes of 30 x 40


def content(people: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    names = np.empty((1, 16), object)
    names[0] = JOINTS
    corner = rng.uniform(100, 200, (2, people))
    return {
        "dataset_joints": names,
        "jnt_missing": np.zeros((16, people), np.uint8),
        "pos_gt_src": rng.uniform(100, 500, (16, 2, people)),
        "headboxes_src": np.stack([corner, corner + np.array([[30.0], [40.0]])]),
    }


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "mpii_gt_val.mat"
    savemat(path, values)
    return path


def perfect(values: dict[str, Any]) -> list[Prediction]:
    """0-based, as predictions are."""
    found = []
    for person in range(values["pos_gt_src"].shape[2]):
        points = np.column_stack([values["pos_gt_src"][:, :, person] - 1, np.ones(16)])
        found.append(prediction(points, image_id=f"{person}.jpg", instance_id=person))
    return found


def move(found: list[Prediction], person: int, joint: str, pixels: float) -> None:
    found[person].keypoints[JOINTS.index(joint), 0] += pixels


def test_the_truth_is_read_with_head_sizes_of_six_tenths_of_the_diagonal(tmp_path: Path) -> None:
    values = content()
    values["jnt_missing"][2, 3] = 1
    truth = load_truth(write(tmp_path, values))
    assert truth.joints == tuple(JOINTS)
    assert truth.positions[3, 5] == pytest.approx(values["pos_gt_src"][5, :, 3])
    assert truth.head_sizes == pytest.approx([HEAD] * 4)
    assert not truth.labelled[3, 2] and truth.labelled.sum() == 63


def test_perfect_predictions_count_from_0_where_the_truth_counts_from_1(tmp_path: Path) -> None:
    values = content()
    metrics = evaluate_pckh(perfect(values), load_truth(write(tmp_path, values)))
    rows = ["Head", "Shoulder", "Elbow", "Wrist", "Hip", "Knee", "Ankle", "PCKh", "PCKh@0.1"]
    assert metrics == {row: 100.0 for row in rows}


def test_known_distances_are_right_or_wrong_by_half_a_head(tmp_path: Path) -> None:
    values = content()
    found = perfect(values)
    move(found, 0, "lwri", 0.499 * HEAD)
    move(found, 1, "lwri", 0.501 * HEAD)
    move(found, 2, "rank", 50 * HEAD)
    move(found, 3, "rank", 50 * HEAD)
    move(found, 0, "lelb", 0.108 * HEAD)  # published code takes 0.11 for PCKh@0.1
    move(found, 1, "lelb", 0.112 * HEAD)
    for joint in ("pelv", "thor"):
        move(found, 0, joint, 50 * HEAD)
    metrics = evaluate_pckh(found, load_truth(write(tmp_path, values)))
    assert metrics["Wrist"] == pytest.approx((75 + 100) / 2)
    assert metrics["Ankle"] == pytest.approx((50 + 100) / 2)
    assert metrics["Elbow"] == metrics["Head"] == metrics["Hip"] == 100.0
    assert metrics["PCKh"] == pytest.approx(100 * (14 * 4 - 3) / (14 * 4))
    assert metrics["PCKh@0.1"] == pytest.approx(100 * (14 * 4 - 5) / (14 * 4))


def test_joints_not_labelled_do_not_count_and_the_mean_is_weighted(tmp_path: Path) -> None:
    values = content()
    values["jnt_missing"][JOINTS.index("head"), 1:] = 1
    values["jnt_missing"][JOINTS.index("lkne")] = 1
    values["jnt_missing"][JOINTS.index("lsho")] = values["jnt_missing"][JOINTS.index("rsho")] = 1
    found = perfect(values)
    move(found, 0, "head", 9 * HEAD)
    move(found, 1, "head", 9 * HEAD)
    move(found, 1, "rkne", 9 * HEAD)
    metrics = evaluate_pckh(found, load_truth(write(tmp_path, values)))
    assert metrics["Head"] == 0.0
    assert metrics["Knee"] == 75.0
    assert metrics["Shoulder"] == -1.0
    assert metrics["PCKh"] == pytest.approx(100 * (10 * 4 + 1 - 2) / (10 * 4 + 1))


def test_missing_people_and_nan_are_wrong_order_and_repeats_do_not_matter(tmp_path: Path) -> None:
    values = content()
    truth = load_truth(write(tmp_path, values))
    found = perfect(values)
    assert evaluate_pckh(found[::-1], truth)["PCKh"] == 100.0
    wrong = prediction(np.zeros((16, 3)), instance_id=2)
    assert evaluate_pckh([*found, wrong], truth)["PCKh"] == 100.0
    assert evaluate_pckh([found[0], found[1], found[3]], truth)["PCKh"] == 75.0
    found[2].keypoints[:] = np.nan
    assert evaluate_pckh(found, truth)["PCKh"] == 75.0
    assert evaluate_pckh([], truth)["PCKh"] == 0.0
    assert evaluate_pckh(found[:2], truth, instance_ids=[0, 1])["PCKh"] == 100.0
    assert evaluate_pckh(found[:1], truth, instance_ids=[0, 1])["PCKh"] == 50.0


def test_a_truth_that_is_absent_or_of_another_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="put it into mpii/annotations"):
        load_truth(None)
    with pytest.raises(DataError, match="can't be read"):
        load_truth(tmp_path / "absent.mat")
    (tmp_path / "text.mat").write_text("not a mat file, whatever its name says" * 10)
    with pytest.raises(DataError, match="text.mat: not a MATLAB file"):
        load_truth(tmp_path / "text.mat")
    whole = content()
    for field, value, said in (
        ("jnt_missing", np.zeros((16, 3)), r"jnt_missing: expected the shape \(16, 4\)"),
        ("pos_gt_src", "text", "pos_gt_src: expected an array of numbers"),
        ("headboxes_src", {"a": 1}, "headboxes_src: expected an array of numbers"),
        ("dataset_joints", np.zeros((1, 16)), "dataset_joints: expected 16 names"),
    ):
        with pytest.raises(DataError, match=said):
            load_truth(write(tmp_path, whole | {field: value}))
    del whole["headboxes_src"]
    with pytest.raises(DataError, match="headboxes_src: expected an array of numbers, found NoneType"):
        load_truth(write(tmp_path, whole))


def test_an_instance_that_the_truth_lacks_is_named(tmp_path: Path) -> None:
    truth = load_truth(write(tmp_path, content()))
    for instance_id in (4, None, "x"):
        with pytest.raises(DataError, match=f"instance {instance_id!r} is not among the 4 people"):
            evaluate_pckh([prediction(np.zeros((16, 3)), instance_id=instance_id)], truth)


def test_without_the_file_the_head_is_measured_from_neck_to_top(samples: Path) -> None:
    people = read(DatasetSource(name="mpii", split="val"), samples).instances
    truth = truth_from_joints(people)
    neck, top = people[0].keypoints[8, :2], people[0].keypoints[9, :2]
    assert truth.head_sizes[people[0].id] == pytest.approx(np.hypot(*(top - neck)))
    found = [prediction(one.keypoints.copy(), instance_id=one.id) for one in people]
    assert evaluate_pckh(found, truth)["PCKh"] == 100.0
    found[0].keypoints[10, 0] += 0.51 * truth.head_sizes[people[0].id]
    assert evaluate_pckh(found, truth)["Wrist"] < 100.0
