"""The official MAE's files: the encoder by name and shape, the decoder left behind, patches of 14 padded; and the same
weights under mmpretrain's names."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import MAEConfig
from pipeline.models.formats import mae
from pipeline.models.formats.pose import Imported, Wanted
from pipeline.models.mae import MAE, backbone_state
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig
from tests.models.formats.models import images, randomise, same

DECODER = ("decoder_", "mask_token")


def config(patch: int = 8) -> MAEConfig:
    side = 4 * patch
    backbone = {"size": "micro", "image_size": [side, side], "patch_size": patch}
    return MAEConfig.model_validate({"backbone": backbone, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})


def weights(patch: int = 8, decoder: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MAE(config(patch))
    model.init_weights()
    return {name: value for name, value in model.state_dict().items() if decoder or not name.startswith(DECODER)}


def pth(path: Path, state: Any) -> Path:
    torch.save(state, path)
    return path


def read(path: Path, patch: int = 8) -> Imported:
    return mae.read(path, Wanted(model=config(patch)))


def test_a_file_like_the_published_ones_loads_by_name(tmp_path: Path) -> None:
    state = weights()
    content = {"model": state, "optimizer": {"step": 1}, "epoch": 799, "args": argparse.Namespace(lr=1e-3, mask=0.75)}
    found = read(pth(tmp_path / "mae.pth", content))
    tensors, dropped = found.tensors, sorted(found.dropped)
    assert tensors.keys() == {name for name in state if not name.startswith(DECODER)}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
    assert dropped == sorted(name for name in state if name.startswith(DECODER)) and "mask_token" in dropped


def test_an_encoder_alone_loads_and_drops_nothing(tmp_path: Path) -> None:
    state = weights(decoder=False)
    save_file(state, tmp_path / "mae.safetensors")
    found = read(tmp_path / "mae.safetensors")
    assert found.tensors.keys() == state.keys() and found.dropped == {}


def test_weights_come_out_in_float32(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in weights().items()}
    tensors = read(pth(tmp_path / "mae.pth", {"model": half})).tensors
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = weights()
    del state["norm.bias"]
    state["head.weight"] = torch.ones(10, 32)
    state["blocks.0.attn.qkv.weight"] = torch.ones(96, 31)
    with pytest.raises(ArtifactError) as caught:
        read(pth(tmp_path / "x.pth", {"model": state}))
    message = str(caught.value)
    assert "missing norm.bias" in message and "surplus head.weight" in message
    assert "blocks.0.attn.qkv.weight (96, 31) instead of (96, 32)" in message and "(3 in all)" in message


def test_positions_of_another_grid_are_refused(tmp_path: Path) -> None:
    state = weights() | {"pos_embed": torch.ones(1, 50, 32)}
    with pytest.raises(ArtifactError, match=r"pos_embed \(1, 50, 32\) instead of \(1, 17, 32\)"):
        read(pth(tmp_path / "x.pth", state))


def test_a_patch_of_14_gets_zeros_on_all_sides(tmp_path: Path) -> None:
    state = weights(patch=14)
    tensors = read(pth(tmp_path / "x.pth", {"model": state}), patch=16).tensors
    weight = tensors["patch_embed.proj.weight"]
    assert weight.shape == (32, 3, 16, 16)
    assert torch.equal(weight[..., 1:15, 1:15], state["patch_embed.proj.weight"])
    for edge in (weight[..., 0, :], weight[..., -1, :], weight[..., :, 0], weight[..., :, -1]):
        assert edge.abs().max() == 0


def test_a_patch_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"patch_embed\.proj\.weight \(32, 3, 16, 16\) instead of \(32, 3, 14, 14\)"
    ):
        read(pth(tmp_path / "x.pth", {"model": weights(patch=16)}), patch=14)


def test_the_configuration_is_told_by_the_shapes(tmp_path: Path) -> None:
    """Without one: width, depth and grid as they are, heads by the named size, patches of 14 as patches of 16."""
    for patch, padded in ((8, 8), (14, 16)):
        found = mae.read(pth(tmp_path / "x.pth", {"model": weights(patch)}), Wanted())
        expected = config(padded).backbone.model_dump(exclude={"size"})
        assert found.spec.encoder_only and found.spec.config.backbone.model_dump(exclude={"size"}) == expected
        assert any("padded with zeros to 16" in line for line in found.changes) == (patch == 14)
        assert any("norm.* is the encoder's own" in line for line in found.changes)


def test_a_grid_that_is_no_square_needs_the_input_size(tmp_path: Path) -> None:
    state = weights(decoder=False) | {"pos_embed": torch.ones(1, 1 + 10, 32)}
    path = pth(tmp_path / "x.pth", state)
    with pytest.raises(ArtifactError, match=r"x\.pth: pos_embed holds the positions of 10 patches"):
        mae.read(path, Wanted())
    assert mae.read(path, Wanted(input_size=(40, 16))).spec.config.backbone.grid == (5, 2)
    with pytest.raises(ArtifactError, match=r"an input of 32x32 with patches of 8 has 4 x 4"):
        mae.read(path, Wanted(input_size=(32, 32)))


def test_heads_of_no_named_size_are_asked_for(tmp_path: Path) -> None:
    state = {name: value for name, value in weights(decoder=False).items() if not name.startswith("blocks.1.")}
    path = pth(tmp_path / "x.pth", state)
    with pytest.raises(ConfigError, match="give --heads"):
        mae.read(path, Wanted())
    assert mae.read(path, Wanted(heads=4)).spec.config.backbone.heads == 4


def mmpretrain(
    token: bool, slot: bool, norm: str = "ln1", size: tuple[int, int] = (32, 32)
) -> tuple[ViT, dict[str, Tensor]]:
    """A ViT whose every tensor is random, and a file of it as mmpretrain's VisionTransformer names and keeps it."""
    model = randomise(
        ViT(ViTConfig.model_validate({"size": "micro", "image_size": size, "patch_size": 8, "patch_padding": 0}))
    )
    ours = model.state_dict()
    state = {
        "pos_embed": ours["pos_embed"],
        "patch_embed.projection.weight": ours["patch_embed.proj.weight"],
        "patch_embed.projection.bias": ours["patch_embed.proj.bias"],
    }
    names = {"norm1": "ln1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "ln2"}
    names |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    for part in ("weight", "bias"):
        for index in range(2):
            state |= {
                f"layers.{index}.{its}.{part}": ours[f"blocks.{index}.{name}.{part}"] for name, its in names.items()
            }
        state[f"{norm}.{part}"] = ours[f"last_norm.{part}"]
    if slot:
        state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 5.0), ours["pos_embed"]], dim=1)
    if token:
        state["cls_token"] = torch.full((1, 1, 32), 3.0)
    return model, state


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(("token", "slot"), [(True, True), (False, True), (False, False)])
@torch.no_grad()
def test_mmpretrains_names_give_the_model_that_the_file_was_made_from(
    tmp_path: Path, token: bool, slot: bool, described: bool
) -> None:
    """Bit for bit; the class token's position, 5 here, is added to no patch: mmpretrain drops it."""
    model, state = mmpretrain(token, slot)
    found = mae.read(pth(tmp_path / "x.pth", {"state_dict": state}), Wanted(model=config() if described else None))
    assert found.dropped == {} and found.tensors.keys() == weights(decoder=False).keys()
    taken, _ = backbone_state(found.tensors, keep_norm=True)
    assert same(taken, model.state_dict())
    again = ViT(model.config)
    again.load_state_dict(taken)
    pictures = images(size=(32, 32))
    assert torch.equal(again.eval()(pictures), model(pictures))
    assert torch.equal(found.tensors["cls_token"], torch.full((1, 1, 32), 3.0 if token else 0.0))
    assert any("class token's position was set to zero" in line for line in found.changes) == slot
    assert any("cls_token: the model has none" in line for line in found.changes) == (not token)


