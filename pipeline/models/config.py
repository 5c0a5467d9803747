"""What a model is, as configuration: named sizes, backbones, decoders. Imports no torch, so that planning stays quick."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.models.attention_config import AttentionConfig
from pipeline.models.resnet_config import ResNetConfig
from pipeline.strict import AddedLater, NotInFingerprint, Strict


def _shape(width: int, depth: int, heads: int, mlp_width: int | None = None) -> Mapping[str, int]:
    return MappingProxyType(
        {"width": width, "depth": depth, "heads": heads, "mlp_width": mlp_width if mlp_width else 4 * width}
    )


SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "micro": _shape(32, 2, 2),
        "mini": _shape(64, 2, 2),
        "tiny": _shape(128, 4, 4),
        # The published S has 12 heads of 32; the 6 heads of other small ViTs have the same tensor shapes, silently.
        "S": _shape(384, 12, 12),
        "B": _shape(768, 12, 12),
        "L": _shape(1024, 24, 16),
        "H": _shape(1280, 32, 16),
        "1B": _shape(1408, 40, 16, 6144),
    }
)
"""Width, depth, heads and MLP width by name. S to H: ViTPose (NeurIPS 2022) and its public configs; 1B: a plain ViT-g,
which is not the paper's ViTAE-G (that one was never released). The lower-case ones run on a CPU."""

SIMPLE_SCALE = 4
"""Upsampling of the simple decoder behind a ViT."""


