"""The sub-pixel step where the border is near: a fit instead of a blur.

The reference decoder blurs the map and goes on with what the blur makes of the map's edge: of the Gaussian's other
flank, reflected in. Smoothing by a local polynomial has no such bias at a border (Fan and Gijbels, "Local Polynomial
Modelling and Its Applications", section 3.2): only pixels that are there take part, and the logarithm of a Gaussian is
a polynomial of degree 2, whichever part of it is seen.
"""

import cv2
import torch
from torch import Tensor

_LOWEST = 1e-3


def fit_offset(heatmaps: Tensor, x: Tensor, y: Tensor, radius: int, fallback: Tensor) -> Tensor:
    """Peak minus vertex (N, 2), float64, of quadrics fitted to the logarithms of heatmaps (N, h, w) around x, y (N,).

    The pixels within `radius` of the peak weigh by the blur's kernel times their squared value, as noise of the map is
    that of its logarithm divided by the value (Guo, IEEE Signal Processing Magazine 28(5), 2011). Where the quadric has
    no maximum, `fallback` (N, 2) stays.
    """
    if not len(heatmaps):
        return fallback
    rows, columns = heatmaps.shape[-2:]
    steps = torch.arange(-radius, radius + 1, device=heatmaps.device)
    dy, dx = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    column, row = x.unsqueeze(1) + dx, y.unsqueeze(1) + dy
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    index = row.clamp(0, rows - 1) * columns + column.clamp(0, columns - 1)
    values = heatmaps.flatten(1).gather(1, index).double().clamp(min=_LOWEST)
    taps = torch.from_numpy(cv2.getGaussianKernel(2 * radius + 1, 0)).to(values).flatten()
    weights = inside * taps[dx + radius] * taps[dy + radius] * values.square()
    u, v = dx.double(), dy.double()
    terms = torch.stack([torch.ones_like(u), u, v, u * u / 2, u * v, v * v / 2], dim=1)
    normal = torch.einsum("np,pi,pj->nij", weights, terms, terms)
    right = torch.einsum("np,pi,np->ni", weights, terms, values.log())
    # Far below the noise, but it keeps a map of zeros solvable.
    ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).amax(1).view(-1, 1, 1) * torch.eye(6).to(normal)
    _, gx, gy, xx, xy, yy = torch.linalg.solve(normal + ridge, right).unbind(1)
    determinant = xx * yy - xy * xy
    offset = torch.stack([yy * gx - xy * gy, xx * gy - xy * gx], 1) / determinant.unsqueeze(1)
    has_maximum = (determinant > 0) & (xx < 0) & offset.isfinite().all(1) & (offset.abs() <= radius).all(1)
    return torch.where(has_maximum.unsqueeze(1), offset, fallback)
