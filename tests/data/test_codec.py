"""The heatmap codec against a literal numpy and OpenCV rendering of the published formulas."""

from math import ceil

import cv2
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.data.codec import CodecConfig, decode, encode, flip_heatmaps

COCO_FLIP = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
GRIDS = [
    ((256, 192), (64, 48)),
    ((384, 288), (96, 72)),
    ((256, 256), (64, 64)),
    ((128, 96), (32, 24)),
    ((64, 48), (16, 12)),
    ((576, 432), (144, 108)),
    ((224, 224), (56, 56)),
]


def reference_encode(point: np.ndarray, codec: CodecConfig, sigma: float) -> tuple[np.ndarray, float]:
    """Pixel by pixel."""
    rows, columns = codec.heatmap_size
    mu_x = point[0] / ((codec.input_size[1] - 1) / (columns - 1))
    mu_y = point[1] / ((codec.input_size[0] - 1) / (rows - 1))
    anchor_x, anchor_y, radius = int(mu_x + 0.5), int(mu_y + 0.5), ceil(3 * sigma)
    heatmap, touched = np.zeros((rows, columns)), 0.0
    for y in range(max(0, anchor_y - radius), min(rows, anchor_y + radius + 1)):
        for x in range(max(0, anchor_x - radius), min(columns, anchor_x + radius + 1)):
            heatmap[y, x] = np.exp(-((x - mu_x) ** 2 + (y - mu_y) ** 2) / (2 * sigma**2))
            touched = 1.0
    return heatmap, touched


def reference_decode(heatmap: np.ndarray, codec: CodecConfig, kernel: int) -> tuple[float, float, float]:
    """One map, after the description of post_dark_udp."""
    rows, columns = heatmap.shape
    score = float(heatmap.max())
    stride = [(codec.input_size[1] - 1) / (columns - 1), (codec.input_size[0] - 1) / (rows - 1)]
    if score <= 0:
        return -stride[0], -stride[1], score
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    blurred = cv2.GaussianBlur(heatmap.astype(np.float32), (kernel, kernel), 0)
    f = np.pad(np.log(np.clip(blurred, 0.001, 50)).astype(np.float64), 1, mode="edge")
    v, u = y + 1, x + 1
    dx, dy = 0.5 * (f[v, u + 1] - f[v, u - 1]), 0.5 * (f[v + 1, u] - f[v - 1, u])
    dxx, dyy = f[v, u + 1] - 2 * f[v, u] + f[v, u - 1], f[v + 1, u] - 2 * f[v, u] + f[v - 1, u]
    dxy = 0.5 * (
        f[v + 1, u + 1] - f[v, u + 1] - f[v + 1, u] + 2 * f[v, u] - f[v, u - 1] - f[v - 1, u] + f[v - 1, u - 1]
    )
    hessian = np.array([[dxx, dxy], [dxy, dyy]]) + np.finfo(np.float32).eps * np.eye(2)
    offset = np.linalg.solve(hessian, [dx, dy])
    return (x - offset[0]) * stride[0], (y - offset[1]) * stride[1], score


@pytest.mark.parametrize(
    ("heatmap", "sigma", "blur"),
    [((64, 48), 2, 11), ((64, 64), 2, 11), ((96, 72), 3, 17), ((32, 24), 1, 5), ((16, 12), 1, 5), ((48, 36), 1.5, 7)],
)
def test_sigma_and_blur_follow_the_heatmap(heatmap: tuple[int, int], sigma: float, blur: int) -> None:
    codec = CodecConfig(heatmap_size=heatmap)
    assert (codec.spread, codec.blur) == (sigma, blur)
    explicit = CodecConfig(heatmap_size=heatmap, sigma=1.25, blur_kernel=3)
    assert (explicit.spread, explicit.blur) == (1.25, 3)


@pytest.mark.parametrize("wrong", [{"blur_kernel": 4}, {"heatmap_size": (16, 12), "blur_kernel": 25}, {"sigma": 0}])
def test_impossible_codecs_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        CodecConfig(**wrong)


@pytest.mark.parametrize("grid", GRIDS)
def test_targets_equal_the_formula_pixel_by_pixel(grid: tuple) -> None:
    codec = CodecConfig(input_size=grid[0], heatmap_size=grid[1])
    rng = np.random.default_rng(1)
    keypoints = rng.uniform([-90, -90], [grid[0][1] + 90, grid[0][0] + 90], (2, 25, 2)).astype(np.float32)
    heatmaps, weights = encode(torch.from_numpy(keypoints), torch.ones(2, 25), codec)
    seen = set()
    for b in range(2):
        for k in range(25):
            expected, weight = reference_encode(keypoints[b, k].astype(np.float64), codec, codec.spread)
            np.testing.assert_allclose(heatmaps[b, k].numpy(), expected, atol=2e-6)
            assert weights[b, k] == weight
            seen.add(weight)
    assert seen == {0.0, 1.0}
    assert heatmaps.max() <= 1


