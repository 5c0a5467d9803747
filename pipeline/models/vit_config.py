"""The configuration of a vision transformer, and its named sizes. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.models.attention_config import AttentionConfig
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
