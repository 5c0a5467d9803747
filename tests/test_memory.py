"""The memory formula against hand-made sums."""

from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.memory import estimate, states
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig


@pytest.mark.parametrize(("stage", "bytes_per_parameter"), [(0, 16.0), (1, 9.0), (2, 5.5), (3, 2.0)])
def test_states_shrink_with_the_zero_stage(stage: int, bytes_per_parameter: float) -> None:
    assert states(1000, 8, stage) == pytest.approx(1000 * bytes_per_parameter)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_alone_every_zero_stage_costs_the_same(stage: int) -> None:
    assert states(1000, 1, stage) == 16_000


POSE = PoseConfig(backbone=ViTConfig(size="micro", image_size=(64, 48), patch_size=16), decoder={"filters": 8})


def test_a_pose_model_costs_states_blocks_and_decoder() -> None:
    blocks = 2 * 4 * 12 * (8 * 32 + 2 * 128)  # depth x bytes x tokens x (8 width + 2 mlp)
    decoder = 3 * 4 * 8 * (16 * 12) * 1.25
    expected = 1.12 * (16 * 1000 + 5 * (blocks + decoder))
    assert estimate(POSE, 1000, 5, 1, EngineConfig(zero_stage=0)) == pytest.approx(expected)


def test_bf16_halves_activations_and_nothing_else() -> None:
    full = estimate(POSE, 0, 4, 1, EngineConfig())
    assert estimate(POSE, 0, 4, 1, EngineConfig(precision="bf16")) == pytest.approx(full / 2)
    weights = estimate(POSE, 1000, 0, 1, EngineConfig())
    assert estimate(POSE, 1000, 0, 1, EngineConfig(precision="bf16")) == weights


def test_gradient_checkpointing_keeps_inputs_and_one_block() -> None:
    backbone = ViTConfig(size="B")
    saved = backbone.model_copy(update={"gradient_checkpointing": True})
    block = 4 * 192 * (8 * 768 + 2 * 3072)
    decoder = 3 * 4 * 256 * 64 * 48 * 1.25
    plain = estimate(PoseConfig(backbone=backbone), 0, 1, 1, EngineConfig())
    assert plain == pytest.approx(1.12 * (12 * block + decoder))
    cheap = estimate(PoseConfig(backbone=saved), 0, 1, 1, EngineConfig())
    assert cheap == pytest.approx(1.12 * (12 * 4 * 192 * 768 + block + decoder))


def test_frozen_parameters_cost_their_weights_alone() -> None:
    for stage, weights in ((0, 4), (1, 4), (2, 4), (3, 0.5)):
        whole, half = states(1000, 8, stage), states(1000, 8, stage, frozen=500)
        assert half == pytest.approx(whole / 2 + 500 * weights)


def test_a_teacher_costs_its_weights_in_every_process() -> None:
    model = PoseConfig.model_validate({"backbone": {"size": "S"}})
    for stage in (0, 3):
        alone, taught = (
            estimate(model, 10, 1, 8, EngineConfig(zero_stage=stage), teacher=teacher) for teacher in (0, 1000)
        )
        assert taught - alone == pytest.approx(1.12 * 4 * 1000)


TABLE_5: list[
    tuple[dict[str, Any], str]
] = [  # ViTPose, table 5, from the cheapest to the dearest by its column of memory; the last in 16 bits
    ({"window": (8, 8), "shift": True}, "float32"),
    ({"window": (8, 8), "shift": True, "pool": True}, "float32"),
    ({"window": (16, 12), "shift": True, "pool": True}, "float32"),
    ({"window": (8, 8), "global_blocks": 4}, "float32"),
    ({}, "bf16"),
]


def test_materialised_attention_follows_the_order_of_table_5() -> None:
    found = []
    for attention, precision in TABLE_5:
        backbone = ViTConfig(size="B", feature_ratio=2, attention=attention)
        model = PoseConfig(backbone=backbone, decoder={"deconv_layers": 1})
        found.append(estimate(model, 0, 1, 1, EngineConfig(precision=precision), materialised=True))
    assert found == sorted(found) and len(set(found)) == len(found)


def test_windows_cost_what_is_padded_and_what_is_seen_twice() -> None:
    backbone = ViTConfig(size="micro", image_size=(80, 48), attention={"window": (2, 2), "pool": True})
    plain = 2 * 4 * 15 * (8 * 32 + 2 * 128)
    windows, places, keys = 6, 4, 4 + 6
    copies = 2 * 4 * 32 * (windows * 2 * (places + keys) - 3 * 15)
    decoder = 3 * 4 * 256 * 20 * 12 * 1.25
    model = PoseConfig(backbone=backbone)
    assert estimate(model, 0, 1, 1, EngineConfig()) == pytest.approx(1.12 * (plain + copies + decoder))
    maps = 2 * 4 * 2 * windows * places * keys
    found = estimate(model, 0, 1, 1, EngineConfig(), materialised=True)
    assert found == pytest.approx(1.12 * (plain + copies + decoder + maps))


def test_an_autoencoder_costs_its_visible_patches_and_a_decoder_over_all() -> None:
    config = MAEConfig(
        backbone=ViTConfig(size="micro", image_size=(64, 64), patch_size=16, patch_padding=0),
        decoder_width=16,
        decoder_depth=3,
        decoder_heads=2,
    )
    encoder = 2 * 4 * (4 + 1) * (8 * 32 + 2 * 128)
    decoder = 3 * 4 * (16 + 1) * (8 * 16 + 2 * 64)
    assert estimate(config, 0, 1, 1, EngineConfig()) == pytest.approx(1.12 * (encoder + decoder))


def kept_for_backward(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes that the forward keeps, weights aside; views of one tensor count once."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model(images)
    assert features.requires_grad  # and with it, the graph and all that it keeps, is alive until here
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("attention", [{}, *[attention for attention, _ in TABLE_5[:-1]]])
def test_fused_attention_keeps_what_the_formula_says(attention: dict[str, Any]) -> None:
    """ViTPose-B at 1/8 as in table 5. Run with -s to read the megabytes."""
    backbone = ViTConfig(size="B", feature_ratio=2, attention=attention)
    model = ViT(backbone)
    measured = kept_for_backward(model, torch.zeros(1, 3, 256, 192))
    decoder = 3 * 4 * 256 * 64 * 48 * 1.25
    pose = PoseConfig(backbone=backbone, decoder={"deconv_layers": 1})
    expected = estimate(pose, 0, 1, 1, EngineConfig()) / 1.12 - decoder
    print(f"{attention}: kept {measured / 2**20:.0f} MiB, formula {expected / 2**20:.0f} MiB")
    assert measured == pytest.approx(expected, rel=0.15)