def test_the_window_is_thirteen_wide_around_the_rounded_centre_while_the_gaussian_is_not_rounded() -> None:
    codec = CodecConfig()
    stride = 191 / 47
    heatmaps, _ = encode(torch.tensor([[[20.4 * stride, 30.0 * 255 / 63]]]), torch.ones(1, 1), codec)
    row = heatmaps[0, 0, 30]
    assert torch.nonzero(row).flatten().tolist() == list(range(14, 27))
    assert row[20].item() == pytest.approx(np.exp(-(0.4**2) / 8), abs=1e-5)


def test_invisible_keypoints_have_no_weight_and_no_target() -> None:
    visible = torch.tensor([[1.0, 0.0]])
    heatmaps, weights = encode(torch.full((1, 2, 2), 90.0), visible, CodecConfig())
    assert weights.tolist() == [[1.0, 0.0]]
    assert heatmaps[0, 0].max() > 0.8
    assert not heatmaps[0, 1].any()


@pytest.mark.parametrize("grid", GRIDS)
def test_decoding_equals_the_opencv_reference(grid: tuple) -> None:
    codec = CodecConfig(input_size=grid[0], heatmap_size=grid[1])
    generator = torch.Generator().manual_seed(2)
    keypoints = torch.rand(4, 17, 2, generator=generator) * torch.tensor([grid[0][1], grid[0][0]])
    heatmaps, _ = encode(keypoints, torch.ones(4, 17), codec)
    heatmaps = 0.8 * heatmaps + 0.02 * torch.rand(heatmaps.shape, generator=generator)
    found = decode(heatmaps, codec).numpy()
    rounding = 2.5e-5 * max(4, codec.spread**2)  # the Newton step divides it by the curvature, 1 / sigma^2
    for b in range(4):
        for k in range(17):
            expected = reference_decode(heatmaps[b, k].numpy(), codec, codec.blur)
            np.testing.assert_allclose(found[b, k], expected, atol=rounding)


def test_a_map_without_a_positive_value_is_a_point_outside_with_its_score() -> None:
    codec = CodecConfig()
    found = decode(torch.stack([torch.zeros(1, 64, 48), torch.full((1, 64, 48), -0.5)]), codec)
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found[:, 0, :2], [[-191 / 47, -255 / 63]] * 2, rtol=1e-6)
    assert found[:, 0, 2].tolist() == [0.0, -0.5]


def test_decoding_of_half_precision_is_done_in_float32_and_finite_on_flat_maps() -> None:
    codec = CodecConfig()
    flat = decode(torch.full((1, 1, 64, 48), 0.25, dtype=torch.bfloat16), codec)
    assert flat.dtype == torch.float32
    assert torch.isfinite(flat).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_keypoints_away_from_the_border_return_within_a_tenth_of_a_heatmap_pixel(grid: tuple) -> None:
    codec = CodecConfig(input_size=grid[0], heatmap_size=grid[1])
    generator = torch.Generator().manual_seed(3)
    stride = torch.tensor(codec.stride)
    # Nearer, the blur sees the border's reflection, which displaces by a share of sigma: a wide one needs more room.
    margin = max(4.0, (2 if codec.spread <= 3 else 2.25) * codec.spread)
    inside = torch.tensor([grid[1][1] - 1 - 2 * margin, grid[1][0] - 1 - 2 * margin])
    keypoints = (margin + torch.rand(8, 17, 2, generator=generator) * inside) * stride
    heatmaps, weights = encode(keypoints, torch.ones(8, 17), codec)
    found = decode(heatmaps, codec)
    error = ((found[..., :2] - keypoints) / stride).norm(dim=-1)
    assert weights.min() == 1
    assert error.max() < 0.1, f"{error.max():.3f} heatmap pixels"
    assert found[..., 2].min() > 0.75


def test_flipped_heatmaps_decode_to_flipped_keypoints() -> None:
    codec = CodecConfig()
    generator = torch.Generator().manual_seed(4)
    keypoints = 40 + torch.rand(2, 17, 2, generator=generator) * torch.tensor([110.0, 170.0])
    heatmaps, _ = encode(keypoints, torch.ones(2, 17), codec)
    index = torch.tensor(COCO_FLIP)
    mirrored = keypoints[:, index] * torch.tensor([-1.0, 1.0]) + torch.tensor([191.0, 0.0])
    of_mirrored, _ = encode(mirrored, torch.ones(2, 17), codec)
    torch.testing.assert_close(flip_heatmaps(of_mirrored, index), heatmaps, atol=1e-4, rtol=0)
    assert not torch.allclose(flip_heatmaps(of_mirrored, torch.arange(17)), heatmaps, atol=0.1)
