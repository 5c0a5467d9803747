"""Attention in windows over a grid of patches: shifted, pooled, with relative positions (ViTPose, table 5).

The paper released no code for it. Windows and shifts are Swin's (Liu et al., ICCV 2021, section 3.2). What is ours:

- The map is padded to whole windows behind the projections. Padding is never a key, and costs no linear layer.
- Pooled keys and values are means over the windows as they lie unshifted, in shifted blocks too. A mean of projected
  tokens is the projected mean: the projection is affine. They carry no relative position.
- Extra tokens (the knowledge token) are keys and values of every window, and attend to all patches and to each other.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]


class Windows:
    """A partition of a grid (rows, columns) of patches into windows; blocks of one partition share it.

    grid: rows and columns of patches; size: of a window; shifted: windows begin half a window further down and right,
    but for an axis that one window spans.
    """

    def __init__(self, grid: Grid, size: Grid, shifted: bool = False) -> None:
        self.grid, self.size = grid, size
        self.counts = -(-grid[0] // size[0]), -(-grid[1] // size[1])
        self.number, self.tokens = self.counts[0] * self.counts[1], size[0] * size[1]
        self.padding = self.counts[0] * size[0] - grid[0], self.counts[1] * size[1] - grid[1]
        rows, columns = (side // 2 if shifted and side < whole else 0 for side, whole in zip(size, grid, strict=True))
        self.shift = rows, columns
        # No buffers: they hold nothing that is learned, and must not enter checkpoints or be averaged over ranks.
        self._constants = {"allowed": self._allowed(), "offsets": self._offsets(), "sizes": self._sizes()}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def split(self, patches: Tensor, shift: bool = True) -> Tensor:
        """Patches (B, heads, N, d) to windows (B, windows * heads, tokens, d), zero where padded."""
        batch, heads, _, depth = patches.shape
        below, right = self.padding
        picture = F.pad(patches.unflatten(2, self.grid), (0, 0, 0, right, 0, below))
        if shift and any(self.shift):
            picture = picture.roll((-self.shift[0], -self.shift[1]), dims=(2, 3))
        (rows, columns), (height, width) = self.counts, self.size
        cut = picture.reshape(batch, heads, rows, height, columns, width, depth)
        return cut.permute(0, 2, 4, 1, 3, 5, 6).reshape(batch, self.number * heads, self.tokens, depth)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`: windows (B, windows * heads, tokens, d) to patches (B, heads, N, d)."""
        batch, depth = windows.shape[0], windows.shape[-1]
        (rows, columns), (height, width) = self.counts, self.size
        cut = windows.reshape(batch, rows, columns, -1, height, width, depth).permute(0, 3, 1, 4, 2, 5, 6)
        picture = cut.reshape(batch, -1, rows * height, columns * width, depth)
        if any(self.shift):
            picture = picture.roll(self.shift, dims=(2, 3))
        return picture[:, :, : self.grid[0], : self.grid[1]].flatten(2, 3)

    def pool(self, patches: Tensor) -> Tensor:
        """Mean over the patches of each unshifted window: (B, heads, N, d) to (B, heads, windows, d)."""
        batch, heads, _, depth = patches.shape
        sums = self.split(patches, shift=False).sum(dim=2).reshape(batch, self.number, heads, depth).transpose(1, 2)
        return sums / self._constant("sizes", patches.device).to(sums)

    def mask(self, further: int, device: torch.device) -> Tensor | None:
        """Which keys a window's queries may see: (windows, 1, tokens, tokens + further) bool, None where all.

        A place sees the real patches of its own window that were its neighbours before the shift, and all of the
        `further` keys. A padded place, whose answer is thrown away, sees everything, so that its softmax is defined.
        """
        if not any(self.shift) and not any(self.padding):
            return None
        return F.pad(self._constant("allowed", device), (0, further), value=True)

    def offsets(self, device: torch.device) -> Tensor:
        """For each pair of places in a window the row of a table of (2 height - 1) x (2 width - 1): (tokens, tokens)."""
        return self._constant("offsets", device)

    def _constant(self, name: str, device: torch.device) -> Tensor:
        constant = self._constants[name]
        if device == constant.device:
            return constant
        if (name, device) not in self._copies:
            with torch.inference_mode(False):  # training may follow
                self._copies[name, device] = constant.to(device)
        return self._copies[name, device]

    def _allowed(self) -> Tensor:
        """The mask without further keys. Patches of a window belong together if they did before the shift wrapped."""
        down, right = (
            (torch.arange(whole, device="cpu") - shift).div(side, rounding_mode="floor")
            for whole, shift, side in zip(self.grid, self.shift, self.size, strict=True)
        )
        # From 1 on: padding, which split() fills in, is region 0. What the shift moves out at the top is row -1.
        regions = (down.unsqueeze(1) + 1) * (self.counts[1] + 1) + right + 2
        region = self.split(regions.reshape(1, 1, -1, 1))[0, :, :, 0]
        same = region.unsqueeze(2) == region.unsqueeze(1)
        return ((same & (region > 0).unsqueeze(1)) | (region == 0).unsqueeze(2)).unsqueeze(1)

    def _offsets(self) -> Tensor:
        height, width = self.size
        rows, columns = (torch.arange(side, device="cpu") for side in self.size)
        places = torch.cartesian_prod(rows, columns)
        down, right = (places.unsqueeze(1) - places.unsqueeze(0)).unbind(2)
        return (down + height - 1) * (2 * width - 1) + right + width - 1

    def _sizes(self) -> Tensor:
        """Patches of each unshifted window, (1, 1, windows, 1)."""
        height, width = (
            torch.tensor([min(side, whole - start) for start in range(0, whole, side)], device="cpu")
            for side, whole in zip(self.size, self.grid, strict=True)
        )
        return (height.unsqueeze(1) * width).reshape(1, 1, -1, 1)


