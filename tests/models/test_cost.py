"""Multiply-adds against torch's own counter over the real modules, and against the paper's figures."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.config import DecoderConfig, MAEConfig, PoseConfig
from pipeline.models.cost import backbone_cost, mae_cost, pose_cost
from pipeline.models.mae import MAE
from pipeline.models.pose import PoseModel
from pipeline.models.vit_config import ViTConfig


def counted(module: nn.Module, *inputs: torch.Tensor) -> dict[str, float]:
    """Multiply-adds by child module, as torch sees them pass; two of its operations are one of them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    counts = {name.rsplit(".", 1)[-1]: sum(ops.values()) / 2 for name, ops in counter.get_flop_counts().items()}
    return {**counts, "total": counter.get_total_flops() / 2}


KINDS: list[dict[str, Any]] = [
    {},
    {"feature_ratio": 2, "mlp_width": 100},
    {"feature_ratio": 4, "attention": {"window": (3, 4), "shift": True}},
    {"feature_ratio": 2, "attention": {"window": (3, 4), "shift": True, "pool": True, "relative_positions": True}},
    {"depth": 4, "attention": {"window": (2, 2), "pool": True, "global_blocks": 2}, "parallel_convolution": True},
]


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("decoder", [{"deconv_layers": 1, "filters": 8}, {"filters": 8}, {"kind": "simple"}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pose_model_costs_what_torch_counts(kind: dict, decoder: dict, tokens: int) -> None:
    backbone = {"size": "micro", "image_size": (64, 48), "patch_size": 16, **kind}
    config = PoseConfig(backbone=backbone, decoder=decoder, knowledge_tokens=tokens)
    with torch.device("meta"):
        found = counted(PoseModel(config, {"a": 5}).eval(), torch.empty(1, 3, 64, 48))
    expected = pose_cost(config, 5)
    assert (found["backbone"], found["a"]) == expected
    assert found["total"] == sum(expected)


def test_an_autoencoder_costs_what_torch_counts() -> None:
    config = MAEConfig(
        backbone={"size": "micro", "image_size": (64, 48)}, decoder_width=16, decoder_depth=3, decoder_heads=2
    )
    with torch.device("meta"):
        model = MAE(config)
    model.to_empty(device="cpu").init_weights()
    found = counted(model, torch.zeros(1, 3, 64, 48), torch.rand(1, 12))
    assert found["total"] == sum(mae_cost(config))


TABLE_5 = [
    ({}, 76.59),
    ({"window": (8, 8)}, 66.31),
    ({"window": (8, 8), "shift": True}, 66.31),
    ({"window": (8, 8), "pool": True}, 66.39),
    ({"window": (8, 8), "shift": True, "pool": True}, 66.39),
    ({"window": (8, 8), "global_blocks": 4}, 69.94),
    ({"window": (16, 12), "shift": True, "pool": True}, 68.46),
]


@pytest.mark.parametrize("attention, gflops", TABLE_5)
def test_table_5_is_met_within_one_percent(attention: dict, gflops: float) -> None:
    found = backbone_cost(ViTConfig(size="B", feature_ratio=2, attention=attention)).total / 1e9
    assert found == pytest.approx(gflops, rel=0.01)


def test_vitpose_b_has_the_papers_17_1_and_what_it_trains_with_frozen_parts() -> None:
    cost = backbone_cost(ViTConfig(size="B"))
    assert round(cost.total / 1e9, 1) == 17.1
    assert round(cost.mlp / 1e9, 1) == 10.9  # table 6, MHSA frozen: the MLPs alone
    assert round((cost.attention + cost.patches) / 1e9, 1) == 6.2  # FFN frozen: everything else


def test_the_default_decoder_is_counted_in_numbers_of_the_reference_sizes() -> None:
    _, classic = pose_cost(PoseConfig(backbone=ViTConfig(size="B")), 17)
    assert classic == 192 * 768 * 256 * 16 + 768 * 256 * 256 * 16 + 3072 * 256 * 17
    _, simple = pose_cost(PoseConfig(backbone=ViTConfig(size="B"), decoder=DecoderConfig(kind="simple")), 17)
    assert simple == 3072 * 9 * 768 * 17
