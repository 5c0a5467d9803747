"""Augmented views: one warp, keypoints that stay on their pixels, draws with the published numbers."""

import cv2
import numpy as np
import pytest

from pipeline.data.augmentation import PoseAugmentation, draw_matrix, mae_view, pose_view
from pipeline.data.definitions import load_definition
from pipeline.data.geometry import apply_affine, box_to_window, invert_affine, udp_matrix

COCO = load_definition("coco")
INPUT = (256, 192)
BBOX = (100.0, 60.0, 90.0, 240.0)
WINDOW = box_to_window(BBOX, 0.75)
FLIP = PoseAugmentation(
    flip=1, half_body=0, scale=0, rotation_probability=0, center_jitter_probability=0
)  # nothing but the mirror


def person(labelled: int = 17) -> np.ndarray:
    """(17, 3) keypoints inside the box; the last ones are not labelled."""
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.uniform([105, 65], [185, 295], (17, 2)), np.full((17, 1), 2.0)], axis=1)
    points[labelled:, 2] = 0
    return points


def dots(keypoints: np.ndarray, height: int = 360, width: int = 320) -> np.ndarray:
    """A bright round blob on each keypoint, its brightness telling which."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.zeros((height, width), np.float64)
    for k, (u, v, _) in enumerate(keypoints):
        image = np.maximum(image, (80 + 10 * k) * np.exp(-((x - u) ** 2 + (y - v) ** 2) / 18))
    return np.repeat(image.round().astype(np.uint8)[..., None], 3, axis=2)


def half_window(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and size, in the image, of an upright warp's window."""
    corners = apply_affine(np.array([[0, 0], [INPUT[1] - 1, INPUT[0] - 1]]), invert_affine(matrix))
    return corners.mean(axis=0), np.abs(corners[1] - corners[0])


def draws(config: PoseAugmentation, keypoints: np.ndarray, count: int, bbox: tuple | None = None) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [draw_matrix(keypoints, WINDOW, INPUT, COCO, config, rng, bbox=bbox)[0] for _ in range(count)]


def test_without_augmentation_the_view_is_the_upright_window() -> None:
    keypoints, image = person(12), dots(person())
    expected = udp_matrix(WINDOW[:2], WINDOW[2:], 0, INPUT)
    for config in (None, PoseAugmentation(enabled=False)):
        view = pose_view(image, keypoints, WINDOW, INPUT, COCO, config, np.random.default_rng(0), bbox=BBOX)
        assert view.image.shape == (256, 192, 3)
        assert view.image.dtype == np.uint8
        np.testing.assert_allclose(view.keypoints[:12], apply_affine(keypoints[:12, :2], expected), atol=1e-4)
        assert view.visible.tolist() == [1.0] * 12 + [0.0] * 5
        assert not view.keypoints[12:].any()


def test_occluded_but_labelled_keypoints_count_as_visible() -> None:
    keypoints = person()
    keypoints[3, 2] = 1
    view = pose_view(dots(keypoints), keypoints, WINDOW, INPUT, COCO, None, np.random.default_rng(0))
    assert view.visible[3] == 1


