"""What a forward of one image computes, in multiply-adds, from the shapes of the layers. Imports no torch.

Counted are convolutions, linear maps and the two matrix products of attention, padding of windows included; norms,
activations, softmax, biases and resampling are not. The paper's GFLOPs are such multiply-adds, of the backbone alone:
17.1 for ViTPose-B. Tests compare these sums with what torch counts while the real modules run.
"""

from dataclasses import dataclass

from pipeline.models.config import DecoderConfig, MAEConfig, PoseConfig
from pipeline.models.resnet_config import ResNetConfig
from pipeline.models.vit_config import SIMPLE_SCALE, ViTConfig


@dataclass(frozen=True)
class Attended:
    """Who attends to whom in one block."""

    windows: int
    queries: int
    """Places of a window, padding included."""
    keys: int
    """Places of a window, pooled tokens and extra tokens."""
    extra: int
    """Tokens after the patches that attend to every patch and to each other."""
    patches: int

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key, of one head."""
        return self.windows * self.queries * self.keys + self.extra * (self.patches + self.extra)


def attended(config: ViTConfig, block: int, extra: int = 0) -> Attended:
    """The attention of a block, counted from 0, with so many extra tokens."""
    window = config.attention.window_of(block, config.depth)
    if window is None:
        return Attended(1, config.patches, config.patches + extra, extra, config.patches)
    rows, columns = (-(-whole // side) for whole, side in zip(config.grid, window, strict=True))
    places = window[0] * window[1]
    pooled = rows * columns if config.attention.pool else 0
    return Attended(rows * columns, places, places + pooled + extra, extra, config.patches)


@dataclass(frozen=True)
class BackboneCost:
    """Multiply-adds of one image, by part."""

    patches: int
    """The patch convolution."""
    attention: int
    """Projections and products of all blocks."""
    mlp: int
    convolution: int
    """ViTAE's parallel convolutions."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.patches + self.attention + self.mlp + self.convolution


def backbone_cost(config: ViTConfig, extra: int = 0) -> BackboneCost:
    """The backbone's forward of one image, with so many extra tokens (the knowledge token)."""
    tokens, width = config.patches + extra, config.width
    products = sum(2 * attended(config, block, extra).pairs * width for block in range(config.depth))
    # Two convolutions, 3 x 3, between width and 4 width channels in width / 4 groups: 4 channels in or 16, a group.
    branch = config.patches * 9 * (4 * width * 4 + width * 16) if config.parallel_convolution else 0
    return BackboneCost(
        patches=config.patches * 3 * config.patch_size**2 * width,
        attention=config.depth * tokens * 4 * width**2 + products,
        mlp=config.depth * tokens * 2 * width * config.mlp_width,
        convolution=config.depth * branch,
    )


def resnet_cost(config: ResNetConfig) -> int:
    """A ResNet's forward of one image."""
    pixels = config.image_size[0] * config.image_size[1]
    found, channels = pixels // 4 * 49 * 3 * 64, 64
    for stage, blocks in enumerate(config.bottlenecks):
        narrow, area = 64 * 2**stage, pixels // 16 // 4**stage
        for block in range(blocks):
            first = 4 * area if stage and not block else area  # the stride is in the second convolution
            found += first * channels * narrow + area * narrow * (9 * narrow + 4 * narrow)
            found += 0 if block else area * channels * 4 * narrow
            channels = 4 * narrow
    return found


def decoder_cost(
    grid: tuple[int, int], width: int, keypoints: int, config: DecoderConfig, upsampling: int = SIMPLE_SCALE
) -> int:
    """A decoder's forward of one image: features of a grid (rows, columns) to heatmaps."""
    pixels = grid[0] * grid[1]
    if config.kind == "simple":
        return pixels * upsampling**2 * 9 * width * keypoints
    found, channels = 0, width
    for _ in range(config.deconv_layers):
        found += pixels * channels * config.filters * 16  # a 4 x 4 kernel on every pixel that comes in
        pixels, channels = pixels * 4, config.filters
    return found + pixels * channels * keypoints


def pose_cost(config: PoseConfig, keypoints: int) -> tuple[int, int]:
    """Backbone, with its knowledge tokens, and one decoder for so many keypoints: an image's forward."""
    backbone = config.backbone
    decoder = decoder_cost(backbone.grid, backbone.width, keypoints, config.decoder, backbone.upsampling)
    if isinstance(backbone, ResNetConfig):
        return resnet_cost(backbone), decoder
    return backbone_cost(backbone, config.knowledge_tokens).total, decoder


def mae_cost(config: MAEConfig) -> tuple[int, int]:
    """Encoder, on the visible patches and the class token, and decoder of an image's forward."""
    backbone, width = config.backbone, config.decoder_width
    pixels = 3 * backbone.patch_size**2
    hidden = backbone.patches - config.visible
    encoder = config.visible * pixels * backbone.width
    encoder += _plain_blocks(config.visible + 1, backbone.width, backbone.mlp_width, backbone.depth)
    decoder = (config.visible + 1) * backbone.width * width + hidden * width * pixels
    return encoder, decoder + _plain_blocks(backbone.patches + 1, width, 4 * width, config.decoder_depth)


def _plain_blocks(tokens: int, width: int, mlp_width: int, depth: int) -> int:
    return depth * tokens * (4 * width**2 + 2 * width * mlp_width + 2 * tokens * width)
