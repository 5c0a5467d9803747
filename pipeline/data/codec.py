"""Keypoints to heatmaps and back: the UDP Gaussian codec that teacher and student share.

Both directions are batched torch on any device, in float32 whatever the autocast state, and hold no state but the
configuration.
"""

import math
from typing import Literal

import cv2
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator

from pipeline.data.border import fit_offset
from pipeline.strict import Strict

_LOWEST, _HIGHEST = 1e-3, 50.0
_EPSILON = torch.finfo(torch.float32).eps


class CodecConfig(Strict):
    """The heatmap codec: which grid, how wide a Gaussian, how much blur before the sub-pixel step.

    An unset sigma is 1/32 of the heatmap's longer side, and at least 1: 2 at 64x48, 3 at 96x72 (the values of the
    public configurations), 1 at 32x24 and 16x12. An unset blur kernel is the odd one whose OpenCV sigma is nearest:
    11, 17, 5.
    """

    input_size: tuple[int, int] = (256, 192)
    """Height and width of the network's input, pixels."""
    heatmap_size: tuple[int, int] = (64, 48)
    """Height and width of a heatmap."""
    sigma: float | None = Field(None, gt=0)
    """Standard deviation of the target Gaussian, heatmap pixels; unset: derived."""
    blur_kernel: int | None = Field(None, ge=1)
    """Side of the Gaussian blur before decoding, odd; unset: derived."""
    target: Literal["udp"] = "udp"
    """UDP: real-valued Gaussian centres, lengths between pixel centres."""
    border: Literal["reference", "exact"] = "reference"
    """Decoding of maxima nearer to the border than the blur reaches: as the reference decoder, which is up to 1.4
    heatmap pixels off there, or by a fit that the border does not bias."""

    @field_validator("input_size", "heatmap_size")
    @classmethod
    def _large_enough(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 4:
            raise ValueError("height and width must be at least 4")
        return value

    @model_validator(mode="after")
    def _blur_fits(self) -> "CodecConfig":
        if self.blur % 2 == 0 or self.blur // 2 >= min(self.heatmap_size):
            raise ValueError(f"blur_kernel must be odd and less than twice the heatmap's sides, found {self.blur}")
        return self

    @property
    def spread(self) -> float:
        """The sigma in use, heatmap pixels."""
        return self.sigma if self.sigma is not None else max(1.0, max(self.heatmap_size) / 32)

    @property
    def blur(self) -> int:
        """The blur kernel in use."""
        if self.blur_kernel is not None:
            return self.blur_kernel
        ideal = 2 * ((self.spread - 0.8) / 0.3 + 1) + 1  # OpenCV: sigma = 0.3 * ((k - 1) / 2 - 1) + 0.8
        return 2 * round((ideal - 1) / 2) + 1

    @property
    def stride(self) -> tuple[float, float]:
        """Input pixels per heatmap pixel, (x, y): between pixel centres, so (W - 1) / (w - 1)."""
        (height, width), (rows, columns) = self.input_size, self.heatmap_size
        return (width - 1) / (columns - 1), (height - 1) / (rows - 1)


def encode(keypoints: torch.Tensor, visible: torch.Tensor, codec: CodecConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Target heatmaps (B, K, h, w) and weights (B, K), float32, of keypoints (B, K, 2) in input pixels.

    A Gaussian of peak at most 1 around the real-valued centre mu, written only within 3 sigma, rounded up, of the pixel
    int(mu + 0.5). Keypoints that are not `visible` (B, K), or whose whole window lies outside, get weight 0 and an
    empty map. ViTPose, section 4.1, by mmpose's `_udp_generate_target`.
    """
    rows, columns = codec.heatmap_size
    centre = keypoints.float() / keypoints.new_tensor(codec.stride, dtype=torch.float32)
    column, near_x = _profile(centre[..., 0], columns, codec.spread)
    row, near_y = _profile(centre[..., 1], rows, codec.spread)
    weights = visible.float() * (near_x & near_y)
    written = (weights > 0).unsqueeze(-1)
    return (row * written).unsqueeze(-1) * column.unsqueeze(-2), weights


def decode(heatmaps: torch.Tensor, codec: CodecConfig) -> torch.Tensor:
    """Keypoints (B, K, 3) of heatmaps (B, K, h, w): x, y in input pixels and the score, the raw maximum. float32.

    The maximum is refined by one Newton step on the logarithm of the blurred map, unclamped; a map without a positive
    value has its point at heatmap pixel -1. DARK under UDP (Zhang et al., CVPR 2020), by mmpose's `post_dark_udp`.
    With `border: exact`, maxima whose blur would reach beyond the map are refined by `fit_offset` instead.
    """
    rows, columns = heatmaps.shape[-2:]
    assert (rows, columns) == codec.heatmap_size, f"heatmaps are {rows}x{columns}, the codec's {codec.heatmap_size}"
    heatmaps = heatmaps.float()
    scores, index = heatmaps.flatten(2).max(-1)
    peak_x, peak_y = index % columns, index.div(columns, rounding_mode="floor")
    logs = _blur(heatmaps, codec.blur).clamp(_LOWEST, _HIGHEST).log()
    offset = _newton_offset(logs, peak_x, peak_y)
    if codec.border == "exact":
        nearest = torch.stack([peak_x, peak_y, columns - 1 - peak_x, rows - 1 - peak_y]).amin(0)
        # The Newton step takes the maximum's neighbours, too, and their blur reaches one pixel further.
        b, k = torch.nonzero((nearest <= codec.blur // 2) & (scores > 0), as_tuple=True)
        offset[b, k] = fit_offset(heatmaps[b, k], peak_x[b, k], peak_y[b, k], codec.blur // 2, fallback=offset[b, k])
    points = torch.stack([peak_x, peak_y], -1) - offset
    points = torch.where((scores > 0).unsqueeze(-1), points, torch.full_like(points, -1.0))
    points = points * points.new_tensor(codec.stride)
    return torch.cat([points.float(), scores.unsqueeze(-1)], -1)


def flip_heatmaps(heatmaps: torch.Tensor, flip_index: torch.Tensor) -> torch.Tensor:
    """Heatmaps (B, K, h, w) of mirrored images, mirrored back: columns reversed, left and right keypoints swapped.

    Under UDP there is no shift by a pixel. `flip_index` (K,) int64 names the partner of each keypoint.
    """
    return heatmaps.flip(-1).index_select(1, flip_index.to(heatmaps.device))


def _profile(centre: torch.Tensor, length: int, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One axis of the Gaussians, (B, K, length), cut at 3 sigma, and whether any of the window lies inside (B, K)."""
    radius = math.ceil(3 * sigma)
    grid = torch.arange(length, device=centre.device, dtype=torch.float32)
    anchor = (centre + 0.5).trunc()
    gaussian = torch.exp(-((grid - centre.unsqueeze(-1)) ** 2) / (2 * sigma**2))
    inside = (grid - anchor.unsqueeze(-1)).abs() <= radius
    return gaussian * inside, (anchor - radius < length) & (anchor + radius >= 0)


def _blur(heatmaps: torch.Tensor, kernel: int) -> torch.Tensor:
    """cv2.GaussianBlur with sigma 0 and its default border (reflect, 101).

    Shifted sums rather than a convolution: exact float32 where a GPU would convolve in TF32.
    """
    radius = kernel // 2
    taps = cv2.getGaussianKernel(kernel, 0, cv2.CV_32F).ravel().tolist()
    rows, columns = heatmaps.shape[-2:]
    padded = F.pad(heatmaps, (radius, radius, radius, radius), mode="reflect")
    across = sum(tap * padded[..., i : i + columns] for i, tap in enumerate(taps))
    return sum(tap * across[..., i : i + rows, :] for i, tap in enumerate(taps))


def _newton_offset(logs: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(H + eps I)^-1 g of the log heatmaps (B, K, h, w) at the pixels x, y (B, K): (B, K, 2), float64.

    Finite differences with step 1, the map continued by its edge. The mixed term is mmpose's seven-point one.
    """
    rows, columns = logs.shape[-2:]
    flat = logs.flatten(2)

    def at(dx: int, dy: int) -> torch.Tensor:
        index = (y + dy).clamp(0, rows - 1) * columns + (x + dx).clamp(0, columns - 1)
        return flat.gather(-1, index.unsqueeze(-1)).squeeze(-1).double()

    here, right, left, down, up = at(0, 0), at(1, 0), at(-1, 0), at(0, 1), at(0, -1)
    gradient_x, gradient_y = 0.5 * (right - left), 0.5 * (down - up)
    xx = right - 2 * here + left + _EPSILON
    yy = down - 2 * here + up + _EPSILON
    xy = 0.5 * (at(1, 1) - right - down + 2 * here - left - up + at(-1, -1))
    determinant = xx * yy - xy * xy
    offset = torch.stack([yy * gradient_x - xy * gradient_y, xx * gradient_y - xy * gradient_x], -1)
    return (offset / determinant.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0)
