"""The configuration of a ResNet backbone, that of SimpleBaseline. Imports no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from pipeline.strict import Strict

BOTTLENECKS: Mapping[int, tuple[int, int, int, int]] = MappingProxyType(
    {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
)
"""Bottleneck blocks of the four stages (He et al., CVPR 2016, table 1)."""


class ResNetConfig(Strict):
    """A ResNet up to its last stage (SimpleBaseline: Xiao et al., ECCV 2018)."""

    takes_tokens: ClassVar[bool] = False
    """Whether a knowledge token can be appended."""
    expert_width: ClassVar[int] = 0
    """No part belongs to a dataset."""
    decay_blocks: ClassVar[int] = 0
    """Blocks whose learning rates layer decay tells apart."""
    upsampling: ClassVar[int] = 8
    """Factor of the simple decoder, from a stride of 32 to the usual quarter of the input."""
    width: ClassVar[int] = 2048
    """Channels of the features."""
    stride: ClassVar[int] = 32
    """Input pixels per feature."""

    kind: Literal["resnet"]
    """resnet."""
    layers: Literal[50, 101, 152] = 50
    """Depth by name."""
    image_size: tuple[int, int] = (256, 192)
    """Height and width of the input in pixels; multiples of 32 from 64 on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side, name in zip(self.image_size, ("height", "width"), strict=True):
            # Batch norm needs more than one feature a channel, whatever the batch.
            if not 2 * self.stride <= side <= 65_536 or side % self.stride:
                raise ValueError(f"image {name} {side} is not a multiple of {self.stride} from {2 * self.stride} on")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of features."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def bottlenecks(self) -> tuple[int, int, int, int]:
        """Blocks of each stage."""
        return BOTTLENECKS[self.layers]

    @property
    def summary(self) -> str:
        """In a few words, for cards."""
        return f"ResNet-{self.layers}"
