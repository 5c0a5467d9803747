import pytest
import torch
from torch import nn

from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.mae import MAE
from pipeline.models.parameter_groups import freeze, layer_decay_groups, plain_groups
from pipeline.models.pose import PoseModel


def pose(size: str, **values: object) -> PoseModel:
    config = PoseConfig.model_validate({"backbone": {"size": size}, "decoder": {"filters": 8}, **values})
    with torch.device("meta"):
        return PoseModel(config, {"coco": 17, "aic": 14})


def by_name(groups: list[dict], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["names"]}


@pytest.mark.parametrize(
    ("size", "decay", "expected"),
    [("S", 0.80, 2.75e-5), ("B", 0.75, 1.19e-5), ("L", 0.80, 1.89e-6), ("H", 0.85, 2.34e-6)],
)
def test_the_patch_embedding_learns_as_fast_as_published(size: str, decay: float, expected: float) -> None:
    rates = by_name(layer_decay_groups(pose(size), 5e-4, 0.1, decay), "lr")
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(expected, rel=0.003)
    assert rates["backbone.pos_embed"] == rates["backbone.patch_embed.proj.bias"]
    assert rates["backbone.last_norm.weight"] == rates["decoders.aic.final_layer.weight"] == 5e-4


def test_every_block_has_its_own_rate() -> None:
    scales = by_name(layer_decay_groups(pose("tiny"), 1.0, 0.1, 0.5), "lr_scale")
    assert [scales[f"backbone.blocks.{i}.attn.qkv.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scales["backbone.patch_embed.proj.weight"] == 0.5**5


def test_vectors_biases_and_positions_do_not_decay_and_all_else_does() -> None:
    model = pose("tiny")
    decays = by_name(layer_decay_groups(model, 1e-3, 0.1, 0.75), "weight_decay")
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name == "backbone.pos_embed"
        assert decays[name] == (0.0 if free else 0.1), name
    assert decays["decoders.coco.deconv_layers.0.weight"] == 0.1


def test_groups_hold_each_parameter_once_and_merge_equal_rules() -> None:
    model = pose("tiny", knowledge_tokens=2)
    groups = layer_decay_groups(model, 1e-3, 0.1, 0.75)
    named = dict(model.named_parameters())
    flat = [(name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    assert len(flat) == len(named) and all(named[name] is p for name, p in flat)
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups) == 2 * (4 + 2)
    assert "knowledge_token" not in named


@pytest.mark.parametrize(
    "part, of_blocks, others",
    [
        ("attention", ("attn.", "norm1."), ()),
        ("ffn", ("mlp.", "norm2."), ("backbone.pos_embed", "backbone.patch_embed.")),
    ],
)
def test_partial_finetuning_freezes_what_the_public_code_freezes(
    part: str, of_blocks: tuple[str, ...], others: tuple[str, ...]
) -> None:
    model = pose("tiny", backbone={"size": "tiny", "parallel_convolution": True, "attention": {"window": (4, 4)}})
    freeze(model, part)
    for name, parameter in model.named_parameters():
        inside = name.startswith("backbone.blocks.") and name.split(".", 3)[3].startswith(of_blocks)
        assert parameter.requires_grad != (inside or (bool(others) and name.startswith(others))), name


def test_relative_positions_do_not_decay() -> None:
    backbone = {"size": "micro", "attention": {"window": (8, 8), "relative_positions": True}}
    decays = by_name(layer_decay_groups(pose("micro", backbone=backbone), 1e-3, 0.1, 0.75), "weight_decay")
    assert decays["backbone.blocks.0.attn.relative_positions"] == 0.0 != decays["backbone.blocks.0.attn.qkv.weight"]


def test_a_learned_knowledge_token_goes_with_the_positions() -> None:
    model = pose("tiny", knowledge_tokens=2)
    model.learn_token()
    groups = layer_decay_groups(model, 1e-3, 0.1, 0.75)
    for key in ("lr", "weight_decay"):
        values = by_name(groups, key)
        assert values["knowledge_token"] == values["backbone.pos_embed"]
    assert by_name(groups, "lr_scale")["knowledge_token"] == pytest.approx(0.75**5)
    assert by_name(groups, "weight_decay")["knowledge_token"] == 0


def test_frozen_parameters_belong_to_no_group() -> None:
    model = pose("tiny")
    model.backbone.patch_embed.requires_grad_(False)
    names = by_name(layer_decay_groups(model, 1e-3, 0.1, 0.75), "lr")
    assert "backbone.patch_embed.proj.weight" not in names and "backbone.pos_embed" in names


def test_plain_groups_spare_vectors_and_biases_but_not_the_tokens_of_an_mae() -> None:
    with torch.device("meta"):
        model = MAE(MAEConfig.model_validate({"backbone": {"size": "micro"}}))
    decays = by_name(plain_groups(model, 0.05), "weight_decay")
    assert decays["cls_token"] == decays["mask_token"] == decays["blocks.0.mlp.fc1.weight"] == 0.05
    assert decays["norm.weight"] == decays["patch_embed.proj.bias"] == 0.0
    assert len(decays) == len(list(model.parameters()))


def test_an_optimizer_takes_the_groups() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(plain_groups(module, 0.05), lr=1e-3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
