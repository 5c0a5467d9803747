"""The plain vision transformer backbone of ViTPose (section 3.1), made of timm's blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ConfigError, DataError
from pipeline.models.attention import WindowAttention
from pipeline.models.blocks import layer_norm, make_grid_blocks, run_blocks
from pipeline.models.experts import Sorting
from pipeline.models.parallel_convolution import ParallelConvolution
from pipeline.models.vit_config import ViTConfig


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
        self.proj = PatchConv(3, config.width, size, stride=config.stride, padding=padding)

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
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.width), requires_grad=learned)
        self.blocks = make_grid_blocks(config, experts)
        self.last_norm = layer_norm(config.width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place as ViTPose does from scratch: normal(0.02) truncated at +-2, zero biases; the patch
        convolution as torch does. Fixed positions are sines and cosines."""
        if self.config.positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            self.pos_embed.copy_(sincos_positions(self.config.width, self.config.grid)[:, 1:])
        self.patch_embed.proj.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, WindowAttention | ParallelConvolution):
                module.init_weights()

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


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos positions (1, 1 + N, width) float32 for any grid (rows, columns), patches row by row.

    As in the public MAE: the first half of the channels encodes the column, the second the row, each as sines, then
    cosines of width / 4 frequencies 10000 ** (-4 i / width). Slot 0, the class token's, is zero.
    """
    quarter = width // 4
    cpu = torch.device("cpu")
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=cpu) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64, device=cpu) for n in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros_like(patches[:1]), patches]).unsqueeze(0).float()


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
