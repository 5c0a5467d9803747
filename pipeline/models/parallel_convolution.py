"""ViTAE's convolutions beside the attention of a plain block (ViTAEv2, arXiv 2202.10108, section 3).

The form is that of the plain blocks that ViTAE's authors published for detection (ViTAE-Transformer/ViTDet):
    y = x + attention(norm1(x)) + convolutions(x),   z = y + mlp(norm2(y)),
with convolutions = 3 x 3 to four times the width, batch norm, SiLU, 3 x 3 back, both in width / 4 groups, on the input
as it is, without a norm. At H's size these add 12M parameters, which gives the 644M that the paper reports. ViTAE-G
itself was never released: a 1B model of these blocks is a substitution.

Ours: the last convolution starts at zero, so that a backbone whose other weights come from a plain ViT computes at first
what that one did; tokens after the patches (the knowledge token) pass the branch by.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class ParallelConvolution(nn.Module):
    """The branch. `samples_seen` counts the training samples that moved the running statistics, as in the decoders."""

    samples_seen: Tensor

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.recomputing = False
        groups = width // 4
        self.expand = nn.Conv2d(width, 4 * width, kernel_size=3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(4 * width)
        self.reduce = nn.Conv2d(4 * width, width, kernel_size=3, padding=1, groups=groups)
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place: the first convolution and the norm as torch does, the last convolution zero."""
        self.expand.reset_parameters()
        self.norm.reset_parameters()
        nn.init.zeros_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)
        self.samples_seen.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N + T, C) to (B, N + T, C): the grid's N patches row by row, then T tokens that get zeros."""
        patches = self.grid[0] * self.grid[1]
        picture = tokens[:, :patches].transpose(1, 2).unflatten(2, self.grid)
        found = self.reduce(F.silu(self._normalise(self.expand(picture)))).flatten(2).transpose(1, 2)
        return F.pad(found, (0, 0, 0, tokens.shape[1] - patches))

    def _normalise(self, picture: Tensor) -> Tensor:
        if not self.training or not self.recomputing:
            self.samples_seen += len(picture) if self.training else 0
            return self.norm(picture)
        # With the statistics of the batch, as the first time; the running ones were moved then, copies move now.
        mean, variance = self.norm.running_mean.clone(), self.norm.running_var.clone()
        weight, bias = self.norm.weight, self.norm.bias
        return F.batch_norm(picture, mean, variance, weight, bias, training=True, eps=self.norm.eps)


class ParallelBlock(Block):
    """timm's block with the branch beside the attention; the branch has a drop path of its own."""

    def __init__(self, width: int, heads: int, *, grid: tuple[int, int], **values: Any) -> None:
        super().__init__(width, heads, **values)
        self.convolution = ParallelConvolution(width, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N + T, C) to (B, N + T, C)."""
        branch = self.drop_path1(self.convolution(x))
        x = x + self.drop_path1(self.attn(self.norm1(x))) + branch
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the forward and around its repetition in the backward, for gradient checkpointing."""
        return nullcontext(), self._recomputing()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.convolution.recomputing = True
        try:
            yield
        finally:
            self.convolution.recomputing = False
