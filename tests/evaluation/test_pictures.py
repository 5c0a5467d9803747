from pathlib import Path

import cv2
import numpy as np

from pipeline.data.annotations import read
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.evaluation.pictures import COLOURS, contact_sheet, draw_skeleton, save_jpg

COCO = load_definition("coco")


def standing() -> np.ndarray:
    """(17, 3): left joints at x = 150, right at 50, the nose at 100, 12 pixels from joint to joint downwards."""
    points = np.zeros((17, 3))
    for joint, name in enumerate(COCO.keypoints):
        points[joint] = [{"l": 150, "r": 50, "n": 100}[name[0]], 20 + 12 * joint, 0.9]
    return points


def colour_at(image: np.ndarray, point: np.ndarray) -> tuple[int, ...]:
    return tuple(image[round(point[1]), round(point[0])].tolist())


def test_joints_and_limbs_have_the_colour_of_their_side() -> None:
    image = np.zeros((260, 200, 3), np.uint8)
    points = standing()
    drawn = draw_skeleton(image, points, COCO)
    for joint, name in enumerate(COCO.keypoints):
        side = {"l": "left", "r": "right", "n": "centre"}[name[0]]
        assert colour_at(drawn, points[joint]) == COLOURS[side], name
    left, right = COCO.keypoints.index("left_knee"), COCO.keypoints.index("left_ankle")
    assert colour_at(drawn, (points[left] + points[right]) / 2) == COLOURS["left"]
    hips = [COCO.keypoints.index(name) for name in ("left_hip", "right_hip")]
    assert colour_at(drawn, points[hips].mean(axis=0)) == COLOURS["centre"]
    assert not image.any()


def test_unsure_and_impossible_joints_and_their_limbs_are_left_out() -> None:
    image = np.full((260, 200, 3), 7, np.uint8)
    points = standing()
    knee, ankle = COCO.keypoints.index("left_knee"), COCO.keypoints.index("left_ankle")
    points[ankle, 2] = 0.3
    drawn = draw_skeleton(image, points, COCO)
    assert colour_at(drawn, points[ankle]) == colour_at(drawn, (points[ankle] + points[knee]) / 2) == (7, 7, 7)
    assert colour_at(draw_skeleton(image, points, COCO, threshold=0.2), points[ankle]) == COLOURS["left"]
    points[ankle] = [np.nan, 1e30, 0.9]
    points[knee, :2] = 1e30
    assert draw_skeleton(image, points, COCO).shape == image.shape
    points[:, 2] = 0
    assert (draw_skeleton(image, points, COCO) == image).all()


def test_larger_people_get_thicker_lines() -> None:
    drawn = [draw_skeleton(np.zeros((260 * s, 200 * s, 3), np.uint8), standing() * [s, s, 1], COCO) for s in (1, 8)]
    assert drawn[1].any(axis=2).sum() > 20 * drawn[0].any(axis=2).sum()


def test_real_annotations_are_drawn_in_every_format(samples: Path) -> None:
    for name in ("coco", "aic", "mpii", "crowdpose"):
        data = read(DatasetSource(name=name, split="val"), samples)
        instance = data.instances[0]
        image = cv2.cvtColor(cv2.imread(instance.image), cv2.COLOR_BGR2RGB)
        drawn = draw_skeleton(image, instance.keypoints, data.definition)
        changed = (drawn != image).any(axis=2)
        labelled = instance.keypoints[instance.keypoints[:, 2] > 0, :2].round().astype(int)
        assert changed[labelled[:, 1], labelled[:, 0]].all()
        assert changed.mean() < 0.2


def test_a_sheet_places_images_row_by_row_and_shrinks_large_ones() -> None:
    red, green = np.zeros((40, 60, 3), np.uint8), np.zeros((20, 20, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    sheet = contact_sheet([red, green, red], 2)
    assert sheet.shape == (2 * 46 + 6, 2 * 66 + 6, 3)
    assert colour_at(sheet, np.array([6 + 30, 6 + 20])) == (255, 0, 0)
    assert colour_at(sheet, np.array([6 + 66 + 30, 6 + 20])) == (0, 255, 0)
    assert colour_at(sheet, np.array([6 + 30, 6 + 46 + 20])) == (255, 0, 0)
    assert colour_at(sheet, np.array([6 + 66 + 30, 6 + 46 + 20])) == (255, 255, 255)
    assert contact_sheet([np.zeros((1000, 500, 3), np.uint8)], 4, cell=100).shape == (112, 62, 3)


def test_captions_have_their_own_strip_and_never_run_into_the_next_cell() -> None:
    grey = np.full((30, 50, 3), 128, np.uint8)
    sheet = contact_sheet([grey, grey], 2, ["OKS 0.93 and a very long story", ""])
    strip = sheet[6 + 30 :]
    assert sheet.shape[0] == contact_sheet([grey, grey], 2).shape[0] + 18
    assert strip[:, :56].min() < 128
    assert (strip[:, 62:] == 255).all()


def test_saved_pictures_keep_their_colours(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    save_jpg(image, tmp_path / "a.jpg")
    back = cv2.cvtColor(cv2.imread(str(tmp_path / "a.jpg")), cv2.COLOR_BGR2RGB).astype(int)
    assert abs(back - image).max() <= 4
