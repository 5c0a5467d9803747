import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ArtifactError, DataError
from pipeline.models.config import MAEConfig
from pipeline.models.mae import MAE, backbone_state, describe, patchify, sincos_positions, unpatchify
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig

GRID, PATCHES, PATCH = (6, 4), 24, 8


def build(**values: object) -> MAE:
    backbone = {"size": "micro", "image_size": (48, 32), "patch_size": PATCH}
    backbone |= values.pop("backbone", {})  # type: ignore[arg-type]
    defaults = {"decoder_width": 24, "decoder_depth": 2, "decoder_heads": 3}
    torch.manual_seed(0)
    model = MAE(MAEConfig.model_validate({"backbone": backbone, **defaults, **values}))
    model.init_weights()
    return model


def batch(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, 3, 48, 32, generator=generator), torch.rand(size, PATCHES, generator=generator)


def textbook(model: MAE, images: Tensor, noise: Tensor, ratio: float, norm_pixels: bool) -> tuple[Tensor, Tensor]:
    """The paper's algorithm step by step: embed all, shuffle, encode, unshuffle, decode, predict all, mask the loss.

    Returns the loss of each sample and the mask (1 is hidden)."""
    tokens = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    keep = int(PATCHES * (1 - ratio))
    kept = torch.gather(tokens, 1, shuffle[:, :keep, None].repeat(1, 1, tokens.shape[2]))
    mask = torch.ones(len(images), PATCHES)
    mask[:, :keep] = 0
    mask = torch.gather(mask, 1, restore)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).repeat(len(images), 1, 1), kept], dim=1)
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x))
    hidden = model.mask_token.repeat(len(images), PATCHES - keep, 1)
    y = torch.cat([x[:, 1:], hidden], dim=1)
    y = torch.gather(y, 1, restore[:, :, None].repeat(1, 1, y.shape[2]))
    y = torch.cat([x[:, :1], y], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    prediction = model.decoder_pred(model.decoder_norm(y))[:, 1:]
    cut = images.reshape(len(images), 3, GRID[0], PATCH, GRID[1], PATCH)
    target = torch.einsum("nchpwq->nhwpqc", cut).reshape(len(images), PATCHES, -1)
    if norm_pixels:
        mean = target.mean(-1, keepdim=True)
        variance = ((target - mean) ** 2).sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    error = ((prediction - target) ** 2).mean(-1)
    return (error * mask).sum(1) / mask.sum(1), mask


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("ratio", [0.75, 0.4])
def test_loss_and_gradients_equal_the_textbook_algorithm(ratio: float, norm_pixels: bool) -> None:
    model = build(mask_ratio=ratio, norm_pixels=norm_pixels)
    images, noise = batch()
    per_sample, _ = textbook(model, images, noise, ratio, norm_pixels)
    expected = torch.autograd.grad(per_sample.mean(), list(model.parameters()))
    loss, _ = model(images, noise)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(per_sample.mean().item(), rel=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-5)


def test_weights_count_in_the_sum_but_not_in_the_denominator() -> None:
    model = build()
    images, noise = batch()
    per_sample, _ = textbook(model, images, noise, 0.75, True)
    loss, _ = model(images, noise, torch.tensor([1.0, 0.0, 0.5]))
    assert loss.item() == pytest.approx((per_sample[0] + 0.5 * per_sample[2]).item() / 3, rel=1e-5)


def test_the_smallest_noise_stays_visible() -> None:
    model = build()
    images, noise = batch()
    _, said = model(images, noise)
    _, mask = textbook(model, images, noise, 0.75, True)
    assert said["masked"].shape == (3, 18) and said["predictions"].shape == (3, 18, PATCH * PATCH * 3)
    assert torch.equal(said["masked"].sort(dim=1).values, mask.nonzero()[:, 1].reshape(3, 18))
    visible = noise.scatter(1, said["masked"], torch.inf)
    hidden = noise.gather(1, said["masked"])
    assert (visible.masked_fill(visible.isinf(), 0).amax(1) < hidden.amin(1)).all()


def test_no_gather_or_scatter_has_a_backward_pass() -> None:
    loss, _ = build()(*batch())
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert any("AddmmBackward" in name for name in names)
    assert not [name for name in names if any(word in name for word in ("Gather", "Scatter", "Index", "Take"))]


def test_masked_pixels_do_not_reach_the_encoder() -> None:
    model = build()
    images, noise = batch()
    _, said = model(images, noise)
    patches = patchify(images, PATCH)
    other = patches.scatter(1, said["masked"][:, :, None].expand(-1, -1, PATCH * PATCH * 3), 9.0)
    _, again = model(unpatchify(other, PATCH, GRID), noise)
    assert torch.equal(said["predictions"], again["predictions"])


def test_a_reconstruction_keeps_visible_patches_and_paints_the_rest() -> None:
    model = build()
    images, noise = batch()
    with torch.no_grad():
        _, said = model(images, noise)
    patches = patchify(images, PATCH)
    painted = patchify(model.reconstruct(images, noise), PATCH)
    for sample in range(3):
        masked = said["masked"][sample].tolist()
        visible = [row for row in range(PATCHES) if row not in masked]
        assert torch.equal(painted[sample, visible], patches[sample, visible])
        truth = patches[sample, masked[0]]
        expected = said["predictions"][sample, 0] * (truth.var() + 1e-6).sqrt() + truth.mean()
        torch.testing.assert_close(painted[sample, masked[0]], expected)
    assert model.reconstruct(images, noise).shape == images.shape


def test_patches_are_cut_row_by_row_with_channels_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    corner = [images[1, channel, 2 + p, 4 + q].item() for p in range(2) for q in range(2) for channel in range(3)]
    assert patches[1, 5].tolist() == corner
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


def test_positions_follow_the_formula_on_a_rectangle() -> None:
    width, grid = 16, (3, 5)
    positions = sincos_positions(width, grid)
    assert positions.shape == (1, 1 + 15, width) and positions.dtype == torch.float32
    assert not positions[0, 0].any()
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[0, 1 + row * grid[1] + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_are_saved_buffers_that_no_optimizer_sees() -> None:
    model = build()
    state = model.state_dict()
    assert torch.equal(state["pos_embed"], sincos_positions(32, GRID))
    assert torch.equal(state["decoder_pos_embed"], sincos_positions(24, GRID))
    assert not {"pos_embed", "decoder_pos_embed"} & set(dict(model.named_parameters()))


def test_gradient_checkpointing_changes_no_number() -> None:
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = build(backbone={"gradient_checkpointing": checkpointing})
        loss, _ = model(*batch())
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_default_model_has_the_tensors_of_the_public_one() -> None:
    config = MAEConfig.model_validate({"backbone": {"size": "B", "image_size": (224, 224)}})
    with torch.device("meta"):
        state = MAE(config).state_dict()
    assert len(state) == 254
    assert state["pos_embed"].shape == (1, 197, 768) and state["decoder_pred.weight"].shape == (768, 512)
    assert state["decoder_blocks.7.mlp.fc1.weight"].shape == (2048, 512)


def test_a_backbone_takes_over_what_the_encoder_learned() -> None:
    model = build()
    torch.nn.init.normal_(model.norm.weight)
    state, dropped = backbone_state(model.state_dict(), keep_norm=True)
    vit = ViT(ViTConfig(size="micro", image_size=(48, 32), patch_size=PATCH, patch_padding=0))
    vit.load_state_dict(state, strict=True)
    assert {"cls_token", "mask_token", "decoder_pos_embed", "decoder_embed.weight"} <= set(dropped)
    images, _ = batch()
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    for block in model.blocks:
        x = block(x)
    expected = model.norm(x).transpose(1, 2).reshape(3, 32, *GRID)
    torch.testing.assert_close(vit(images), expected)


def test_the_last_norm_starts_fresh_by_default_and_is_named_as_dropped() -> None:
    state, dropped = backbone_state(build().state_dict())
    assert not any("norm." in name and not name.startswith("blocks.") for name in state)
    assert "norm.weight" in dropped and "norm.bias" in dropped and dropped == sorted(dropped)


def test_the_position_of_a_class_token_is_folded_into_the_patches() -> None:
    positions = torch.randn(1, 25, 32)
    state, _ = backbone_state({"pos_embed": positions, "cls_token": torch.zeros(1, 1, 32)})
    torch.testing.assert_close(state["pos_embed"], positions[:, 1:] + positions[:, :1])


def test_a_state_dict_of_something_else_is_refused() -> None:
    with pytest.raises(ArtifactError, match="'head.weight' is no tensor of an MAE"):
        backbone_state({"pos_embed": torch.zeros(1, 25, 32), "head.weight": torch.zeros(2)})
    with pytest.raises(ArtifactError, match="no pos_embed"):
        backbone_state({"norm.weight": torch.ones(32)})


def test_another_image_size_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(B, 3, 48, 32\)"):
        build()(torch.zeros(1, 3, 32, 48), torch.zeros(1, PATCHES))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": {"size": "B", "patch_padding": 2}}, "patch_padding 0"),
        ({"backbone": {"size": "B", "drop_path": 0.1}}, "drop_path 0"),
        ({"backbone": {"size": "B"}, "decoder_heads": 7}, "not divisible by heads 7"),
        ({"backbone": {"size": "B"}, "decoder_width": 18, "decoder_heads": 2}, "multiple of 4"),
        ({"backbone": {"size": "B"}, "mask_ratio": 0.999}, "leaves none of 192 patches"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(values: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MAEConfig.model_validate(values)


def test_the_configuration_survives_a_round_trip() -> None:
    config = MAEConfig.model_validate({"backbone": {"size": "B"}})
    assert config.backbone.patch_padding == 0 and config.visible == 48
    assert MAEConfig.model_validate_json(config.model_dump_json()) == config


def test_a_model_from_the_meta_device_is_whole_after_initialisation() -> None:
    expected = build()
    with torch.device("meta"):
        model = MAE(expected.config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for each in (model, expected):
        torch.manual_seed(1)
        each.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_describe_splits_encoder_and_decoder() -> None:
    counts = describe(MAEConfig.model_validate({"backbone": {"size": "B"}}))
    assert counts["total"] == counts["encoder"] + counts["decoder"]
    assert counts["encoder"] / 1e6 == pytest.approx(85.65, abs=0.05)
