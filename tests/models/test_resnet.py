from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from pipeline import memory
from pipeline.buffers import average_buffers
from pipeline.config_file import explain, load_pipeline
from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.loading import PoseSpec, save_model
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel, describe
from pipeline.models.resnet import ResNet
from pipeline.models.resnet_config import ResNetConfig
from pipeline.models.vit_config import ViTConfig
from pipeline.pose_training import initialise
from pipeline.strict import fingerprint_view
from stages import KINDS, module_of
from tests.chain.running import TINY
from tests.faults.fixtures import context, pose_spec, publish_at, publish_shards

SMALL = {"kind": "resnet", "layers": 50, "image_size": (64, 64)}


def config(decoder: dict | None = None, **backbone: object) -> PoseConfig:
    return PoseConfig.model_validate({"backbone": {**SMALL, **backbone}, "decoder": decoder or {}})


@pytest.fixture(scope="module")
def model() -> PoseModel:
    torch.manual_seed(0)
    made = PoseModel(config({"filters": 8}), {"coco": 17, "aic": 14})
    made.init_weights()
    return made


@pytest.mark.parametrize(("layers", "millions"), [(50, 34.0), (101, 53.0), (152, 68.6)])
def test_simple_baselines_have_their_published_number_of_parameters(layers: int, millions: float) -> None:
    counts = describe(config(layers=layers, image_size=(256, 192)), {"coco": 17})
    assert counts["total"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_both_decoders_give_a_quarter_of_the_input() -> None:
    for decoder in ({}, {"kind": "simple"}):
        built = config(decoder, image_size=(256, 192))
        assert built.heatmap_size == (64, 48)
        with torch.device("meta"):
            maps = PoseModel(built, {"coco": 17}).eval()(torch.empty(1, 3, 256, 192))
        assert maps["coco"].shape == (1, 17, 64, 48)
    # Table 4a of SimpleBaseline has one with two deconvolutions.
    assert config({"deconv_layers": 2}, image_size=(256, 192)).heatmap_size == (32, 24)


def test_names_and_numbers_are_those_of_timms_classifier() -> None:
    public = timm.create_model("resnet50", pretrained=False)
    for name, buffer in public.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_()
    own = ResNet(ResNetConfig(**SMALL))
    own.load_state_dict({name: value for name, value in public.state_dict().items() if not name.startswith("fc.")})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = public.eval().forward_features(images), own.eval()(images)
    assert found.shape == (2, 2048, 2, 2)
    torch.testing.assert_close(found, expected)


def test_statistics_of_the_trunk_are_averaged_by_the_samples_of_each_rank(model: PoseModel) -> None:
    shares = []
    for seed, count in ((1, 2), (2, 4)):
        model.init_weights()
        images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) + seed
        model.train().forward_mixed(images, torch.zeros(count, dtype=torch.int64), ["coco", "aic"])
        shares.append({name: value.clone() for name, value in model.named_buffers()})
    assert [int(share["backbone.samples_seen"]) for share in shares] == [2, 4]
    assert "backbone.samples_seen" not in model.state_dict() and "backbone.bn1.running_mean" in model.state_dict()
    averaged = average_buffers(shares)
    for name in ("backbone.bn1.running_mean", "backbone.layer4.2.bn3.running_var"):
        assert not torch.equal(shares[0][name], shares[1][name])
        torch.testing.assert_close(averaged[name], (2 * shares[0][name] + 4 * shares[1][name]) / 6)


def test_a_trunk_has_one_learning_rate(model: PoseModel) -> None:
    groups = layer_decay_groups(model, 1e-3, 0.1, 1.0)
    assert {group["lr"] for group in groups} == {1e-3}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_memory_formula_counts_what_a_forward_keeps(model: PoseModel) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.backbone.train()(torch.randn(8, 3, 64, 64))
    activations = sum(size for place, size in kept.items() if place not in own)
    assert features.requires_grad
    assert 8 * memory._backbone(model.config.backbone, 4, materialised=False) == pytest.approx(activations, rel=0.02)


def test_the_kind_of_a_vit_changes_no_fingerprint_and_a_resnet_has_one_of_its_own() -> None:
    plain = PoseConfig.model_validate({"backbone": {"size": "micro"}})
    assert plain == PoseConfig.model_validate({"backbone": {"kind": "vit", "size": "micro"}})
    assert plain == PoseConfig(backbone=ViTConfig(size="micro"))
    assert "kind" not in fingerprint_view(plain)["backbone"]
    assert fingerprint_view(config())["backbone"] == {"kind": "resnet", "layers": 50, "image_size": [64, 64]}
    assert PoseConfig.model_validate_json(config().model_dump_json()) == config()


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ({"kind": "resnet", "layers": 18}, "model.backbone.layers: input should be 50, 101 or 152, found 18"),
        ({"kind": "resnet", "image_size": (250, 192)}, "image height 250 is not a multiple of 32"),
        ({"kind": "resnet", "image_size": (64, 32)}, "image width 32 is not a multiple of 32 from 64 on"),
        ({"kind": "resnet", "size": "B"}, "model.backbone.size: unknown key; known: image_size, kind, layers"),
        ({"kind": "resnext"}, "model.backbone: input tag 'resnext' found using 'kind'"),
        ({"size": "B", "widht": 3}, "model.backbone.widht: unknown key; did you mean 'width'?"),
    ],
)
def test_a_wrong_backbone_is_one_line_without_the_union(backbone: dict, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PoseConfig.model_validate({"backbone": backbone})
    (line,) = explain(caught.value, PoseConfig, "model")
    assert said in line


def test_what_only_a_vit_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="knowledge_tokens: a resnet takes none"):
        PoseConfig.model_validate({"backbone": SMALL, "knowledge_tokens": 1})
    with pytest.raises(ValidationError, match="Input should be 'vit'"):
        MAEConfig.model_validate({"backbone": {"kind": "resnet", "size": "micro"}})


def test_a_resnet_neither_starts_a_vit_nor_teaches_a_token(tmp_path: Path) -> None:
    built = config({"deconv_layers": 3, "filters": 8})
    codec = CodecConfig(input_size=(64, 64), heatmap_size=built.heatmap_size)
    spec = PoseSpec(config=built, datasets={"coco": load_definition("coco")}, codec=codec)
    teacher = publish_at(tmp_path / "teacher", lambda staged: save_model(staged, spec, {}))
    vit = pose_spec()
    with pytest.raises(
        ArtifactError,
        match="teacher: a resnet \\(ResNet-50\\) can't initialise a vit \\(32 x 2, patch 8\\); train from scratch",
    ):
        initialise(PoseModel(vit.config, vit.keypoints), teacher)
    shards = publish_shards(tmp_path / "shards")
    stage: dict[str, Any] = {"kind": "token", "steps": 1, "global_batch_size": 2, "optimizer": {"lr": 0.1}}
    stage["inputs"] = {"shards": str(shards.path), "teacher": str(teacher.path)}
    running = context(tmp_path, stage)
    with pytest.raises(ConfigError, match="inputs.teacher: a resnet takes no knowledge token"):
        module_of("token").run(running, running.plan.config)


def test_a_chain_with_a_token_of_a_resnet_is_refused_as_a_whole() -> None:
    overrides = ["stages.finetune.model.backbone={kind: resnet, image_size: [64, 64]}"]
    overrides += ["stages.finetune.optimizer.layer_decay=1", "stages.finetune.inputs.init=null"]
    with pytest.raises(ConfigError, match="stages.token: inputs.teacher: a resnet takes no knowledge token"):
        load_pipeline(TINY, overrides, KINDS)
