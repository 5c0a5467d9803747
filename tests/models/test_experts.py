"""ViTPose+'s experts: each sample its dataset's, the graph every expert, a plain model before and after."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.backbones import count_parameters
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.loading import MAESpec, PoseSpec
from pipeline.models.mae import MAE
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel, describe
from pipeline.models.splitting import split
from pipeline.models.vit import ViT
from pipeline.models.vit_config import ViTConfig
from pipeline.objectives import DistillObjective, TeacherWeight, TokenObjective
from pipeline.pose_training import initialise
from tests.models.test_loading import publish_model

NAMES = ["coco", "aic", "mpii"]
KEYPOINTS = {"coco": 17, "aic": 14, "mpii": 16}
BACKBONE = {"size": "micro", "image_size": [64, 48], "expert_width": 8}


def config(**backbone: Any) -> PoseConfig:
    return PoseConfig.model_validate({"backbone": BACKBONE | backbone, "decoder": {"filters": 8}})


def build(seed: int = 0, names: list[str] = NAMES, knowledge_tokens: int = 0, **backbone: Any) -> PoseModel:
    """A model of which every tensor is random."""
    torch.manual_seed(seed)
    configured = config(**backbone).model_copy(update={"knowledge_tokens": knowledge_tokens})
    model = PoseModel(configured, {name: KEYPOINTS[name] for name in names})
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else 0.2 * torch.randn_like(tensor))
    return model.eval()


def spec_of(model: PoseModel) -> PoseSpec:
    datasets = {name: load_definition(name) for name in model.decoders}
    return PoseSpec(
        config=model.config, datasets=datasets, codec=CodecConfig(input_size=(64, 48), heatmap_size=(16, 12))
    )


def images(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 48, generator=torch.Generator().manual_seed(5))


def test_the_second_layer_is_shared_channels_then_the_datasets_own() -> None:
    model = build()
    block, tokens = model.backbone.blocks[0], torch.randn(3, 4, 32)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(tokens))
    found = block.mlp(tokens, (2, 0, 1))
    assert block.mlp.fc2.weight.shape == (24, 128) and block.mlp.experts["aic"].weight.shape == (8, 128)
    torch.testing.assert_close(found[..., :24], block.mlp.fc2(hidden))
    torch.testing.assert_close(found[:2, :, 24:], block.mlp.experts["coco"](hidden[:2]))
    torch.testing.assert_close(found[2:, :, 24:], block.mlp.experts["mpii"](hidden[2:]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mixed_batch_computes_what_each_datasets_plain_model_does(checkpointing: bool) -> None:
    model = build(knowledge_tokens=1, gradient_checkpointing=checkpointing)
    spec = spec_of(model)
    # The batch's names need not be in the decoders' order.
    found, zero = model.forward_mixed(images(), torch.tensor([2, 0, 1, 0, 2]), ["aic", "mpii", "coco"])
    assert {name: rows.tolist() for name, (rows, _) in found.items()} == {"coco": [0, 4], "aic": [1, 3], "mpii": [2]}
    for name, (rows, maps) in found.items():
        plain_spec, tensors = split(spec, model.state_dict(), name, "model")
        plain = PoseModel(plain_spec.config, plain_spec.keypoints)
        plain.load_state_dict(tensors)
        expected = plain.eval()(images())[name]
        torch.testing.assert_close(maps, expected[rows], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(images(), [name])[name], expected, rtol=1e-6, atol=1e-6)
    assert zero.item() == 0
    others = model(images())["coco"] - model(images(), ["aic", "coco"])["coco"]
    assert not others.any()


def test_gradients_are_those_of_the_datasets_alone_and_exactly_zero_for_the_absent() -> None:
    mixed, alone = build(gradient_checkpointing=True), build()
    index = torch.tensor([1, 0, 1, 0, 0])
    found, zero = mixed.forward_mixed(images(), index, ["coco", "aic"])
    (sum(maps.square().sum() for _, maps in found.values()) + zero).backward()
    for number, name in enumerate(["coco", "aic"]):
        alone(images()[index == number], [name])[name].square().sum().backward()
    expected = dict(alone.named_parameters())
    for name, parameter in mixed.named_parameters():
        assert parameter.grad is not None, name
        if ".mpii." in name:
            assert not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


def test_parameters_are_counted_and_belong_to_their_block() -> None:
    """ViTPose+ B has 121.2 M parameters in its backbone; plain B 85.8 M."""
    plus = ViTConfig.model_validate({"size": "B", "expert_width": 192})
    assert count_parameters(plus, list("abcdef")) / 1e6 == pytest.approx(121.2, abs=0.05)
    assert describe(config(), KEYPOINTS)["backbone"] == count_parameters(config().backbone, NAMES)
    groups = layer_decay_groups(build(), 1e-3, 0.1, 0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for part in ("experts.aic.weight", "experts.mpii.bias"):
        assert scales[f"backbone.blocks.1.mlp.{part}"] == scales["backbone.blocks.1.mlp.fc1.weight"] == 0.5


def test_settings_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_width 32 must be below the width 32"):
        config(expert_width=32)
    with pytest.raises(ValueError, match="expert_width is of pose models"):
        MAEConfig.model_validate({"backbone": {"size": "micro", "image_size": [64, 48], "expert_width": 8}})
    with pytest.raises(ConfigError, match="expert_width 8 with 0 datasets"):
        ViT(config().backbone)


def test_a_knowledge_token_is_taken_along_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = build(1, ["coco"], expert_width=0, knowledge_tokens=1)
    artifact = publish_model(tmp_path, spec_of(source), dict(source.state_dict()))
    with caplog.at_level("INFO"):
        initialise(build(2, ["coco"], expert_width=0), artifact)
    assert "left out: knowledge_token" in caplog.text
    model = build(2, ["coco"], expert_width=0, knowledge_tokens=1)
    initialise(model, artifact)
    assert source.knowledge_token.any() and torch.equal(model.knowledge_token, source.knowledge_token)


def test_every_expert_starts_from_the_last_rows_of_a_plain_models_second_layer(tmp_path: Path) -> None:
    plain = build(1, ["coco"], expert_width=0)
    artifact = publish_model(tmp_path, spec_of(plain), dict(plain.state_dict()))
    model = build(2)
    initialise(model, artifact)
    source, grown = plain.backbone.state_dict(), model.backbone.state_dict()
    for kind in ("weight", "bias"):
        rows = source[f"blocks.1.mlp.fc2.{kind}"]
        assert torch.equal(grown[f"blocks.1.mlp.fc2.{kind}"], rows[:24])
        for name in NAMES:
            assert torch.equal(grown[f"blocks.1.mlp.experts.{name}.{kind}"], rows[24:])
    torch.testing.assert_close(model.eval()(images(), ["coco"])["coco"], plain(images())["coco"], rtol=1e-6, atol=1e-6)


def test_an_autoencoder_grows_experts_too(tmp_path: Path) -> None:
    values = {"size": "micro", "image_size": [64, 48]}
    autoencoder = MAE(MAEConfig.model_validate({"backbone": values, "decoder_width": 16, "decoder_heads": 2}))
    autoencoder.init_weights()
    artifact = publish_model(tmp_path, MAESpec(config=autoencoder.config), dict(autoencoder.state_dict()))
    model = build()
    initialise(model, artifact)
    rows = autoencoder.blocks[0].mlp.fc2.weight
    own = model.backbone.blocks[0].mlp
    assert torch.equal(own.fc2.weight, rows[:24]) and torch.equal(own.experts["mpii"].weight, rows[24:])


def test_experts_are_taken_by_name_or_refused(tmp_path: Path) -> None:
    whole = build(1)
    artifact = publish_model(tmp_path / "whole", spec_of(whole), dict(whole.state_dict()))
    fewer = build(2, ["mpii", "coco"])
    initialise(fewer, artifact)
    ours, theirs = fewer.backbone.blocks[1].mlp.experts, whole.backbone.blocks[1].mlp.experts
    assert torch.equal(ours["mpii"].weight, theirs["mpii"].weight) and set(ours) == {"mpii", "coco"}
    with pytest.raises(ConfigError, match=r"has experts \(aic, coco, mpii\), this model has none.*vitruvian split"):
        initialise(build(expert_width=0), artifact)
    small = publish_model(tmp_path / "fewer", spec_of(fewer), dict(fewer.state_dict()))
    with pytest.raises(ConfigError, match=r"no expert for 'aic' \(it has coco, mpii\).*vitruvian split"):
        initialise(build(), small)
    with pytest.raises(ArtifactError, match="does not fit the backbone"):
        initialise(build(expert_width=16), artifact)


def test_a_teacher_with_experts_teaches_each_crop_as_its_own_dataset() -> None:
    teacher, student = build(1), build(2, ["coco", "mpii"])
    batch = {
        "images": torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8),
        "keypoints": torch.rand(4, 17, 2) * 40,
        "visible": torch.ones(4, 17),
        "dataset": torch.tensor([1, 0, 1, 0]),
        "weight": torch.ones(4),
    }
    codec, names = CodecConfig(input_size=(64, 48), heatmap_size=(16, 12)), ["coco", "mpii"]
    settings = {"weight": TeacherWeight(1.0), "labelled_only": False, "precision": "float32"}
    found = DistillObjective(student, codec, names, teacher, **settings)(batch)[1]["loss_teacher"]
    plain = {name: split(spec_of(teacher), teacher.state_dict(), name, "model") for name in names}
    expected = torch.zeros(())
    for number, (spec, tensors) in enumerate(plain.values()):
        one = PoseModel(spec.config, spec.keypoints)
        one.load_state_dict(tensors)
        share = {key: value[batch["dataset"] == number] for key, value in batch.items()}
        share["dataset"] = torch.full((2,), number)
        expected += DistillObjective(student, codec, names, one, **settings)(share)[1]["loss_teacher"] / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    token = TokenObjective(copy.deepcopy(teacher), codec, NAMES, 1)
    token(batch)[0].backward()
    assert token.token.grad is not None and token.token.grad.any()


def test_a_dataset_without_a_decoder_and_an_expert_that_does_not_fit_are_named() -> None:
    model = build()
    state = dict(model.state_dict())
    with pytest.raises(ConfigError, match=r"plus: no decoder for dataset 'ochuman'; it has coco, aic, mpii"):
        split(spec_of(model), state, "ochuman", "plus")
    name = "backbone.blocks.1.mlp.experts.mpii.weight"
    with pytest.raises(ArtifactError, match=r"plus: blocks.1.mlp.experts.mpii.weight \(8, 5\) does not continue"):
        split(spec_of(model), state | {name: state[name][:, :5]}, "mpii", "plus")
    with pytest.raises(ArtifactError, match=r"plus: missing blocks.1.mlp.experts.mpii.weight"):
        split(spec_of(model), {other: value for other, value in state.items() if other != name}, "mpii", "plus")
