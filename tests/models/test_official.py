"""Others' checkpoint files: read by name and shape, never executed."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.models.config import MAEConfig
from pipeline.models.mae import MAE
from pipeline.models.official import read_checkpoint, read_mae

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


def test_a_file_like_the_published_ones_loads_by_name(tmp_path: Path) -> None:
    state = weights()
    content = {"model": state, "optimizer": {"step": 1}, "epoch": 799, "args": argparse.Namespace(lr=1e-3, mask=0.75)}
    tensors, dropped = read_mae(pth(tmp_path / "mae.pth", content), config())
    assert tensors.keys() == {name for name in state if not name.startswith(DECODER)}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)
    assert dropped == sorted(name for name in state if name.startswith(DECODER)) and "mask_token" in dropped


def test_an_encoder_alone_loads_and_drops_nothing(tmp_path: Path) -> None:
    state = weights(decoder=False)
    save_file(state, tmp_path / "mae.safetensors")
    tensors, dropped = read_mae(tmp_path / "mae.safetensors", config())
    assert tensors.keys() == state.keys() and dropped == []


def test_weights_come_out_in_float32(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in weights().items()}
    tensors, _ = read_mae(pth(tmp_path / "mae.pth", {"model": half}), config())
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("wrapped", [{"model": "x"}, {"state_dict": "x"}, {"module": "x"}, {"model": {"module": "x"}}])
def test_state_dicts_are_unwrapped(tmp_path: Path, wrapped: dict[str, Any]) -> None:
    def put(value: Any) -> Any:
        return {key: put(inner) for key, inner in value.items()} if isinstance(value, dict) else {"a": torch.ones(2)}

    assert torch.equal(read_checkpoint(pth(tmp_path / "x.pth", put(wrapped)))["a"], torch.ones(2))


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.fault(24)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    content = {"model": weights(), "args": Evil(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match=r"evil\.pth: refused"):
        read_mae(path, config())
    assert not canary.exists()


@pytest.mark.fault(24)
def test_a_plain_pickle_with_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(canary), protocol=2))
    with pytest.raises(ArtifactError, match="refused"):
        read_checkpoint(path)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists(), "the file was not dangerous at all"


@pytest.mark.fault(24)
@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80\x02", b"PK\x03\x04", b"\x80\x02l.", b"\x00" * 64])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_garbage_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: ") as caught:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(24)
def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = pth(tmp_path / "x.pth", {"model": {"a": torch.ones(4)}})
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, torch.ones(2), {"a": torch.ones(1), "b": "text"}])
def test_anything_but_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ArtifactError, match="holds no state dict"):
        read_checkpoint(pth(tmp_path / "x.pth", content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_checkpoint(tmp_path / "none.pth")


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = weights()
    del state["norm.bias"]
    state["head.weight"] = torch.ones(10, 32)
    state["blocks.0.attn.qkv.weight"] = torch.ones(96, 31)
    with pytest.raises(ArtifactError) as caught:
        read_mae(pth(tmp_path / "x.pth", {"model": state}), config())
    message = str(caught.value)
    assert "missing norm.bias" in message and "surplus head.weight" in message
    assert "blocks.0.attn.qkv.weight (96, 31) instead of (96, 32)" in message and "(3 in all)" in message


def test_positions_of_another_grid_are_refused(tmp_path: Path) -> None:
    state = weights() | {"pos_embed": torch.ones(1, 50, 32)}
    with pytest.raises(ArtifactError, match=r"pos_embed \(1, 50, 32\) instead of \(1, 17, 32\)"):
        read_mae(pth(tmp_path / "x.pth", state), config())


def test_a_patch_of_14_gets_zeros_on_all_sides(tmp_path: Path) -> None:
    state = weights(patch=14)
    tensors, _ = read_mae(pth(tmp_path / "x.pth", {"model": state}), config(patch=16))
    weight = tensors["patch_embed.proj.weight"]
    assert weight.shape == (32, 3, 16, 16)
    assert torch.equal(weight[..., 1:15, 1:15], state["patch_embed.proj.weight"])
    for edge in (weight[..., 0, :], weight[..., -1, :], weight[..., :, 0], weight[..., :, -1]):
        assert edge.abs().max() == 0


def test_a_patch_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"patch_embed\.proj\.weight \(32, 3, 16, 16\) instead of \(32, 3, 14, 14\)"
    ):
        read_mae(pth(tmp_path / "x.pth", {"model": weights(patch=16)}), config(patch=14))