class ViTConfig(Strict):
    """A plain vision transformer: either `size` names a preset, or width, depth and heads are given, or both."""

    takes_tokens: ClassVar[bool] = True
    """Whether a knowledge token can be appended."""
    upsampling: ClassVar[int] = SIMPLE_SCALE
    """Factor of the simple decoder."""

    # The only kind there was, and so no part of the fingerprint.
    kind: Annotated[Literal["vit"], NotInFingerprint] = "vit"
    """vit."""
    size: str | None = None
    """Preset that fills width, depth, heads and mlp_width: micro, mini, tiny, S, B, L, H, 1B. Given values win."""
    image_size: tuple[int, int] = (256, 192)
    """Height and width of the input in pixels; multiples of the patch size."""
    patch_size: int = Field(16, ge=1, le=1024)
    """Side of a patch in pixels."""
    feature_ratio: Annotated[Literal[1, 2, 4], AddedLater] = 1
    """Tokens along a patch's side: patches start every patch_size / feature_ratio pixels and overlap above 1. Features
    of patches of 16 have 1/16, 1/8 or 1/4 of the image's size."""
    width: int = Field(ge=1, le=65_536)
    """Channels of a token."""
    depth: int = Field(ge=1, le=1000)
    """Number of transformer blocks."""
    heads: int = Field(ge=1, le=65_536)
    """Attention heads; they divide the width."""
    mlp_width: int = Field(ge=1, le=1_000_000)
    """Hidden channels of a block's MLP; four times the width unless given."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""
    patch_padding: int = Field(ge=0, le=1024)
    """Zero padding of the patch convolution in pixels. At feature_ratio 1 2 unless given, as in ViTPose (patches lie 2
    pixels up and left; MAE has 0); above, what centres the patches: 4 at ratio 2 and 6 at 4 for patches of 16."""
    positions: Annotated[Literal["learned", "fixed"], AddedLater] = "learned"
    """learned: trained; fixed: 2-D sin-cos (MAE), frozen. Positions that `init` brings replace either's start."""
    attention: Annotated[AttentionConfig, AddedLater] = AttentionConfig()
    """Full attention, or windows."""
    parallel_convolution: Annotated[bool, AddedLater] = False
    """ViTAE's convolutions beside the attention of every block (ViTAEv2, section 3), with batch norm."""
    expert_width: Annotated[int, AddedLater] = Field(0, ge=0, le=65_536)
    """Channels of each block's MLP output that belong to the sample's dataset (ViTPose+; a quarter of the width in the
    released models). 0: a plain transformer, which all datasets share."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: about a third more compute for a fraction of the memory."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values = dict(data)
        size = values.get("size")
        if size is not None:
            if size not in SIZES:
                raise ValueError(f"unknown size {size!r}; one of {', '.join(SIZES)}")
            # Another width without a word on the MLP keeps the ratio of 4, not the preset's width.
            preset = {key: value for key, value in SIZES[size].items() if key != "mlp_width" or "width" not in values}
            values = {**preset, **values}
        if values.get("mlp_width") is None and isinstance(values.get("width"), int):
            values["mlp_width"] = 4 * values["width"]
        if values.get("patch_padding") is None:
            values["patch_padding"] = _centred(values.get("patch_size", 16), values.get("feature_ratio", 1))
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side, name in zip(self.image_size, ("height", "width"), strict=True):
            if not 0 < side <= 65_536 or side % self.patch_size:
                raise ValueError(f"image {name} {side} is not a positive multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        self._check_padding()
        if self.width % 4 and (self.positions == "fixed" or self.parallel_convolution):
            raise ValueError(f"width {self.width} is not a multiple of 4, as fixed positions and convolutions need")
        self._check_attention()
        if self.expert_width >= self.width:
            raise ValueError(f"expert_width {self.expert_width} must be below the width {self.width}: some is shared")
        if self.expert_width and self.parallel_convolution:
            raise ValueError("expert_width and parallel_convolution do not go together: choose one")
        return self

    def _check_padding(self) -> None:
        """The convolution must give the grid: floor((side + 2 padding - patch) / stride) + 1 = side / stride."""
        if self.patch_size % self.feature_ratio:
            raise ValueError(f"patch_size {self.patch_size} is not a multiple of feature_ratio {self.feature_ratio}")
        least = _least_padding(self.patch_size, self.feature_ratio)
        if self.patch_padding < least:
            raise ValueError(
                f"patch_padding {self.patch_padding} gives fewer than {self.grid[0]} x {self.grid[1]} tokens: at least "
                f"{least} with patch_size {self.patch_size} and feature_ratio {self.feature_ratio}"
            )
        if 2 * self.patch_padding >= self.patch_size:
            raise ValueError(f"patch_padding {self.patch_padding} must be below half of patch_size {self.patch_size}")

    def _check_attention(self) -> None:
        window, grid = self.attention.window, self.grid
        if window is not None and (window[0] > grid[0] or window[1] > grid[1]):
            raise ValueError(
                f"attention.window {window[0]} x {window[1]} is larger than the map of {grid[0]} x {grid[1]} tokens "
                "(image_size / patch_size x feature_ratio): use a smaller window"
            )
        if self.attention.global_blocks > self.depth:
            raise ValueError(f"attention.global_blocks {self.attention.global_blocks} is more than depth {self.depth}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next."""
        return self.patch_size // self.feature_ratio

    @property
    def patches(self) -> int:
        """Number of patches in an image."""
        return self.grid[0] * self.grid[1]

    @property
    def decay_blocks(self) -> int:
        """Blocks whose learning rates layer decay tells apart."""
        return self.depth

    @property
    def summary(self) -> str:
        """In a few words, for cards."""
        return f"{self.width} x {self.depth}, patch {self.patch_size}"


