import math

import pytest
import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import DataError
from pipeline.models.config import MAEConfig
from pipeline.models.mae import patchify
from pipeline.models.vit import PatchEmbed, ViT, interpolate_positions, sincos_positions
from pipeline.models.vit_config import ViTConfig


def small(**values: object) -> ViTConfig:
    return ViTConfig.model_validate({"size": "micro", "image_size": (48, 32), "patch_size": 8, **values})


def build(seed: int = 0, **values: object) -> ViT:
    torch.manual_seed(seed)
    model = ViT(small(**values))
    model.init_weights()
    return model


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 48, 32, generator=torch.Generator().manual_seed(5))


def test_equals_timms_vision_transformer_with_the_same_weights() -> None:
    model = build(patch_padding=0, depth=3, mlp_width=100)
    timm = VisionTransformer(
        img_size=(48, 32),
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=100.01 / 32,
        class_token=False,
        global_pool="",
        num_classes=0,
    )
    weights = {name.replace("last_norm", "norm"): value for name, value in model.state_dict().items()}
    timm.load_state_dict(weights, strict=True)
    expected = timm(images()).transpose(1, 2).reshape(2, 32, 6, 4)
    torch.testing.assert_close(model(images()), expected, rtol=1e-6, atol=1e-6)


def randomise(module: nn.Module) -> None:
    """Every parameter and running statistic away from its start."""
    generator = torch.Generator().manual_seed(11)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.05)
            tensor.sub_(0.3 if tensor.ndim > 1 else 0.0)


def test_equals_timm_with_every_tensor_random_and_a_padding_of_two() -> None:
    model = ViT(ViTConfig(size="tiny", image_size=(256, 192), depth=2)).eval()
    randomise(model)
    timm = VisionTransformer(
        img_size=(256, 192), embed_dim=128, depth=2, num_heads=4, class_token=False, global_pool="", num_classes=0
    )
    timm.patch_embed.proj.padding = (2, 2)
    weights = {name.replace("last_norm", "norm"): value for name, value in model.state_dict().items()}
    timm.load_state_dict(weights, strict=True)
    pictures = torch.randn(2, 3, 256, 192)
    found, expected = model(pictures), timm.eval()(pictures).transpose(1, 2).reshape(2, 128, 16, 12)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("resolution", [(224, 224), (256, 192), (256, 256), (384, 288), (384, 384), (576, 432)])
@pytest.mark.parametrize("ratio, padding", [(1, 2), (2, 4), (4, 6)])
def test_the_papers_resolutions_and_feature_ratios_give_the_exact_grid(
    resolution: tuple[int, int], ratio: int, padding: int
) -> None:
    config = ViTConfig(size="micro", width=8, depth=1, image_size=resolution, feature_ratio=ratio)
    assert config.patch_padding == padding
    assert config.grid == tuple(side // 16 * ratio for side in resolution)
    with torch.device("meta"):
        convolved = PatchEmbed(config).proj(torch.empty(1, 3, *resolution))
        assert ViT(config).pos_embed.shape == (1, config.patches, 8)
    assert convolved.shape[2:] == config.grid


@pytest.mark.parametrize("ratio, padding", [(1, 2), (2, 2), (4, 3)])
def test_other_patch_sizes_are_padded_so_that_patches_are_centred(ratio: int, padding: int) -> None:
    config = small(feature_ratio=ratio)
    assert config.patch_padding == padding
    assert ViT(config)(images()).shape == (2, 32, 6 * ratio, 4 * ratio)


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"feature_ratio": 2, "patch_padding": 1}, "patch_padding 1 gives fewer than 12 x 8 tokens: at least 2"),
        ({"feature_ratio": 2, "patch_padding": 4}, "patch_padding 4 must be below half of patch_size 8"),
        ({"feature_ratio": 4, "patch_size": 2}, "patch_size 2 is not a multiple of feature_ratio 4"),
        ({"positions": "fixed", "width": 6}, "width 6 is not a multiple of 4"),
    ],
)
def test_a_patch_convolution_that_misses_the_grid_is_refused(values: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        small(**values)


def test_an_autoencoder_takes_no_overlapping_patches_windows_or_convolutions() -> None:
    for values in ({"feature_ratio": 2}, {"attention": {"window": (2, 2)}}, {"parallel_convolution": True}):
        with pytest.raises(ValidationError, match=f"leave out backbone.{next(iter(values))}"):
            MAEConfig(backbone={"size": "micro", "image_size": (64, 48), **values}, decoder_width=16, decoder_heads=2)


def test_fixed_positions_are_sines_that_do_not_learn() -> None:
    model = build(positions="fixed")
    assert torch.equal(model.pos_embed, sincos_positions(32, (6, 4))[:, 1:])
    assert not model.pos_embed.requires_grad
    assert model.state_dict().keys() == build().state_dict().keys()


def test_padding_two_moves_patches_by_two_pixels() -> None:
    torch.manual_seed(0)
    model = build()
    x = images()
    shifted = nn.functional.pad(x, (2, 0, 2, 0))[:, :, :48, :32]
    unpadded = build(patch_padding=0)
    unpadded.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.patch_embed(x), unpadded.patch_embed(shifted), rtol=1e-5, atol=1e-5)


