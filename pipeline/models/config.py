"""What a model is, as configuration: backbone and decoders, or a masked autoencoder. Imports no torch: planning is quick."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.models.resnet_config import ResNetConfig
from pipeline.models.vit_config import SIMPLE_SCALE, ViTConfig
from pipeline.strict import Strict

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


class EncoderConfig(Strict):
    """A backbone alone, to start a pose model from; that of a masked autoencoder is in `MAEConfig`."""

    backbone: ResNetConfig
    """The backbone; a start may have another image_size."""


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
