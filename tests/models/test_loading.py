"""Model artifacts: the description builds what the weights fit, or says why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import Artifact, publish, read_artifact
from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.errors import ArtifactError
from pipeline.files import read_json, write_json
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.loading import (
    MAESpec,
    PoseSpec,
    Spec,
    TokenSpec,
    load_mae,
    load_model,
    load_pose,
    load_strictly,
    read_spec,
    read_tensors,
    save_model,
    summary,
)
from pipeline.models.mae import MAE
from pipeline.models.pose import PoseModel

BACKBONE = {"size": "micro", "image_size": [32, 32], "patch_size": 8, "patch_padding": 0}
POSE = PoseSpec(
    config=PoseConfig.model_validate({"backbone": BACKBONE, "decoder": {"deconv_layers": 1, "filters": 4}}),
    datasets={name: load_definition(name) for name in ("mpii", "coco")},
    codec=CodecConfig(input_size=(32, 32), heatmap_size=(8, 8)),
)
MAE_SPEC = MAESpec(
    config=MAEConfig.model_validate({"backbone": BACKBONE, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})
)


def publish_model(folder: Path, spec: Spec, tensors: dict[str, Tensor], kind: str = "any") -> Artifact:
    staged = folder / ".artifact"
    staged.mkdir(parents=True)
    save_model(staged, spec, tensors)
    fields: dict[str, Any] = {"config": {}, "parents": {}, "metrics": {}, "licences": []}
    return publish(staged, folder / "artifact", pipeline="p", stage="s", kind=kind, fingerprint="f", **fields)


def pose_model(spec: PoseSpec = POSE) -> PoseModel:
    torch.manual_seed(0)
    model = PoseModel(spec.config, spec.keypoints)
    model.init_weights()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def test_a_pose_model_comes_back_with_its_buffers_and_gives_the_same_heatmaps(tmp_path: Path) -> None:
    model = pose_model()
    artifact = publish_model(tmp_path, POSE, model.state_dict())
    loaded, spec = load_pose(artifact)
    assert spec == POSE and spec.keypoints == {"mpii": 16, "coco": 17}
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = model(images), loaded(images)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(torch.isfinite(buffer).all() for buffer in loaded.buffers())
    assert all(buffer.item() == 0 for name, buffer in loaded.named_buffers() if name.endswith("samples_seen"))


def test_load_model_takes_a_folder_its_name_or_an_artifact(tmp_path: Path) -> None:
    artifact = publish_model(tmp_path, POSE, pose_model().state_dict())
    for given in (artifact, artifact.path, str(artifact.path)):
        assert isinstance(load_model(given), PoseModel)
    with pytest.raises(ArtifactError, match="no artifact here"):
        load_model(tmp_path / "nothing")


def test_a_knowledge_token_travels_with_its_student(tmp_path: Path) -> None:
    spec = POSE.model_copy(update={"config": POSE.config.model_copy(update={"knowledge_tokens": 2})})
    model = pose_model(spec)
    assert model.knowledge_token is not None
    model.knowledge_token.copy_(torch.randn(1, 2, 32))
    loaded, _ = load_pose(publish_model(tmp_path, spec, model.state_dict()))
    assert torch.equal(loaded.knowledge_token, model.knowledge_token)


def test_an_autoencoder_comes_back_whole(tmp_path: Path) -> None:
    model = MAE(MAE_SPEC.config)
    model.init_weights()
    loaded, spec = load_mae(publish_model(tmp_path, MAE_SPEC, model.state_dict()))
    assert spec == MAE_SPEC and not loaded.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_an_encoder_alone_is_no_whole_autoencoder(tmp_path: Path) -> None:
    spec = MAE_SPEC.model_copy(update={"encoder_only": True})
    artifact = publish_model(tmp_path, spec, {"x": torch.ones(1)})
    with pytest.raises(ArtifactError, match="does not hold a whole masked autoencoder"):
        load_mae(artifact)


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    artifact = publish_model(tmp_path, TokenSpec(teacher="d", tokens=1, width=8), {"token": torch.ones(1, 1, 8)})
    assert read_tensors(artifact)["token"].shape == (1, 1, 8)
    with pytest.raises(ArtifactError, match="type 'token', expected a pose model"):
        load_pose(artifact)
    with pytest.raises(ArtifactError, match="whole masked autoencoder"):
        load_mae(artifact)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    artifact = publish_model(tmp_path, POSE, pose_model().state_dict())
    path = artifact.path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not match"):
        load_pose(read_artifact(artifact.path))


def republish(artifact: Artifact, folder: Path, change: Callable[[Path], None]) -> Artifact:
    """The same files with one changed before they were published, so that the digests hold."""
    staged = folder / ".again"
    artifact.path.rename(staged)
    (staged / "manifest.json").unlink()
    change(staged)
    fields = artifact.manifest.model_dump(exclude={"digest", "files", "environment", "created"})
    return publish(staged, folder / "again", **fields)


@pytest.mark.fault(24)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    artifact = publish_model(tmp_path, POSE, {"x": torch.ones(1)})
    broken = republish(artifact, tmp_path, lambda staged: (staged / "model.safetensors").write_bytes(b"\x80\x04K\x01."))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        read_tensors(broken)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "content", [[], {}, {"model": "gpt"}, {"model": ["pose"]}, {"model": "pose"}, {"model": "token", "extra": 1}]
)
def test_a_description_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, content: Any) -> None:
    artifact = publish_model(tmp_path, POSE, {"x": torch.ones(1)})
    broken = republish(artifact, tmp_path, lambda staged: write_json(staged / "model.json", content))
    with pytest.raises(ArtifactError, match=r"model\.json: not a model description") as caught:
        read_spec(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(31)
def test_a_description_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    artifact = publish_model(tmp_path, MAE_SPEC, {"x": torch.ones(1)})
    content = read_json(artifact.path / "model.json") | {"schema_version": 2}
    newer = republish(artifact, tmp_path, lambda staged: write_json(staged / "model.json", content))
    with pytest.raises(ArtifactError, match="schema_version"):
        read_spec(newer)


def test_weights_that_do_not_fit_are_named() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = {**before, "2.weight": torch.ones(1), "0.weight": torch.ones(3, 5)}
    del tensors["1.bias"]
    with pytest.raises(ArtifactError) as caught:
        load_strictly(module, tensors, "here")
    message = str(caught.value)
    assert message.startswith("here: ") and "(3 in all)" in message
    assert (
        "missing 1.bias" in message and "surplus 2.weight" in message and "0.weight (3, 5) instead of (3, 2)" in message
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_that_fit_are_loaded() -> None:
    module = nn.Linear(2, 3)
    given = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(module, given, "here")
    assert torch.equal(module.weight.detach(), given["weight"])


def test_a_summary_says_what_the_model_is() -> None:
    assert summary(POSE) == {"backbone": "32 x 2, patch 8", "input": "32x32", "datasets": "mpii, coco"}
    assert summary(MAE_SPEC) == {"model": "mae"}
