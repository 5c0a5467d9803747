"""timm's own VisionTransformer as the reference: its features out of our backbone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.formats import timm
from pipeline.models.formats.pose import Imported, Wanted
from pipeline.models.mae import backbone_state
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig
from tests.models.formats.models import heatmap_error, images, randomise


def theirs(**changes: Any) -> VisionTransformer:
    shape = {"img_size": (64, 48), "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10}
    return randomise(VisionTransformer(**{**shape, **changes}))


def read(path: Path, model: VisionTransformer, **wanted: Any) -> Imported:
    torch.save(model.state_dict(), path / "timm.pth")
    return timm.read(path / "timm.pth", Wanted(**{"heads": 4, **wanted}))


@torch.no_grad()
def test_the_backbone_gives_their_features(tmp_path: Path) -> None:
    """A model without a class token is the same function; its last norm is kept for the comparison."""
    model = theirs(class_token=False, global_pool="avg", fc_norm=False)
    found = read(tmp_path, model)
    assert found.dropped.keys() == {"head.weight", "head.bias"}
    backbone = ViT(ViTConfig.model_validate(found.spec.config.backbone.model_dump(exclude={"size"})))
    backbone.load_state_dict(backbone_state(found.tensors, keep_norm=True)[0])
    ours = backbone.eval()(images()).flatten(2).transpose(1, 2)
    assert heatmap_error(ours, model.forward_features(images())) < 1e-5


def test_the_class_tokens_position_stays_its_own(tmp_path: Path) -> None:
    model = theirs()
    found = read(tmp_path, model)
    taken, dropped = backbone_state(found.tensors)
    assert torch.equal(taken["pos_embed"], model.pos_embed[:, 1:])
    assert torch.equal(found.tensors["cls_token"], model.cls_token) and "cls_token" in dropped
    assert any("no patch has it in timm" in line for line in found.changes)


def test_a_width_of_384_needs_its_heads(tmp_path: Path) -> None:
    small = theirs(embed_dim=384, depth=1, num_heads=6)
    with pytest.raises(ConfigError, match="small ViTs have 6 heads, MAE's and ViTPose's S has 12"):
        read(tmp_path, small, heads=None)
    assert read(tmp_path, small, heads=6).spec.config.backbone.heads == 6


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"init_values": 1e-5}, r"surplus blocks\.0\.ls1\.gamma"),
        ({"qk_norm": True}, r"surplus blocks\.0\.attn\.k_norm\.bias"),
        ({"qkv_bias": False}, r"missing blocks\.0\.attn\.qkv\.bias"),
        ({"reg_tokens": 2}, "no 4:3 or square grid|surplus reg_token"),
        ({"global_pool": "avg"}, r"missing norm\.bias"),
    ],
)
def test_another_kind_of_vit_is_named_by_its_tensors(tmp_path: Path, changes: dict[str, Any], tensor: str) -> None:
    with pytest.raises(ArtifactError, match=tensor):
        read(tmp_path, theirs(**changes))