class WindowAttention(nn.Module):
    """Attention inside the windows of a partition; the names of its maps, `qkv` and `proj`, are those of timm.

    With `relative` each head has a learned bias for each offset, in `relative_positions`; one window over the whole
    grid is full attention with such a bias.
    """

    def __init__(self, width: int, heads: int, windows: Windows, pool: bool, relative: bool) -> None:
        super().__init__()
        self.heads, self.windows, self.pool = heads, windows, pool
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        offsets = (2 * windows.size[0] - 1) * (2 * windows.size[1] - 1)
        self.relative_positions = nn.Parameter(torch.zeros(offsets, heads)) if relative else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise the bias in place: normal(0.02), truncated at +-2 (Swin). The maps are the backbone's to fill."""
        if self.relative_positions is not None:
            nn.init.trunc_normal_(self.relative_positions, std=0.02)

    def forward(self, tokens: Tensor, **of_blocks: Any) -> Tensor:
        """Tokens (B, N + T, C) to (B, N + T, C): the grid's N patches row by row, then T extra tokens.

        `of_blocks`, a mask and the like, is what timm's block hands to every attention: nothing.
        """
        assert not any(of_blocks.values()), "the mask is the windows' own"
        batch, length, width = tokens.shape
        split = self.qkv(tokens).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        patches = self.windows.grid[0] * self.windows.grid[1]
        keys, values = (self._keys(each, patches) for each in (key, value))
        inside = self.windows.split(query[:, :, :patches])
        mask = self._mask(keys.shape[2] - self.windows.tokens, query)
        found = self.windows.join(F.scaled_dot_product_attention(inside, keys, values, attn_mask=mask))
        if length > patches:
            extra = F.scaled_dot_product_attention(query[:, :, patches:], key, value)
            found = torch.cat([found, extra], dim=2)
        return self.proj(found.transpose(1, 2).reshape(batch, length, width))

    def _keys(self, tokens: Tensor, patches: int) -> Tensor:
        """Keys or values (B, heads, N + T, d) as each window sees them: (B, windows * heads, keys, d)."""
        shared = [tokens[:, :, patches:]] if tokens.shape[2] > patches else []
        if self.pool:
            shared = [self.windows.pool(tokens[:, :, :patches]), *shared]
        own = self.windows.split(tokens[:, :, :patches])
        if not shared:
            return own
        return torch.cat([own, torch.cat(shared, dim=2).repeat(1, self.windows.number, 1, 1)], dim=2)

    def _mask(self, further: int, query: Tensor) -> Tensor | None:
        """What is added to the scores, or which are allowed: (1, windows * heads, tokens, keys)."""
        allowed = self.windows.mask(further, query.device)
        if self.relative_positions is None:
            return None if allowed is None else allowed.expand(-1, self.heads, -1, -1).flatten(0, 1).unsqueeze(0)
        offsets = self.windows.offsets(query.device)
        bias = self.relative_positions[offsets.flatten()].unflatten(0, offsets.shape).permute(2, 0, 1)
        bias = F.pad(bias, (0, further)).unsqueeze(0).expand(self.windows.number, -1, -1, -1)
        if allowed is not None:
            bias = bias.masked_fill(~allowed, float("-inf"))
        return bias.flatten(0, 1).unsqueeze(0).to(query.dtype)
