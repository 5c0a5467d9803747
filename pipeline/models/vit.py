"""The plain vision transformer backbone of ViTPose (section 3.1), made of timm's blocks."""

from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigError, DataError
from pipeline.models.config import ViTConfig
from pipeline.models.experts import ExpertBlock, ExpertMlp, Sizes, Sorting

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class PatchConv(nn.Conv2d):
    """The patch convolution, which also takes patches that were already cut out.

    A convolution whose stride is its kernel is a linear map of each patch. MAE gathers the visible patches first and
    embeds only those; going through this module keeps the weights behind its own forward hooks (ZeRO-3 gathers there).
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, C, Hp, Wp), or channel-last patches (B, n, p * p * 3) to (B, n, C)."""
        if pixels.ndim == 4:
            return super().forward(pixels)
        return F.linear(pixels, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cuts images into patches and embeds each; `proj` is the name that MAE, timm and ViTPose share."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        size, padding = config.patch_size, config.patch_padding
        self.proj = PatchConv(3, config.width, size, stride=size, padding=padding)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, C), row by row. Raises DataError for another image size."""
        check_images(images, self.image_size)
        return self.proj(images).flatten(2).transpose(1, 2)


def check_images(images: Tensor, image_size: tuple[int, int]) -> None:
    """Raises DataError unless `images` are (B, 3, H, W) with (H, W) = `image_size`."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *image_size):
        height, width = image_size
        raise DataError(
            f"model input: images have shape {tuple(images.shape)}, this model takes (B, 3, {height}, {width}); "
            "resize the images or build the model with another image_size"
        )


def make_blocks(
    width: int, depth: int, heads: int, mlp_width: int, drop_path: float = 0.0, kind: type[Block] = Block
) -> nn.ModuleList:
    """Pre-norm blocks with qkv bias, exact GELU, LayerNorm eps 1e-6 and linearly growing stochastic depth."""
    return nn.ModuleList(
        kind(
            width,
            heads,
            # timm truncates width * ratio; the half keeps it at mlp_width whatever the rounding of the quotient.
            mlp_ratio=(mlp_width + 0.5) / width,
            qkv_bias=True,
            drop_path=drop_path * index / max(depth - 1, 1),
            norm_layer=layer_norm,
        )
        for index in range(depth)
    )


def make_expert_blocks(config: ViTConfig, datasets: Sequence[str]) -> nn.ModuleList:
    """The same blocks with a part of the MLP for each dataset."""
    blocks = make_blocks(config.width, config.depth, config.heads, config.mlp_width, config.drop_path, ExpertBlock)
    for block in blocks:
        block.mlp = ExpertMlp(config.width, config.mlp_width, config.expert_width, datasets)
    return blocks


def run_blocks(
    blocks: nn.ModuleList, tokens: Tensor, gradient_checkpointing: bool, sizes: Sizes | None = None
) -> Tensor:
    """Tokens (B, N, C) through all blocks; with checkpointing only each block's input is kept for backward.

    sizes: of blocks with experts, see `Sizes`.
    """
    arguments = () if sizes is None else (sizes,)
    for block in blocks:
        if gradient_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, *arguments, use_reentrant=False)
        else:
            tokens = block(tokens, *arguments)
    return tokens


class ViT(nn.Module):
    """Images to one feature vector a patch.

    There is no class token. ViTPose's public code keeps the position slot of one and adds it to every patch
    (`pos_embed[:, 1:] + pos_embed[:, :1]`); here `pos_embed` is (1, N, C), and a converter folds that slot into it.

    `experts` names the datasets of a model with `expert_width`. Raises ConfigError where it has none.
    """

    def __init__(self, config: ViTConfig, experts: Sequence[str] = ()) -> None:
        super().__init__()
        if bool(config.expert_width) != bool(experts):
            raise ConfigError(f"expert_width {config.expert_width} with {len(experts)} datasets: they go together")
        self.config = config
        self.experts = tuple(experts)
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.width))
        if experts:
            self.blocks = make_expert_blocks(config, experts)
        else:
            self.blocks = make_blocks(config.width, config.depth, config.heads, config.mlp_width, config.drop_path)
        self.last_norm = layer_norm(config.width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place as ViTPose does from scratch: normal(0.02) truncated at +-2, zero biases; the patch
        convolution as torch does."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed.proj.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, images: Tensor, tokens: Tensor | None = None, owners: Tensor | None = None) -> Tensor:
        """Normalised images (B, 3, H, W) to features (B, C, Hp, Wp).

        `tokens` (1 or B, T, C) are appended after the patches, carry no position, take part in every block and are
        dropped at the end (the knowledge token of ViTPose, section 3.4). `owners` (B,) int64 numbers each image's
        dataset among `experts`, on the CPU; a model without experts takes none. Raises DataError for another image size.
        """
        assert (owners is not None) == bool(self.experts), "a model with experts must know each image's dataset"
        x = self.patch_embed(images) + self.pos_embed
        if tokens is not None:
            x = torch.cat([x, tokens.to(x).expand(x.shape[0], -1, -1)], dim=1)
        if owners is None:
            x = run_blocks(self.blocks, x, self.config.gradient_checkpointing)
        else:
            sorting = Sorting.of(owners, len(self.experts), x.device)
            x = run_blocks(self.blocks, sorting.sort(x), self.config.gradient_checkpointing, sorting.sizes)
            x = sorting.unsort(x)
        x = self.last_norm(x[:, : self.config.patches])
        return x.transpose(1, 2).reshape(x.shape[0], self.config.width, *self.config.grid)


def interpolate_positions(positions: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, C) of one grid (rows, columns) resampled to another, (1, N', C).

    Bicubic with align_corners=False, in float32, as ViTPose's public checkpoint loader. Equal grids return the input.
    Raises DataError if N does not match `from_grid`.
    """
    if positions.ndim != 3 or positions.shape[:2] != (1, from_grid[0] * from_grid[1]):
        raise DataError(
            f"position embeddings have shape {tuple(positions.shape)}, expected (1, {from_grid[0] * from_grid[1]}, C) "
            f"for a grid of {from_grid[0]} x {from_grid[1]}; give the grid they were trained on"
        )
    if from_grid == to_grid:
        return positions
    picture = positions.float().reshape(1, *from_grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=to_grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)


def count(module: nn.Module) -> int:
    """Number of parameters, trainable or not; works on the meta device."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_parameters(config: ViTConfig, experts: Sequence[str] = ()) -> int:
    """Number of parameters of the backbone, without allocating it; `experts` as for `ViT`."""
    with torch.device("meta"):
        return count(ViT(config, experts))