def test_a_patch_embeds_the_same_cut_out_as_convolved() -> None:
    model = build(patch_padding=0)
    torch.testing.assert_close(
        model.patch_embed.proj(patchify(images(), 8)), model.patch_embed(images()), rtol=1e-5, atol=1e-6
    )


def test_an_extra_token_changes_the_features_but_not_their_shape() -> None:
    model = build().eval()
    token = torch.randn(1, 2, 32)
    plain, extended = model(images()), model(images(), token)
    assert extended.shape == plain.shape == (2, 32, 6, 4)
    assert (extended - plain).abs().max() > 1e-4
    torch.testing.assert_close(model(images(), token.expand(2, -1, -1)), extended)


def test_extra_tokens_stand_at_the_end_without_a_position() -> None:
    model = build().eval()
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    token = torch.randn(1, 2, 32)
    model(images(), token)
    assert seen[0].shape == (2, 24 + 2, 32)
    assert torch.equal(seen[0][:, 24:], token.expand(2, -1, -1))
    assert torch.equal(seen[0][:, :24], model.patch_embed(images()) + model.pos_embed)


def test_features_lie_where_their_patches_are() -> None:
    model = build(patch_padding=0, depth=1).eval()
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    changed = images()
    changed[:, :, 40:48, 8:16] += 1
    moved = (model(changed) - model(images())).abs().sum(dim=(0, 1)) > 0
    assert moved.nonzero().tolist() == [[5, 1]]


def test_drop_path_grows_linearly_from_zero() -> None:
    model = build(depth=4, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in model.blocks] == rates


def test_gradient_checkpointing_changes_no_number() -> None:
    results = []
    for checkpointing in (False, True):
        model = build(drop_path=0.5, depth=3, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        out = model(images(4))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_initial_weights_follow_the_published_rules() -> None:
    model = build(width=64, heads=2)
    linear = model.blocks[0].mlp.fc1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.last_norm.weight, torch.ones(64)) and model.last_norm.eps == 1e-6


def test_a_model_from_the_meta_device_is_whole_after_initialisation() -> None:
    with torch.device("meta"):
        model = ViT(small(drop_path=0.2))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    expected = build(drop_path=0.2)
    torch.manual_seed(0)
    expected.init_weights()
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_another_image_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(DataError, match=r"\(2, 3, 32, 48\).*\(B, 3, 48, 32\)"):
        build()(torch.zeros(2, 3, 32, 48))


def test_interpolating_positions_to_the_same_grid_is_the_identity() -> None:
    positions = torch.randn(1, 24, 8)
    assert torch.equal(interpolate_positions(positions, (6, 4), (6, 4)), positions)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, which torch (and OpenCV) use."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resample(values: list[float], size: int) -> list[float]:
    """Bicubic along one axis, pixel centres at one half, edges repeated."""
    length = len(values)
    result = []
    for i in range(size):
        place = (i + 0.5) * length / size - 0.5
        near = [math.floor(place) + offset for offset in (-1, 0, 1, 2)]
        result.append(sum(cubic(place - j) * values[min(max(j, 0), length - 1)] for j in near))
    return result


def test_interpolated_positions_equal_the_bicubic_formula_on_rows_and_on_columns() -> None:
    wave = [math.sin(0.7 * i) for i in range(14)]
    line = torch.tensor(wave)
    picture = torch.stack([line.reshape(14, 1).expand(14, 14), line.reshape(1, 14).expand(14, 14)], dim=-1)
    resized = interpolate_positions(picture.reshape(1, 196, 2), (14, 14), (16, 12)).reshape(16, 12, 2)
    for column in (0, 11):
        assert resized[:, column, 0].tolist() == pytest.approx(resample(wave, 16), abs=1e-5)
    for row in (0, 15):
        assert resized[row, :, 1].tolist() == pytest.approx(resample(wave, 12), abs=1e-5)


def test_positions_of_another_grid_than_said_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 197, 8\)"):
        interpolate_positions(torch.zeros(1, 197, 8), (14, 14), (16, 12))
