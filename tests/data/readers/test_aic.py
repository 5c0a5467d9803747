"""The original AI Challenger release."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from tests.data.readers.helpers import kinds, perfect_score, read_data


def aic_original(**changes: Any) -> list[dict[str, Any]]:
    human1 = [coordinate for number in range(14) for coordinate in (100 + number, 50 + number, 1 + number % 3)]
    record = {
        "image_id": "a0f6bd",
        "url": "http://example.org/1.jpg",
        "human_annotations": {"human1": [90, 40, 190, 240], "human2": [10, 20, 60, 120]},
        "keypoint_annotations": {"human1": human1, "human2": [30, 40, 1] * 14},
    }
    return [record | changes]


def test_the_original_aic_release_reads_as_its_converted_form(tmp_path: Path) -> None:
    annotations = read_data(tmp_path, aic_original(), "aic")
    first, second = annotations.instances
    assert not annotations.problems
    assert (first.id, second.id, first.image_id, first.image_size) == (1, 2, "a0f6bd", None)
    assert Path(first.image) == tmp_path / "a0f6bd.jpg"
    assert first.bbox == (90, 40, 99, 199)
    assert first.area == 100 * 200
    # 1 visible -> 2, 2 occluded -> 1, 3 not labelled -> 0
    assert first.keypoints[:3].tolist() == [[100, 50, 2], [101, 51, 1], [0, 0, 0]]
    assert annotations.coco["annotations"][0]["num_keypoints"] == 10
    assert perfect_score(annotations) == pytest.approx(1.0)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"human_annotations": {"human1": [90, 40, 190, 240]}}, "mistyped record"),
        ({"human_annotations": {"human1": [90, 40, 190, 240], "human2": [1, 2, "3", 4]}}, "mistyped record"),
        ({"keypoint_annotations": {"human1": [30, 40, 1] * 14, "human2": [1, 2, 1] * 13}}, "wrong keypoint count"),
        ({"keypoint_annotations": {"human1": [30, 40, 1] * 14, "human2": [1, 2, 0] * 14}}, "visibility not 1, 2 or 3"),
        ({"keypoint_annotations": {"human1": [30, 40, 1] * 14, "human2": [1, 2, []] * 14}}, "visibility not 1, 2 or 3"),
        ({"keypoint_annotations": {"human1": [30, 40, 1] * 14, "human2": "none"}}, "mistyped record"),
    ],
)
def test_a_bad_person_of_the_original_aic_release_is_a_problem(tmp_path: Path, changes: Any, kind: str) -> None:
    annotations = read_data(tmp_path, aic_original(**changes), "aic")
    assert kinds(annotations) == [(kind, True)]
    assert "a0f6bd, human2" in annotations.problems[0].where
    assert len(annotations.instances) == 1
    assert annotations.records == len(aic_original(**changes)[0]["keypoint_annotations"])


def test_bad_images_of_the_original_aic_release_are_problems(tmp_path: Path) -> None:
    bad = [None, {"image_id": []}, aic_original(human_annotations=[])[0], *aic_original()]
    annotations = read_data(tmp_path, [*aic_original(), *bad], "aic")
    assert [kind for kind, _ in kinds(annotations)] == ["mistyped record"] * 3 + ["duplicate image id"]
    with pytest.raises(DataError, match="none of 0 people in 2 records"):
        read_data(tmp_path, bad[:2], "aic")
