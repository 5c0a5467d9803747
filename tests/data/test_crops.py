"""Stored crops: wide enough, dense enough, and every coordinate moved with the pixels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.augmentation import PoseAugmentation, pose_view
from pipeline.data.crops import CropConfig, crop_instance, lost_share, sample_meta
from pipeline.data.definitions import load_definition
from pipeline.data.geometry import apply_affine, box_to_window, instance_window, invert_affine, udp_matrix
from pipeline.data.images import decode_image, read_bytes
from pipeline.data.instance import Instance
from pipeline.errors import DataError

COCO = load_definition("coco")
LARGE = np.zeros((1200, 1200, 3), np.uint8)


def instance(bbox: tuple, window: tuple | None = None) -> Instance:
    x, y, width, height = bbox
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform([x, y], [x + width, y + height], (17, 2)), np.full((17, 1), 2.0)], axis=1)
    return Instance("coco", 7, 3, "a.jpg", (1200, 1200), bbox, points, width * height, window)


def gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 250 / width, y * 250 / height, np.full_like(x, 9)], -1).round().astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.floats(40, 200), st.floats(0.2, 3.0), st.floats(0.5, 1.5), st.floats(-80, 80))
def test_every_rotated_and_scaled_window_lies_in_the_stored_crop(
    width: float, ratio: float, scale: float, rotation: float
) -> None:
    height = min(width * ratio, 220)
    one = instance((600 - width / 2, 600 - height / 2, width, height))
    crop = crop_instance(LARGE, one, CropConfig())
    window = box_to_window(one.bbox, 0.75)
    matrix = udp_matrix(window[:2], (window[2] * scale, window[3] * scale), rotation, (256, 192))
    corners = apply_affine(np.array([[0, 0], [191, 0], [0, 255], [191, 255]]), invert_affine(matrix))
    left, top, right, bottom = crop.rectangle
    assert corners.min(axis=0)[0] >= left
    assert corners.min(axis=0)[1] >= top
    assert corners.max(axis=0)[0] <= right - 1
    assert corners.max(axis=0)[1] <= bottom - 1


def test_the_stored_square_is_2_35_times_the_long_side_for_a_three_by_four_input() -> None:
    crop = crop_instance(LARGE, instance((500, 500, 75, 100)), CropConfig())
    left, top, right, bottom = crop.rectangle
    assert 234.4 <= right - left <= 234.4 + 3  # outwards to whole pixels
    assert abs((bottom - top) - (right - left)) <= 1


def test_a_crop_ends_where_the_image_ends() -> None:
    crop = crop_instance(gradient(120, 100), instance((0, 0, 60, 100)), CropConfig())
    assert crop.rectangle == (0, 0, 100, 120)
    np.testing.assert_array_equal(crop.image, gradient(120, 100))
    np.testing.assert_allclose(crop.matrix, [[1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("bbox", [(500, 400, 60, 100), (300, 250, 250, 400), (100, 90, 700, 650)])
def test_keypoints_box_and_pixels_move_together(bbox: tuple) -> None:
    image, one = gradient(1100, 1000), instance(bbox)
    crop = crop_instance(image, one, CropConfig())
    np.testing.assert_allclose(crop.keypoints[:, :2], apply_affine(one.keypoints[:, :2], crop.matrix))
    np.testing.assert_array_equal(crop.keypoints[:, 2], one.keypoints[:, 2])
    for (u, v), (x, y) in zip(crop.keypoints[:, :2], one.keypoints[:, :2], strict=True):
        colour = crop.image[round(v), round(u)].astype(float)
        source = apply_affine(np.array([[round(u), round(v)]], float), invert_affine(crop.matrix))[0]
        assert colour[0] == pytest.approx(source[0] * 250 / 1000, abs=0.8)
        assert colour[1] == pytest.approx(source[1] * 250 / 1100, abs=0.8)
        assert abs(source[0] - x) <= 0.51 / crop.matrix[0, 0]
        assert abs(source[1] - y) <= 0.51 / crop.matrix[1, 1]
    corner = apply_affine(np.array([[bbox[0] + bbox[2], bbox[1] + bbox[3]]], float), crop.matrix)[0]
    np.testing.assert_allclose(np.array(crop.bbox[:2]) + crop.bbox[2:], corner, atol=1e-9)


def test_only_what_is_denser_than_needed_is_shrunk() -> None:
    small = crop_instance(LARGE, instance((500, 500, 60, 200)), CropConfig())
    assert small.matrix[0, 0] == 1
    assert small.image.shape[0] == small.rectangle[3] - small.rectangle[1]
    one = instance((300, 300, 450, 600))
    for density in (1.0, 1.5):
        crop = crop_instance(LARGE, one, CropConfig(density=density, input_size=(128, 96)))
        assert crop.matrix[1, 1] * 750 == pytest.approx(density * 128, rel=0.01)
        assert crop.matrix[0, 0] * 562.5 == pytest.approx(density * 96, rel=0.01)
    assert crop_instance(LARGE, one, CropConfig(density=2)).matrix[0, 0] > 0.67


def test_a_prescribed_window_is_kept_in_crop_pixels_and_is_what_must_fit() -> None:
    one = instance((560, 560, 80, 80), window=(600.0, 610.0, 300.0, 300.0))
    crop = crop_instance(LARGE, one, CropConfig())
    assert 0 <= crop.rectangle[2] - crop.rectangle[0] - 1.5 * math.hypot(300, 300) <= 3
    assert crop.window is not None
    np.testing.assert_allclose(crop.window[:2], apply_affine(np.array([[600.0, 610.0]]), crop.matrix)[0])
    np.testing.assert_allclose(crop.window[2:], [300 * crop.matrix[0, 0], 300 * crop.matrix[1, 1]])


def test_image_mode_stores_the_whole_image_shrunk_likewise() -> None:
    crop = crop_instance(gradient(900, 1200), instance((10, 10, 30, 40)), CropConfig(mode="image", density=1))
    assert crop.rectangle == (0, 0, 1200, 900)
    assert crop.image.shape == (256, 341, 3)


@pytest.mark.parametrize("bbox", [(5000, 5000, 50, 50), (100, 100, 0, 0), (100, 100, float("nan"), 20)])
def test_a_box_without_pixels_is_refused_by_name(bbox: tuple) -> None:
    with pytest.raises(DataError, match="coco instance 7"):
        crop_instance(LARGE, Instance("coco", 7, 3, "a.jpg", None, bbox, np.zeros((0, 3)), 1.0), CropConfig())


def test_the_description_leads_back_to_the_image() -> None:
    one, config = instance((300, 250, 400, 500)), CropConfig(input_size=(128, 96))
    crop = crop_instance(LARGE, one, config)
    meta = sample_meta(one, crop, config, split="train", image_sha256="ab" * 32, image_size=(1200, 1200))
    place = meta["crop"]
    back = np.array(meta["keypoints"])[:, :2] / [place["scale_x"], place["scale_y"]] + [place["x"], place["y"]]
    np.testing.assert_allclose(back, one.keypoints[:, :2], atol=1e-9)
    assert (meta["dataset"], meta["id"], meta["max_input"], meta["mode"]) == ("coco", 7, (128, 96), "person")


def test_lost_pixels_are_counted_where_a_crop_is_too_narrow() -> None:
    one, turned = instance((550, 500, 90, 200)), PoseAugmentation(half_body=0, center_jitter_probability=0)
    shares = {}
    for scale in (1.0, 1.5):
        config = CropConfig(largest_scale=scale)
        crop = crop_instance(LARGE, one, config)
        rng = np.random.default_rng(0)
        shares[scale] = lost_share(one, crop, (1200, 1200), config, COCO, turned, rng, draws=100)
    assert shares[1.5] == 0
    assert 0.005 < shares[1.0] < 0.2


def test_training_from_a_stored_crop_looks_like_training_from_the_image(samples: Path) -> None:
    annotations = json.loads((samples / "coco/annotations/person_keypoints_val2017.json").read_text())
    one = max(
        (item for item in annotations["annotations"] if not item["iscrowd"]), key=lambda item: item["num_keypoints"]
    )
    path = samples / "coco/val2017" / f"{one['image_id']:012d}.jpg"
    image = decode_image(read_bytes(str(path)), where=str(path))
    keypoints = np.array(one["keypoints"], float).reshape(-1, 3)
    real = Instance("coco", one["id"], one["image_id"], str(path), None, tuple(one["bbox"]), keypoints, one["area"])
    config = CropConfig(density=2)
    crop = crop_instance(image, real, config)
    config_of_view = PoseAugmentation(half_body=0)
    window = instance_window(real, 0.75)
    crop_window = box_to_window(crop.bbox, 0.75)
    for seed in range(4):
        rngs = np.random.default_rng(seed), np.random.default_rng(seed)
        direct = pose_view(image, keypoints, window, (256, 192), COCO, config_of_view, rngs[0], bbox=real.bbox)
        stored = pose_view(
            crop.image, crop.keypoints, crop_window, (256, 192), COCO, config_of_view, rngs[1], bbox=crop.bbox
        )
        np.testing.assert_allclose(stored.keypoints, direct.keypoints, atol=0.4)
        assert np.abs(stored.image.astype(int) - direct.image).mean() < 4
