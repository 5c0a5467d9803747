"""The knowledge token on its way from a teacher to a student of another width."""

import torch
from torch import Tensor


def bridge(token: Tensor, width: int, seed: int) -> Tensor:
    """A fitted token (1, T, C) in a student's width: (1, T, width).

    The paper leaves open how a token of the teacher's width joins a narrower student. A learnable bridge would turn any
    frozen token into an ordinary learned one, so this one is fixed: a seeded matrix with orthonormal rows or columns,
    scaled so that a random token keeps its root mean square. Equal widths need no bridge.
    """
    channels = token.shape[-1]
    if channels == width:
        return token.clone()
    generator = torch.Generator().manual_seed(seed)
    larger, smaller = max(channels, width), min(channels, width)
    basis, _ = torch.linalg.qr(torch.randn(larger, smaller, generator=generator, dtype=torch.float64))
    matrix = basis if channels > width else basis.T * (width / channels) ** 0.5
    return (token.double() @ matrix).to(token.dtype)
