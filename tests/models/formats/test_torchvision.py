"""torchvision's own ResNets as the reference: their features out of our backbone, and a pose model that starts there."""

from pathlib import Path
from typing import Any

import pytest
import timm as peer
import torch
from torch import Tensor, nn
from torchvision import models

from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import EncoderConfig, MAEConfig, PoseConfig
from pipeline.models.formats import torchvision
from pipeline.models.formats.pose import Imported, Wanted
from pipeline.models.loading import EncoderSpec
from pipeline.models.pose import PoseModel
from pipeline.models.resnet import ResNet
from pipeline.pose_training import initialise
from tests.models.formats.models import heatmap_error, images, randomise
from tests.models.test_loading import publish_model


@pytest.fixture(scope="module")
def theirs() -> models.ResNet:
    return randomise(models.resnet50())


def features(model: models.ResNet, batch: Tensor) -> Tensor:
    return nn.Sequential(*list(model.children())[:-2])(batch)


def read(path: Path, state: dict[str, Tensor], **wanted: Any) -> Imported:
    torch.save(state, path / "resnet.pth")
    return torchvision.read(path / "resnet.pth", Wanted(**wanted))


def shapes(model: nn.Module) -> dict[str, Tensor]:
    """Its state dict of zeros, each of which takes one number's room in a file."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}


@torch.no_grad()
def test_the_backbone_gives_their_features(tmp_path: Path, theirs: models.ResNet) -> None:
    found = read(tmp_path, theirs.state_dict())
    assert isinstance(found.spec, EncoderSpec) and found.spec.config.backbone.layers == 50
    assert found.dropped.keys() == {"fc.weight", "fc.bias"} and not found.changes
    backbone = ResNet(found.spec.config.backbone.model_copy(update={"image_size": (64, 64)}))
    backbone.load_state_dict(found.tensors)
    batch = images(2, (64, 64))
    assert heatmap_error(backbone.eval()(batch), features(theirs, batch)) < 1e-5


@torch.no_grad()
def test_a_pose_model_starts_from_it_at_its_own_size(tmp_path: Path, theirs: models.ResNet) -> None:
    found = read(tmp_path, theirs.state_dict(), input_size=(224, 224))
    artifact = publish_model(tmp_path, found.spec, found.tensors)
    backbone = {"kind": "resnet", "layers": 50, "image_size": [64, 64]}
    model = PoseModel(PoseConfig.model_validate({"backbone": backbone, "decoder": {"filters": 8}}), {"coco": 17}).eval()
    initialise(model, artifact)
    batch = images(2, (64, 64))
    assert heatmap_error(model.backbone(batch), features(theirs, batch)) < 1e-5
    deeper = PoseConfig.model_validate({"backbone": backbone | {"layers": 101}, "decoder": {"filters": 8}})
    with torch.device("meta"):
        other = PoseModel(deeper, {"coco": 17})
    with pytest.raises(ArtifactError, match=r"\(ResNet-50\) can't initialise a resnet \(ResNet-101\)"):
        initialise(other, artifact)


@pytest.mark.parametrize(("name", "layers"), [("resnet101", 101), ("resnet152", 152)])
def test_the_depth_is_told_by_the_blocks(tmp_path: Path, name: str, layers: int) -> None:
    with torch.device("meta"):
        own, timms = getattr(models, name)(), peer.create_model(name)
    assert read(tmp_path, shapes(own)).spec.config.backbone.layers == layers
    assert read(tmp_path, shapes(timms)).spec.config.backbone.layers == layers


def test_an_older_file_counts_no_batches(tmp_path: Path, theirs: models.ResNet) -> None:
    state = {name: value for name, value in theirs.state_dict().items() if "num_batches" not in name}
    found = read(tmp_path, state)
    assert not found.tensors["layer4.2.bn3.num_batches_tracked"] and "num_batches_tracked" in found.changes[0]
    state["bn1.num_batches_tracked"] = torch.tensor(3)
    with pytest.raises(ArtifactError, match=r"missing layer1\.0\.bn1\.num_batches_tracked"):
        read(tmp_path, state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "stages of 2, 2, 2, 2 blocks; of ResNets there are 50, 101, 152"),
        ("resnet34", r"layer1\.0\.conv1\.weight \(64, 64, 3, 3\) instead of"),
        ("wide_resnet50_2", r"layer1\.0\.\S+ \(128"),
        ("vit_b_16", r"missing conv1\.weight"),
    ],
)
def test_another_network_is_named_by_its_tensors(tmp_path: Path, name: str, message: str) -> None:
    with torch.device("meta"):
        other = getattr(models, name)()
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path, shapes(other))


def test_what_is_wanted_is_compared(tmp_path: Path, theirs: models.ResNet) -> None:
    state = theirs.state_dict()
    wanted = {
        layers: EncoderConfig.model_validate({"backbone": {"kind": "resnet", "layers": layers}}) for layers in (50, 101)
    }
    assert read(tmp_path, state, model=wanted[50]).spec.config == wanted[50]
    with pytest.raises(ArtifactError, match=r"missing layer3\.10\.bn1\.bias"):
        read(tmp_path, state, model=wanted[101])
    with pytest.raises(ConfigError, match="holds a ResNet; describe it: model.backbone with kind resnet"):
        read(tmp_path, state, model=MAEConfig.model_validate({"backbone": {"size": "S"}}))
    with pytest.raises(ConfigError, match="no attention heads"):
        read(tmp_path, state, heads=4)
