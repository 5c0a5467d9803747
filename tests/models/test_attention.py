"""Windowed attention against a reference that decides for every pair of tokens on its own."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.models.attention import WindowAttention, Windows
from pipeline.models.backbones import count_parameters
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig

Grid = tuple[int, int]


def reference(
    layer: WindowAttention, tokens: Tensor, grid: Grid, size: Grid, shift: Grid, pool: bool
) -> tuple[Tensor, Tensor]:
    """The same by hand: scores over all patches, pooled tokens and extra tokens, and a mask made pair by pair.

    Also returns the weights (B, heads, N + T, N + pooled + T).
    """
    patches, (batch, length, width) = grid[0] * grid[1], tokens.shape
    heads, depth = layer.heads, width // layer.heads
    places = list(itertools.product(range(grid[0]), range(grid[1])))
    # Pooled before they are projected, as one would build it.
    cells = sorted({(row // size[0], column // size[1]) for row, column in places}) if pool else []
    members = [[i for i, (r, c) in enumerate(places) if (r // size[0], c // size[1]) == cell] for cell in cells]
    pooled = [tokens[:, rows].mean(dim=1, keepdim=True) for rows in members]
    sources = torch.cat([tokens[:, :patches], *pooled, tokens[:, patches:]], dim=1)
    project = lambda x: layer.qkv(x).reshape(batch, -1, 3, heads, depth).permute(2, 0, 3, 1, 4)  # noqa: E731
    query, (_, key, value) = project(tokens)[0], project(sources)
    scores = query @ key.transpose(2, 3) / math.sqrt(depth)
    bias = torch.zeros(heads, length, sources.shape[1], dtype=tokens.dtype)
    allowed = torch.ones(length, sources.shape[1], dtype=torch.bool)
    window = lambda place: tuple((p - s) // w for p, s, w in zip(place, shift, size, strict=True))  # noqa: E731
    for i, j in itertools.product(range(patches), range(patches)):
        allowed[i, j] = window(places[i]) == window(places[j])
        down, right = (a - b for a, b in zip(places[i], places[j], strict=True))
        if layer.relative_positions is not None and allowed[i, j]:
            bias[:, i, j] = layer.relative_positions[(down + size[0] - 1) * (2 * size[1] - 1) + right + size[1] - 1]
    allowed[patches:, patches : patches + len(pooled)] = False  # extra tokens see the patches themselves
    weights = (scores + bias).masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return layer.proj((weights @ value).transpose(1, 2).reshape(batch, length, width)), weights


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid, size", [((6, 4), (3, 2)), ((7, 5), (3, 4)), ((5, 4), (4, 4)), ((4, 3), (4, 3))])
def test_every_kind_equals_the_mask_over_all_pairs(
    grid: Grid, size: Grid, shifted: bool, pool: bool, relative: bool, extra: int
) -> None:
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, Windows(grid, size, shifted), pool, relative).double()
    if layer.relative_positions is not None:
        torch.nn.init.normal_(layer.relative_positions)
    tokens = torch.randn(2, grid[0] * grid[1] + extra, 8, dtype=torch.float64, requires_grad=True)
    shift = tuple(side // 2 if shifted and side < whole else 0 for side, whole in zip(size, grid, strict=True))
    expected, weights = reference(layer, tokens, grid, size, shift, pool)
    found = layer(tokens)
    torch.testing.assert_close(found, expected)
    assert torch.isfinite(weights).all() and weights.min() >= 0
    direction = torch.randn_like(found)
    wanted = [tokens, *layer.parameters()]
    gradients = [torch.autograd.grad((each * direction).sum(), wanted) for each in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, theirs)


def test_one_window_over_the_whole_map_is_full_attention_of_timm() -> None:
    full = ViT(ViTConfig(size="micro", image_size=(64, 48)))
    full.init_weights()
    whole = ViT(ViTConfig(size="micro", image_size=(64, 48), attention={"window": (4, 3)}))
    whole.load_state_dict(full.state_dict(), strict=True)
    images, token = torch.randn(2, 3, 64, 48), torch.randn(1, 1, 32)
    torch.testing.assert_close(whole(images, token), full(images, token))


COMBINATIONS = [
    {"window": (8, 8)},
    {"window": (8, 8), "shift": True},
    {"window": (8, 8), "pool": True},
    {"window": (8, 8), "shift": True, "pool": True},
    {"window": (8, 8), "global_blocks": 4},
    {"window": (16, 12), "shift": True, "pool": True},
]


@pytest.mark.parametrize("attention", COMBINATIONS)
def test_the_papers_kinds_have_no_further_parameters_and_take_weights_of_full_attention(attention: dict) -> None:
    size = {"size": "B", "feature_ratio": 2}
    assert count_parameters(ViTConfig(**size, attention=attention)) == count_parameters(ViTConfig(**size))
    with torch.device("meta"):
        names = [ViT(ViTConfig(**size, **values)).state_dict().keys() for values in ({}, {"attention": attention})]
    assert names[0] == names[1]


def test_a_fourth_of_the_blocks_is_global_and_every_other_window_is_shifted() -> None:
    attention = {"window": (8, 8), "shift": True, "global_blocks": 4}
    with torch.device("meta"):
        blocks = ViT(ViTConfig(size="B", feature_ratio=2, attention=attention)).blocks
    kinds = [
        "full" if not isinstance(block.attn, WindowAttention) else "shifted" if any(block.attn.windows.shift) else "own"
        for block in blocks
    ]
    assert kinds == ["own", "shifted", "full"] * 4


def test_a_global_block_among_pooled_windows_sees_patches_only() -> None:
    config = {"size": "micro", "image_size": (64, 48), "depth": 2}
    attention = {"window": (2, 2), "pool": True, "relative_positions": True, "global_blocks": 1}
    blocks = ViT(ViTConfig(**config, attention=attention)).blocks
    assert blocks[0].attn.pool and not blocks[1].attn.pool
    assert blocks[1].attn.windows.size == (4, 3)
    assert blocks[1].attn.relative_positions.shape == (7 * 5, 2)


@pytest.mark.parametrize("resolution", [(224, 224), (256, 192), (256, 256), (384, 288), (384, 384), (576, 432)])
@pytest.mark.parametrize("ratio", [1, 2])
def test_windows_of_eight_fit_every_resolution_of_the_paper(resolution: Grid, ratio: int) -> None:
    attention = {"window": (8, 8), "shift": True, "pool": True}
    config = ViTConfig(size="micro", image_size=resolution, feature_ratio=ratio, attention=attention)
    features = ViT(config)(torch.randn(1, 3, *resolution))
    assert features.shape == (1, 32, *(side * ratio // 16 for side in resolution))
    assert torch.isfinite(features).all()


def test_a_model_under_autocast_and_with_checkpointing_computes_the_same() -> None:
    attention = {"window": (3, 2), "shift": True, "pool": True, "relative_positions": True, "global_blocks": 1}
    values = {"size": "micro", "image_size": (64, 48), "depth": 3, "drop_path": 0.3, "attention": attention}
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ViT(ViTConfig(**values, gradient_checkpointing=checkpointing)).train()
        model.init_weights()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(torch.randn(2, 3, 64, 48), torch.randn(1, 1, 32))
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.isfinite(each).all() for each in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "attention, complaint",
    [
        ({"window": (17, 8)}, "attention.window 17 x 8 is larger than the map of 16 x 12 tokens"),
        ({"window": (8, 13)}, "attention.window 8 x 13 is larger than the map"),
        ({"shift": True}, "shift is of windowed attention"),
        ({"pool": True}, "pool is of windowed attention"),
        ({"global_blocks": 4}, "global_blocks is of windowed attention"),
        ({"window": (8, 8), "global_blocks": 13}, "global_blocks 13 is more than depth 12"),
    ],
)
def test_impossible_attention_is_named(attention: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ViTConfig(size="B", attention=attention)
