"""Which patches attend to which, as configuration. Imports no torch."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.strict import Strict


class AttentionConfig(Strict):
    """How the patches of one image see each other (ViTPose, table 5); the defaults are full attention."""

    window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Rows and columns of a window, in tokens; unset: every patch sees every other. The grid need not be a multiple."""
    shift: bool = False
    """Every other windowed block has its windows moved by half a window, masked as in Swin (section 3.2)."""
    pool: bool = False
    """The mean key and value of each window are further keys and values of all windows; no parameters."""
    relative_positions: bool = False
    """A learned bias for each head and offset of two patches (Swin, eq. 4); off in the paper's table."""
    global_blocks: int = Field(0, ge=0, le=1000)
    """So many evenly spaced blocks, the last one among them, keep full attention (ViTDet; 4 of 12: 3, 6, 9, 12)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("shift", "pool", "global_blocks"):
            if self.window is None and getattr(self, name):
                raise ValueError(f"{name} is of windowed attention: set window (rows, columns), or leave {name} out")
        return self

    def window_of(self, block: int, depth: int) -> tuple[int, int] | None:
        """The window of a block, counted from 0; None is full attention."""
        return None if block + 1 in self._global(depth) else self.window

    def is_shifted(self, block: int, depth: int) -> bool:
        """Whether this block's windows are moved: the second, fourth, ... of the windowed ones."""
        if not self.shift or self.window_of(block, depth) is None:
            return False
        windowed = [index for index in range(depth) if self.window_of(index, depth) is not None]
        return windowed.index(block) % 2 == 1

    def _global(self, depth: int) -> set[int]:
        return {k * depth // self.global_blocks for k in range(1, self.global_blocks + 1)}