def test_mirroring_is_exactly_the_last_column_minus_x_with_left_and_right_swapped() -> None:
    keypoints, image = person(14), dots(person())
    plain = pose_view(image, keypoints, WINDOW, INPUT, COCO, None, np.random.default_rng(0))
    flipped = pose_view(image, keypoints, WINDOW, INPUT, COCO, FLIP, np.random.default_rng(0), bbox=BBOX)
    difference = np.abs(flipped.image[:, ::-1].astype(int) - plain.image)
    assert difference.max() <= 1, "the picture is not the mirrored one"
    swap = {1: 2, 3: 4, 5: 6, 7: 8, 9: 10, 11: 12, 13: 14, 15: 16}
    swap |= {b: a for a, b in swap.items()} | {0: 0}
    for k in range(17):
        assert flipped.visible[k] == plain.visible[swap[k]]
        if flipped.visible[k]:
            x, y = plain.keypoints[swap[k]]
            np.testing.assert_allclose(flipped.keypoints[k], [191 - x, y], atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_keypoints_stay_on_their_pixels_under_every_augmentation(seed: int) -> None:
    keypoints = person()
    keypoints[:, :2] = np.stack(np.meshgrid([110, 135, 160, 185], [80, 130, 180, 230, 280]), -1).reshape(-1, 2)[:17]
    config = PoseAugmentation(half_body=0, flip=0.5)
    view = pose_view(dots(keypoints), keypoints, WINDOW, INPUT, COCO, config, np.random.default_rng(seed), bbox=BBOX)
    checked = 0
    for x, y in view.keypoints:
        if not (8 < x < 183 and 8 < y < 247):
            continue
        left, top = round(x) - 5, round(y) - 5
        patch = view.image[top : top + 11, left : left + 11, 0].astype(np.float64)
        row, column = np.unravel_index(patch.argmax(), patch.shape)
        assert abs(left + column - x) <= 1.01, "a keypoint left its blob"
        assert abs(top + row - y) <= 1.01, "a keypoint left its blob"
        checked += 1
    assert checked >= 3


def test_the_same_generator_gives_the_same_view_and_another_gives_another() -> None:
    image = dots(person())
    views = [
        pose_view(image, person(), WINDOW, INPUT, COCO, PoseAugmentation(), np.random.default_rng(seed), bbox=BBOX)
        for seed in (7, 7, 8)
    ]
    np.testing.assert_array_equal(views[0].image, views[1].image)
    np.testing.assert_array_equal(views[0].keypoints, views[1].keypoints)
    assert not np.array_equal(views[0].keypoints, views[2].keypoints)


def test_scale_and_rotation_have_the_published_distributions() -> None:
    config = PoseAugmentation(flip=0, half_body=0, center_jitter_probability=0)
    found = []
    for matrix in draws(config, person(), 3000):
        linear = invert_affine(matrix)[:, :2] @ np.diag([(INPUT[1] - 1) / WINDOW[2], (INPUT[0] - 1) / WINDOW[3]])
        scale = np.sqrt(np.linalg.det(linear))
        found.append((scale, np.degrees(np.arctan2(linear[0, 1], linear[0, 0]))))
    scale, angle = np.array(found).T
    assert scale.min() == pytest.approx(0.5, abs=1e-6)
    assert scale.max() == pytest.approx(1.5, abs=1e-6)
    assert (scale > 1.5 - 1e-6).mean() == pytest.approx(0.1587, abs=0.025)
    assert (np.abs(angle) < 1e-6).mean() == pytest.approx(0.4, abs=0.03)
    assert np.abs(angle).max() == pytest.approx(80, abs=1e-6)
    assert (np.abs(angle) > 80 - 1e-6).mean() == pytest.approx(0.6 * 0.0455, abs=0.012)
    assert angle[np.abs(angle) > 1e-6].std() == pytest.approx(40 * 0.96, abs=2)


def test_the_centre_moves_in_three_of_ten_samples_by_a_fifth_of_the_box_at_most() -> None:
    config = PoseAugmentation(flip=0, half_body=0, scale=0, rotation_probability=0)
    centres = np.array([half_window(matrix)[0] for matrix in draws(config, person(), 2000, BBOX)]) - WINDOW[:2]
    moved = np.abs(centres).max(axis=1) > 1e-6
    assert moved.mean() == pytest.approx(0.3, abs=0.035)
    assert np.abs(centres[:, 0]).max() == pytest.approx(0.2 * 90, rel=0.02)
    assert np.abs(centres[:, 1]).max() == pytest.approx(0.2 * 240, rel=0.02)
    still = np.array([half_window(matrix)[0] for matrix in draws(config, person(), 50)])
    np.testing.assert_allclose(still, np.broadcast_to(WINDOW[:2], still.shape), atol=1e-6)


def test_half_body_windows_surround_one_half_and_prefer_the_upper() -> None:
    config = PoseAugmentation(flip=0, half_body=1, scale=0, rotation_probability=0, center_jitter_probability=0)
    keypoints = person()
    halves = {"upper": keypoints[:11, :2], "lower": keypoints[11:, :2]}
    expected = {}
    for name, points in halves.items():
        width, height = points.max(axis=0) - points.min(axis=0)
        width, height = max(width, 0.75 * height), max(height, width / 0.75)
        expected[name] = (*points.mean(axis=0), 1.5 * width, 1.5 * height)
    counts = {"upper": 0, "lower": 0}
    for matrix in draws(config, keypoints, 1000):
        found = np.concatenate(half_window(matrix))
        (name,) = [name for name, value in expected.items() if np.allclose(found, value, atol=1e-6)]
        counts[name] += 1
    assert counts["upper"] / 1000 == pytest.approx(0.6915, abs=0.045)


def test_half_body_needs_strictly_more_labelled_keypoints_than_the_definition_says() -> None:
    config = PoseAugmentation(flip=0, half_body=1, scale=0, rotation_probability=0, center_jitter_probability=0)
    assert COCO.half_body_min_keypoints == 8
    upright = udp_matrix(WINDOW[:2], WINDOW[2:], 0, INPUT)
    assert all(np.allclose(matrix, upright) for matrix in draws(config, person(8), 20))
    assert not any(np.allclose(matrix, upright) for matrix in draws(config, person(9), 20))
    never = COCO.model_copy(update={"half_body_min_keypoints": None})
    matrix, _ = draw_matrix(person(), WINDOW, INPUT, never, config, np.random.default_rng(0))
    np.testing.assert_allclose(matrix, upright)


def test_keypoints_that_coincide_make_no_half_body_window() -> None:
    config = PoseAugmentation(flip=0, half_body=1, scale=0, rotation_probability=0, center_jitter_probability=0)
    same = np.broadcast_to(np.array([120.0, 100.0, 2.0]), (17, 3))
    upright = udp_matrix(WINDOW[:2], WINDOW[2:], 0, INPUT)
    assert all(np.allclose(matrix, upright) for matrix in draws(config, same, 10))


def coordinates(height: int = 300, width: int = 400) -> np.ndarray:
    """Red tells the column, green the row, in steps of two pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x // 2, y // 2, np.full_like(x, 255)], -1).astype(np.uint8)


def test_mae_crops_stay_inside_the_window_and_cover_a_fifth_at_least() -> None:
    window = (200.0, 150.0, 120.0, 160.0)
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(300):
        view = mae_view(coordinates(), window, (64, 48), rng, flip=0).astype(float)
        inner = view[2:-2, 2:-2]
        assert 2 * inner[..., 0].min() >= 200 - 60 - 3
        assert 2 * inner[..., 0].max() <= 200 + 60 + 3
        assert 2 * inner[..., 1].min() >= 150 - 80 - 3
        assert 2 * inner[..., 1].max() <= 150 + 80 + 3
        wide = 2 * (view[32, 43, 0] - view[32, 4, 0]) * 48 / 39
        high = 2 * (view[58, 24, 1] - view[5, 24, 1]) * 64 / 53
        areas.append(wide * high / (121 * 161))
        ratios.append(wide / high / 0.75)
    assert min(areas) > 0.17
    assert max(areas) > 0.9
    assert np.mean(areas) == pytest.approx(0.58, abs=0.06)
    assert min(ratios) > 0.68
    assert max(ratios) < 1.47
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.06)


def test_mae_crops_of_a_window_over_the_border_have_no_black_and_whole_image_mode_sees_everything() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert mae_view(coordinates(), (10.0, 20.0, 200.0, 260.0), (64, 48), rng)[..., 2].min() >= 250
    seen = np.stack([mae_view(coordinates(), None, (32, 32), rng) for _ in range(200)])
    assert seen[..., 0].min() < 5
    assert int(seen[..., 0].max()) > 195
    assert int(seen[..., 1].max()) > 145


def test_mae_views_are_mirrored_in_half_of_the_cases_and_shrink_without_aliasing() -> None:
    rng = np.random.default_rng(0)
    mirrored = [(view := mae_view(coordinates(), None, (32, 32), rng))[16, 0, 0] > view[16, -1, 0] for _ in range(400)]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.08)
    checks = np.repeat((np.indices((640, 480)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    view = mae_view(checks, None, (64, 48), np.random.default_rng(1), scale=(0.9, 1.0))
    assert np.abs(view.astype(int) - 127).max() < 40
    assert view.shape == cv2.resize(checks, (48, 64)).shape


def test_a_window_outside_the_image_still_gives_a_view() -> None:
    view = mae_view(coordinates(), (-500.0, 900.0, 50.0, 80.0), (64, 48), np.random.default_rng(0))
    assert view.shape == (64, 48, 3)
