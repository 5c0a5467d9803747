import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.config import PoseConfig
from pipeline.models.pose import PoseModel, describe

KEYPOINTS = {"coco": 17, "aic": 14, "mpii": 16}
NAMES = ["mpii", "coco", "aic"]


def build(keypoints: dict[str, int] = KEYPOINTS, **values: object) -> PoseModel:
    backbone = {"size": "micro", "image_size": (64, 48)}
    config = PoseConfig.model_validate({"backbone": backbone, "decoder": {"filters": 8}, **values})
    torch.manual_seed(0)
    model = PoseModel(config, keypoints)
    model.init_weights()
    return model


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 48, generator=torch.Generator().manual_seed(5))


def buffers(model: PoseModel, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.decoders[name].named_buffers()}


def test_heatmaps_come_by_dataset() -> None:
    model = build().eval()
    maps = model(images())
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        name: (4, k, 16, 12) for name, k in KEYPOINTS.items()
    }
    assert model.config.heatmap_size == (16, 12)
    only = model(images(), ["aic"])
    assert list(only) == ["aic"] and torch.equal(only["aic"], maps["aic"])


def test_a_decoder_sees_only_the_samples_of_its_dataset() -> None:
    model = build().eval()
    index = torch.tensor([1, 0, 1, 2])
    found, zero = model.forward_mixed(images(), index, NAMES)
    whole = model(images())
    assert {name: rows.tolist() for name, (rows, _) in found.items()} == {"coco": [0, 2], "aic": [3], "mpii": [1]}
    for name, (rows, maps) in found.items():
        torch.testing.assert_close(maps, whole[name][rows])
    assert zero.item() == 0


def test_batch_norm_statistics_come_from_the_own_dataset_only() -> None:
    mixed, alone = build().train(), build().train()
    mixed.forward_mixed(images(), torch.tensor([1, 0, 1, 0]), NAMES)
    alone.decoders["coco"](alone.backbone(images())[[0, 2]])
    for name, value in buffers(alone, "coco").items():
        torch.testing.assert_close(buffers(mixed, "coco")[name], value)
    assert mixed.decoders["coco"].samples_seen.item() == 2


def test_a_decoder_without_samples_keeps_its_buffers_and_gets_zero_gradients() -> None:
    model = build().train()
    before = buffers(model, "aic")
    found, zero = model.forward_mixed(images(), torch.tensor([1, 0, 1, 0]), NAMES)
    loss = sum(maps.square().sum() for _, maps in found.values()) + zero
    loss.backward()
    assert set(found) == {"coco", "mpii"}
    after = buffers(model, "aic")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is not None and not p.grad.any() for p in model.decoders["aic"].parameters())
    assert all(p.grad.any() for p in model.decoders["coco"].parameters())
    assert all(module.training for module in model.modules())


def test_a_dummy_run_does_not_change_the_gradients_of_the_backbone() -> None:
    gradients = []
    for keypoints in (KEYPOINTS, {"coco": 17}):
        model = build(keypoints).train()
        torch.manual_seed(1)
        model.init_weights()
        names = [name for name in NAMES if name in keypoints]
        found, zero = model.forward_mixed(images(), torch.full((4,), names.index("coco")), names)
        (found["coco"][1].square().sum() + zero).backward()
        gradients.append([p.grad for p in model.backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_frozen_batch_norm_stays_in_eval_mode_after_a_dummy_run() -> None:
    model = build().train()
    model.decoders["aic"].deconv_layers[1].eval()
    model.forward_mixed(images(), torch.zeros(4, dtype=torch.int64), NAMES)
    assert not model.decoders["aic"].deconv_layers[1].training
    assert model.decoders["aic"].deconv_layers[4].training


def test_decoders_run_in_the_same_order_whatever_the_batch() -> None:
    model = build().train()
    ran: list[str] = []
    for name, decoder in model.decoders.items():
        decoder.register_forward_pre_hook(lambda module, inputs, name=name: ran.append(name))
    for index in ([0, 0, 1, 2], [2, 2, 2, 2], [1, 0, 1, 0]):
        model.forward_mixed(images(), torch.tensor(index), NAMES)
    assert ran == list(KEYPOINTS) * 3


def test_the_knowledge_token_is_saved_and_used_but_not_trained() -> None:
    model = build(knowledge_tokens=2).eval()
    before = model(images())["coco"]
    model.knowledge_token.copy_(torch.randn(1, 2, 32))
    after = model(images())["coco"]
    assert not torch.equal(before, after)
    assert model.state_dict()["knowledge_token"].shape == (1, 2, 32)
    assert "knowledge_token" not in dict(model.named_parameters())
    assert "knowledge_token" not in build().state_dict()


def test_a_learned_token_is_a_parameter_of_the_same_name_and_loads_as_a_fixed_one() -> None:
    model, fixed = build(knowledge_tokens=2), build(knowledge_tokens=2)
    token = torch.randn(1, 2, 32)
    for each in (model, fixed):
        each.knowledge_token.copy_(token)
    model.learn_token()
    assert model.state_dict().keys() == fixed.state_dict().keys()
    assert torch.equal(model(images())["coco"], fixed(images())["coco"])
    model(images())["coco"].square().sum().backward()
    assert model.knowledge_token.grad.any() and "knowledge_token" in dict(model.named_parameters())
    fixed.load_state_dict(model.state_dict())
    assert not any(name == "knowledge_token" for name, _ in fixed.named_parameters())


def test_tokens_given_to_a_call_follow_the_models_own() -> None:
    model, plain = build(knowledge_tokens=1).eval(), build().eval()
    own, extra = torch.randn(1, 1, 32), torch.randn(1, 1, 32, requires_grad=True)
    model.knowledge_token.copy_(own)
    expected = plain(images(), tokens=torch.cat([own, extra], dim=1))["coco"]
    given = model(images(), tokens=extra)["coco"]
    torch.testing.assert_close(given, expected)
    given.square().sum().backward()
    assert extra.grad.any()


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward", "training"])
def test_a_dataset_that_can_not_name_a_module_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="can't name a decoder"):
        build({name: 3})


def test_a_model_needs_a_dataset_and_each_dataset_a_keypoint() -> None:
    with pytest.raises(ConfigError, match="at least one dataset"):
        build({})
    with pytest.raises(ConfigError, match="'coco' has 0 keypoints"):
        build({"coco": 0})


def test_a_dataset_without_a_decoder_is_named_with_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match="'ochuman' has no decoder.*coco, aic, mpii"):
        build()(images(), ["ochuman"])
    with pytest.raises(ConfigError, match="'ochuman'"):
        build().forward_mixed(images(), torch.zeros(4, dtype=torch.int64), ["ochuman"])


def test_describe_counts_without_allocating() -> None:
    config = PoseConfig.model_validate({"backbone": {"size": "B"}})
    counts = describe(config, {"coco": 17})
    assert counts["total"] == counts["backbone"] + counts["decoders.coco"]
    assert counts["total"] / 1e6 == pytest.approx(90.0, abs=0.05)


def test_a_model_from_the_meta_device_is_whole_after_initialisation() -> None:
    expected = build(knowledge_tokens=1)
    with torch.device("meta"):
        model = PoseModel(expected.config, KEYPOINTS)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for each in (model, expected):
        torch.manual_seed(1)
        each.init_weights()
    for (name, a), (_, b) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name