def _least_padding(patch: int, ratio: int) -> int:
    """Half of what a patch reaches beyond its stride, rounded up."""
    return -(-(patch - patch // ratio) // 2)


def _centred(patch: Any, ratio: Any) -> int:
    """ViTPose's padding: 2 at ratio 1; 4 at 2 and 6 at 4 for patches of 16, and the like for others."""
    known = isinstance(patch, int) and isinstance(ratio, int) and ratio > 1
    return _least_padding(patch, ratio) if known else 2


BackboneConfig = ViTConfig | ResNetConfig


class DecoderConfig(Strict):
    """What turns features into heatmaps."""

    kind: Literal["classic", "simple"] = "classic"
    """classic: transposed convolutions; simple: bilinear upsampling by 4 (behind a ResNet by 8) and one convolution."""
    deconv_layers: int = Field(2, ge=0, le=4)
    """Transposed convolutions of the classic decoder; each doubles the resolution. Behind a ResNet 3 unless given."""
    filters: int = Field(256, ge=1, le=65_536)
    """Channels of the classic decoder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "simple" and (self.deconv_layers, self.filters) != (2, 256):
            raise ValueError("deconv_layers and filters belong to kind 'classic'; the simple decoder has neither")
        return self


def heatmap_size(grid: tuple[int, int], config: DecoderConfig, upsampling: int = SIMPLE_SCALE) -> tuple[int, int]:
    """Height and width of the heatmaps that come from a grid (rows, columns) of features.

    upsampling: of a simple decoder, as the backbone wants it.
    """
    scale = 2**config.deconv_layers if config.kind == "classic" else upsampling
    return grid[0] * scale, grid[1] * scale


class PoseConfig(Strict):
    """A pose model without its data: K of each decoder comes from the datasets."""

    backbone: BackboneConfig = Field(discriminator="kind")
    """The shared backbone: a vision transformer, or by `kind: resnet` a ResNet."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder, one a dataset."""
    knowledge_tokens: int = Field(0, ge=0, le=4096)
    """Fixed tokens that a distilled student carries and appends to its patches; 0 for every other model."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        backbone = data.get("backbone") if isinstance(data, Mapping) else None
        if not isinstance(backbone, Mapping):
            return data
        values = {**data, "backbone": {"kind": "vit", **backbone}}
        decoder = values.get("decoder", {})
        if values["backbone"]["kind"] == "resnet" and isinstance(decoder, Mapping) and decoder.get("kind") != "simple":
            values["decoder"] = {"deconv_layers": 3, **decoder}
        return values

    @model_validator(mode="after")
    def _tokens_need_a_vit(self) -> Self:
        if self.knowledge_tokens and not self.backbone.takes_tokens:
            raise ValueError(f"knowledge_tokens: a {self.backbone.kind} takes none; use a ViT or leave them out")
        return self

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """Height and width of the heatmaps."""
        return heatmap_size(self.backbone.grid, self.decoder, self.backbone.upsampling)


class MAEConfig(Strict):
    """A masked autoencoder; the defaults are the paper's."""

    backbone: ViTConfig
    """The encoder; its patch_padding is 0 unless given and must be 0, and so must drop_path."""
    mask_ratio: float = Field(0.75, gt=0.0, lt=1.0)
    """Share of patches that the encoder does not see."""
    decoder_width: int = Field(512, ge=4, le=65_536)
    """Channels of the decoder; a multiple of 4 and of decoder_heads."""
    decoder_depth: int = Field(8, ge=1, le=1000)
    """Blocks of the decoder."""
    decoder_heads: int = Field(16, ge=1, le=65_536)
    """Attention heads of the decoder."""
    norm_pixels: bool = True
    """Predict each patch normalised by its own mean and variance."""

    @field_validator("backbone", mode="before")
    @classmethod
    def _no_padding(cls, value: Any) -> Any:
        whole = isinstance(value, Mapping) and value.get("feature_ratio", 1) == 1
        return {"patch_padding": 0, **value} if whole else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        plain = ViTConfig.model_fields
        for name in ("feature_ratio", "attention", "parallel_convolution"):
            if getattr(self.backbone, name) != plain[name].default:
                raise ValueError(f"the encoder of an MAE sees separate patches in no order: leave out backbone.{name}")
        if self.backbone.patch_padding or self.backbone.drop_path:
            raise ValueError("the encoder of an MAE has patch_padding 0 and drop_path 0")
        if self.backbone.expert_width:
            raise ValueError("the encoder of an MAE has no datasets to tell apart: expert_width is of pose models")
        for name, width in (("backbone.width", self.backbone.width), ("decoder_width", self.decoder_width)):
            if width % 4:
                raise ValueError(f"{name} {width} is not a multiple of 4, which sin-cos positions need")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(f"decoder_width {self.decoder_width} is not divisible by heads {self.decoder_heads}")
        if not self.visible:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves none of {self.backbone.patches} patches visible")
        return self

    @property
    def visible(self) -> int:
        """Number of patches that the encoder sees."""
        return int(self.backbone.patches * (1 - self.mask_ratio))
