"""The official MAE's files: the encoder by name and shape, the decoder left behind, patches of 14 padded."""

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
from pipeline.models.mae import MAE

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
