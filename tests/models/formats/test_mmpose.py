"""Files in the exact layout of mmpose 1.x, against the forward of mmpretrain's VisionTransformer, written down here."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.formats import mmpose
from pipeline.models.formats.pose import Wanted
from tests.models.formats.models import (
    CLASSIC,
    SIMPLE,
    built,
    heatmap_error,
    images,
    keypoint_error,
    outgoing_of,
    same,
    spec_of,
)


def forward(config: dict[str, Any], state: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """What an mmpose 1.x model of this config section computes: heatmaps (B, K, h, w) of normalised images."""
    backbone, head = config["backbone"], config["head"]
    arch, patch = backbone["arch"], backbone["patch_size"]
    heads, width = arch["num_heads"], arch["embed_dims"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    name = "backbone.patch_embed.projection"
    x = F.conv2d(pictures, state[f"{name}.weight"], state[f"{name}.bias"], patch, backbone["patch_cfg"]["padding"])
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    if backbone["with_cls_token"]:
        x = torch.cat([state["backbone.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + state["backbone.pos_embed"]
    for index in range(arch["num_layers"]):
        layer = f"backbone.layers.{index}"
        q, k, v = (
            linear(norm(x, f"{layer}.ln1"), f"{layer}.attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{layer}.ln2"), f"{layer}.ffn.layers.0.0"))
        x = x + linear(hidden, f"{layer}.ffn.layers.1")
    x = norm(x, "backbone.ln1")[:, int(backbone["with_cls_token"]) :]
    x = x.reshape(len(x), rows, columns, width).permute(0, 3, 1, 2)
    if "neck" in config:
        x = F.interpolate(F.relu(x), scale_factor=config["neck"]["scale_factor"], mode="bilinear", align_corners=False)
    for index in range(len(head["deconv_out_channels"])):
        x = F.conv_transpose2d(x, state[f"head.deconv_layers.{3 * index}.weight"], None, 2, 1)
        layer = f"head.deconv_layers.{3 * index + 1}"
        mean, variance = state[f"{layer}.running_mean"], state[f"{layer}.running_var"]
        x = F.relu(F.batch_norm(x, mean, variance, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    padding = head.get("final_layer", {"padding": 0})["padding"]
    return F.conv2d(x, state["head.final_layer.weight"], state["head.final_layer.bias"], padding=padding)


CASES = [(CLASSIC, 0), (SIMPLE, 0), (CLASSIC, 1), (SIMPLE, 1), ({"deconv_layers": 1, "filters": 16}, 1)]


@pytest.mark.parametrize(("decoder", "tokens"), CASES)
@torch.no_grad()
def test_an_exported_model_computes_the_same_and_comes_back_bit_for_bit(
    tmp_path: Path, decoder: dict[str, Any], tokens: int
) -> None:
    """A student's knowledge token included, as their class token."""
    outgoing, model = outgoing_of(spec_of(decoder, tokens=tokens))
    mmpose.write(outgoing, tmp_path)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    section = runpy.run_path(str(tmp_path / "model.py"))["model"]
    assert section["backbone"]["with_cls_token"] == bool(tokens) and section["backbone"]["out_type"] == "featmap"
    expected = forward(section, content["state_dict"], images())
    ours = model(images())["coco"]
    assert heatmap_error(ours, expected) < 1e-5
    assert keypoint_error(ours, expected, outgoing.spec.codec) < 0.01
    back = mmpose.read(tmp_path / "model.pth", Wanted(heads=4))
    assert same(back.tensors, model.state_dict()) and not back.dropped
    assert back.spec.config.knowledge_tokens == tokens
    assert heatmap_error(built(back)(images())["coco"], expected) < 1e-5


def test_the_token_makes_a_difference() -> None:
    outgoing, model = outgoing_of(spec_of(CLASSIC, tokens=1))
    before = model(images())["coco"]
    assert model.knowledge_token is not None
    model.knowledge_token.zero_()
    assert heatmap_error(model(images())["coco"], before.detach()) > 1e-3


def file_of(tmp_path: Path, **changes: Any) -> Path:
    mmpose.write(outgoing_of(spec_of(CLASSIC))[0], tmp_path)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    state = {name: value for name, value in {**content["state_dict"], **changes}.items() if value is not None}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_file_of_theirs_with_its_normalisation_and_older_names(tmp_path: Path) -> None:
    """`norm1` was `ln1`; mean and deviation are ours on a scale of 255, and dropped."""
    state = torch.load(file_of(tmp_path), weights_only=True)["state_dict"]
    older = {f"backbone.norm1.{part}": state[f"backbone.ln1.{part}"] for part in ("weight", "bias")}
    newer = {f"backbone.ln1.{part}": None for part in ("weight", "bias")}
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    preprocessing = {"data_preprocessor.mean": mean.view(3, 1, 1), "data_preprocessor.std": std.view(3, 1, 1)}
    found = mmpose.read(file_of(tmp_path, **older, **newer, **preprocessing), Wanted(heads=4))
    assert found.dropped.keys() == preprocessing.keys()
    assert same(found.tensors, mmpose.read(tmp_path / "model.pth", Wanted(heads=4)).tensors)
    with pytest.raises(ArtifactError, match=r"data_preprocessor\.mean is \[0\.0, 0\.0, 0\.0\]; models here take"):
        mmpose.read(file_of(tmp_path, **{"data_preprocessor.mean": torch.zeros(3, 1, 1)}), Wanted(heads=4))
    with pytest.raises(ArtifactError, match=r"backbone\.\w+1\.weight is there twice"):
        mmpose.read(file_of(tmp_path, **older), Wanted(heads=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.layers.1.ffn.layers.0.0.bias": None}, r"missing backbone\.layers\.1\.ffn\.layers\.0\.0\.bias"),
        ({"backbone.ln1.weight": None}, r"missing backbone\.ln1\.weight"),
        ({"head.deconv_layers.1.running_mean": None}, r"missing head\.deconv_layers\.1\.running_mean"),
        ({"head.conv_layers.0.weight": torch.ones(1)}, r"surplus head\.conv_layers\.0\.weight"),
        (
            {"backbone.layers.0.attn.gamma1.weight": torch.ones(48)},
            r"surplus backbone\.layers\.0\.attn\.gamma1\.weight",
        ),
        ({"backbone.cls_token": torch.zeros(1, 1, 48)}, "holds the positions of 11 patches"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        mmpose.read(file_of(tmp_path, **changes), Wanted(heads=4))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"decoder": CLASSIC, "tokens": 2}, r"model\.knowledge_tokens is 2; mmpose has room for 1"),
        ({"decoder": CLASSIC, "patch_padding": 0}, r"model\.backbone\.patch_padding is 0; mmpose has 2"),
        ({"decoder": CLASSIC, "datasets": ("coco", "aic")}, "takes one decoder; name one"),
    ],
)
def test_what_their_model_can_not_hold_is_refused_by_name(
    tmp_path: Path, described: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        mmpose.write(outgoing_of(spec_of(**described))[0], tmp_path)
    assert not list(tmp_path.iterdir())
