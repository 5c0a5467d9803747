"""The blocks of a vision transformer: timm's, with the attention, convolutions and experts that a configuration wants."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.attention import WindowAttention, Windows
from pipeline.models.experts import ExpertBlock, ExpertMlp, Sizes
from pipeline.models.parallel_convolution import ParallelBlock
from pipeline.models.vit_config import ViTConfig

layer_norm = partial(nn.LayerNorm, eps=1e-6)


def make_blocks(width: int, depth: int, heads: int, mlp_width: int, drop_path: float = 0.0) -> nn.ModuleList:
    """Pre-norm blocks with qkv bias, exact GELU, LayerNorm eps 1e-6 and linearly growing stochastic depth."""
    return nn.ModuleList(
        _make_block(Block, width, heads, mlp_width, drop_path * index / max(depth - 1, 1)) for index in range(depth)
    )


def make_grid_blocks(config: ViTConfig, experts: Sequence[str] = ()) -> nn.ModuleList:
    """The same for patches on a grid, with the configured attention and convolutions, and an expert a dataset."""
    kind: Callable[..., Block] = ExpertBlock if experts else Block
    if config.parallel_convolution:
        kind = partial(ParallelBlock, grid=config.grid)
    rates = [config.drop_path * index / max(config.depth - 1, 1) for index in range(config.depth)]
    blocks = nn.ModuleList(_make_block(kind, config.width, config.heads, config.mlp_width, rate) for rate in rates)
    for block in blocks if experts else ():
        block.mlp = ExpertMlp(config.width, config.mlp_width, config.expert_width, experts)
    attention = config.attention
    partitions: dict[tuple[tuple[int, int], bool], Windows] = {}
    for index, block in enumerate(blocks):
        window = attention.window_of(index, config.depth)
        if window is None and not attention.relative_positions:
            continue  # full attention stays timm's
        key = window or config.grid, attention.is_shifted(index, config.depth)
        windows = partitions.setdefault(key, Windows(config.grid, *key))
        pool = attention.pool and window is not None
        block.attn = WindowAttention(config.width, config.heads, windows, pool, attention.relative_positions)
    return blocks


def _make_block(kind: Callable[..., Block], width: int, heads: int, mlp_width: int, drop_path: float) -> Block:
    return kind(
        width,
        heads,
        # timm truncates width * ratio; the half keeps it at mlp_width whatever the rounding of the quotient.
        mlp_ratio=(mlp_width + 0.5) / width,
        qkv_bias=True,
        drop_path=drop_path,
        norm_layer=layer_norm,
    )


def run_blocks(
    blocks: nn.ModuleList, tokens: Tensor, gradient_checkpointing: bool, sizes: Sizes | None = None
) -> Tensor:
    """Tokens (B, N, C) through all blocks; with checkpointing only each block's input is kept for backward.

    sizes: of blocks with experts, see `Sizes`.
    """
    arguments = () if sizes is None else (sizes,)
    for block in blocks:
        if gradient_checkpointing and torch.is_grad_enabled():
            contexts = {"context_fn": block.checkpoint_contexts} if isinstance(block, ParallelBlock) else {}
            tokens = checkpoint(block, tokens, *arguments, use_reentrant=False, **contexts)
        else:
            tokens = block(tokens, *arguments)
    return tokens
