"""Windows and UDP warps against numbers computed by hand from the formulas."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.geometry import (
    apply_affine,
    box_to_window,
    input_to_image,
    instance_window,
    invert_affine,
    udp_matrix,
    warp,
    window_to_input,
)
from pipeline.data.instance import Instance


def instance(**changes: object) -> Instance:
    fields: dict = {
        "dataset": "coco",
        "id": 1,
        "image_id": 1,
        "image": "a.jpg",
        "image_size": (640, 480),
        "bbox": (100.0, 50.0, 60.0, 200.0),
        "keypoints": np.zeros((17, 3)),
        "area": 1.0,
    }
    return Instance(**{**fields, **changes})


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((100, 50, 60, 200), (130, 150, 187.5, 250)),  # tall: width grows to 0.75 x 200
        ((100, 50, 300, 200), (250, 150, 375, 500)),  # wide: height grows to 300 / 0.75
        ((0, 0, 75, 100), (37.5, 50, 93.75, 125)),  # of the right shape already
    ],
)
def test_a_box_grows_to_the_inputs_aspect_and_is_padded_by_a_quarter(bbox: tuple, expected: tuple) -> None:
    assert box_to_window(bbox, 0.75) == pytest.approx(expected)


def test_a_prescribed_square_window_is_kept_and_squeezes_the_person() -> None:
    square = instance(dataset="mpii", window=(200.0, 150.0, 250.0, 250.0))
    window = instance_window(square, 0.75)
    assert window == (200.0, 150.0, 250.0, 250.0)
    points = np.array([[200.0, 150.0], [210.0, 150.0], [200.0, 160.0]])
    centre, right, below = window_to_input(points, window, (256, 192))
    assert right[0] - centre[0] == pytest.approx(10 * 191 / 250)
    assert below[1] - centre[1] == pytest.approx(10 * 255 / 250)
    assert instance_window(instance(), 0.75) == box_to_window((100, 50, 60, 200), 0.75)


def test_the_udp_matrix_has_its_golden_values() -> None:
    upright = udp_matrix((130, 150), (187.5, 250), 0, (256, 192))
    expected = [[191 / 187.5, 0, 95.5 - 130 * 191 / 187.5], [0, 255 / 250, 127.5 - 150 * 255 / 250]]
    np.testing.assert_allclose(upright, expected, atol=1e-12)
    turned = udp_matrix((130, 150), (187.5, 250), 30, (256, 192))
    cos, sin, scale_x, scale_y = math.sqrt(3) / 2, 0.5, 191 / 187.5, 255 / 250
    golden = [
        [cos * scale_x, -sin * scale_x, scale_x * (-130 * cos + 150 * sin + 187.5 / 2)],
        [sin * scale_y, cos * scale_y, scale_y * (-130 * sin - 150 * cos + 250 / 2)],
    ]
    np.testing.assert_allclose(turned, golden, atol=1e-9)


def test_window_corners_land_on_the_centres_of_the_corner_pixels() -> None:
    matrix = udp_matrix((50, 60), (30, 40), 0, (64, 48))
    corners = apply_affine(np.array([[35, 40], [65, 80]]), matrix)
    np.testing.assert_allclose(corners, [[0, 0], [47, 63]], atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.floats(-80, 80), st.floats(20, 300), st.floats(-50, 700))
def test_a_flip_equals_mirroring_the_whole_image_first(rotation: float, width: float, x: float) -> None:
    image_width = 640
    flipped = udp_matrix((x, 100), (width, width * 4 / 3), rotation, (256, 192), flip=True)
    mirrored = udp_matrix((image_width - 1 - x, 100), (width, width * 4 / 3), rotation, (256, 192))
    points = np.array([[x, 100.0], [x + 17, 33.0], [0.0, 0.0]])
    seen = points * [-1, 1] + [image_width - 1, 0]
    np.testing.assert_allclose(apply_affine(points, flipped), apply_affine(seen, mirrored), atol=1e-7)


def test_an_upright_flip_maps_x_to_the_last_column_minus_x() -> None:
    plain = udp_matrix((50, 60), (30, 40), 0, (64, 48))
    flipped = udp_matrix((50, 60), (30, 40), 0, (64, 48), flip=True)
    points = np.random.default_rng(0).uniform(0, 100, (5, 2))
    expected = apply_affine(points, plain) * [-1, 1] + [47, 0]
    np.testing.assert_allclose(apply_affine(points, flipped), expected, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(-180, 180), st.booleans())
def test_inverting_a_warp_returns_every_point(rotation: float, flip: bool) -> None:
    matrix = udp_matrix((31.5, 12.25), (90, 120), rotation, (256, 192), flip)
    points = np.array([[0.0, 0.0], [100.5, -20.25]])
    np.testing.assert_allclose(apply_affine(apply_affine(points, matrix), invert_affine(matrix)), points, atol=1e-8)


def test_input_points_return_to_the_image_as_in_the_udp_formula() -> None:
    window = (130.0, 150.0, 187.5, 250.0)
    back = input_to_image(np.array([[10.0, 20.0]]), window, (256, 192))
    np.testing.assert_allclose(back, [[10 * 187.5 / 191 + 130 - 187.5 / 2, 20 * 250 / 255 + 150 - 125]], atol=1e-9)
    np.testing.assert_allclose(window_to_input(back, window, (256, 192)), [[10, 20]], atol=1e-9)


def test_warping_moves_pixels_as_it_moves_points_and_is_black_outside() -> None:
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 80, axis=0).repeat(3, axis=2)
    matrix = udp_matrix((50, 40), (30, 40), 0, (41, 31))  # one output pixel is one image pixel
    out = warp(ramp, matrix, (41, 31))
    assert out.shape == (41, 31, 3)
    np.testing.assert_array_equal(out[20, :, 0], np.arange(35, 66) * 2)
    outside = warp(np.full((10, 10, 3), 255, np.uint8), udp_matrix((-100, -100), (30, 40), 0, (41, 31)), (41, 31))
    assert not outside.any()


def test_a_turned_warp_gives_the_golden_pixels_of_its_formula() -> None:
    """mmpose's matrix written out, inverted by hand, and an exact bilinear look-up: OpenCV rounds a little."""
    smooth = np.random.default_rng(2).uniform(0, 255, (24, 32, 3))
    image = np.clip(cv2.resize(smooth, (160, 120), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    centre, size, angle, (rows, columns) = (70.3, 55.8), (60.0, 80.0), math.radians(25), (64, 48)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    # Output pixels around the middle, in window lengths, turned back, moved to the window's centre.
    across, down = (x / (columns - 1) - 0.5) * size[0], (y / (rows - 1) - 0.5) * size[1]
    u = math.cos(angle) * across + math.sin(angle) * down + centre[0]
    v = -math.sin(angle) * across + math.cos(angle) * down + centre[1]
    left, top = np.floor(u).astype(int), np.floor(v).astype(int)
    assert left.min() >= 0 and top.min() >= 0 and left.max() < 159 and top.max() < 119
    a, b, pixels = (u - left)[..., None], (v - top)[..., None], image.astype(float)
    upper = (1 - a) * pixels[top, left] + a * pixels[top, left + 1]
    lower = (1 - a) * pixels[top + 1, left] + a * pixels[top + 1, left + 1]
    golden = (1 - b) * upper + b * lower
    error = np.abs(warp(image, udp_matrix(centre, size, 25, (rows, columns)), (rows, columns)) - golden)
    assert error.mean() < 0.6 and error.max() < 6
