"""The knowledge token on its way from a teacher to a student of another width, and the tokens it is compared with."""

from typing import Literal

import torch
from torch import Tensor

INITIAL = 0.02
"""Root mean square of a token before it is fitted: the standard deviation of a ViT's other embeddings."""
_CONTROL = 0x70CE  # of its own: the bridge is drawn from the seed itself


def bridge(token: Tensor, width: int, seed: int, kind: Literal["orthogonal", "truncate"] = "orthogonal") -> Tensor:
    """A fitted token (1, T, C) in a student's width: (1, T, width).

    The paper leaves open how a token of the teacher's width joins a narrower student. A learnable bridge would turn any
    frozen token into an ordinary learned one, so this one is fixed: a seeded matrix with orthonormal rows or columns
    or, with `truncate`, that of the first channels; scaled so that a random token keeps its root mean square. Equal
    widths need no bridge.
    """
    channels = token.shape[-1]
    if channels == width:
        return token.clone()
    larger, smaller = max(channels, width), min(channels, width)
    if kind == "truncate":
        basis = torch.eye(larger, smaller, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(larger, smaller, generator=generator, dtype=torch.float64))
    matrix = basis if channels > width else basis.T * (width / channels) ** 0.5
    return (token.double() @ matrix).to(token.dtype)


def control_token(fitted: Tensor | None, width: int, seed: int) -> Tensor:
    """A random token (1, T, width) that knows of a fitted one (1, T, C) only the number and the root mean square.

    Without a fitted one: one token, of the size that tokens have before they are fitted. Leaves the global generator
    alone.
    """
    count = fitted.shape[1] if fitted is not None else 1
    size = fitted.double().square().mean().sqrt() if fitted is not None else torch.tensor(INITIAL).double()
    generator = torch.Generator().manual_seed((seed << 16) + _CONTROL)
    drawn = torch.randn(1, count, width, generator=generator, dtype=torch.float64)
    return (drawn * (size / drawn.square().mean().sqrt())).float()