def test_positions_without_a_class_token_are_counted(tmp_path: Path) -> None:
    """As the input size says, where it is given: 48 and 1 are a slot and 8 x 6 patches, or 7 x 7 patches."""
    upright, square = (
        mmpretrain(token=False, slot=slot, size=size)[1] for slot, size in ((True, (64, 48)), (False, (56, 56)))
    )
    assert upright["pos_embed"].shape == square["pos_embed"].shape == (1, 49, 32)
    for state, size in ((upright, (64, 48)), (square, (56, 56))):
        path = pth(tmp_path / "x.pth", state)
        found = mae.read(path, Wanted(input_size=size))
        assert (
            found.spec.config.backbone.image_size == size
            and found.tensors["pos_embed"].shape[1] == 1 + size[0] * size[1] // 64
        )
        assert mae.read(path, Wanted()).spec.config.backbone.image_size == (56, 56)


def test_mmpretrains_older_name_of_the_last_norm(tmp_path: Path) -> None:
    newer, older = (mmpretrain(token=True, slot=True, norm=norm)[1] for norm in ("ln1", "norm1"))
    found = [read(pth(tmp_path / "x.pth", state)).tensors for state in (newer, older)]
    assert same(*found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln1.bias": None}, r"missing ln1\.bias"),
        ({"layers.1.ffn.layers.1.weight": None}, r"missing layers\.1\.ffn\.layers\.1\.weight"),
        ({"layers.0.gamma": torch.ones(32)}, r"surplus layers\.0\.gamma"),
        ({"blocks.0.norm1.weight": torch.ones(32)}, r"surplus blocks\.0\.norm1\.weight"),
        ({"layers.0.ln2.weight": torch.ones(31)}, r"layers\.0\.ln2\.weight \(31,\) instead of \(32,\)"),
        ({"pos_embed": torch.ones(1, 18, 32)}, r"pos_embed \(1, 19, 32\) instead of \(1, 17, 32\)"),
        ({"pos_embed": torch.ones(17)}, r"pos_embed \(17,\) instead of \(1, 17, 32\)"),
        (
            {"patch_embed.projection.weight": None},
            r"neither patch_embed\.proj\.weight \(facebookresearch/mae\) nor patch_embed\.projection\.weight \(mmpretrain\)",
        ),
    ],
)
def test_what_does_not_fit_is_called_by_mmpretrains_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    state = {**mmpretrain(token=False, slot=False)[1], **changes}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ArtifactError, match=message):
        read(pth(tmp_path / "x.pth", state))
