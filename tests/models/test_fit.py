"""Models that do not go together are refused: by configuration before anything runs, and by their artifacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config_file import load_pipeline
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import MAEConfig
from pipeline.models.fit import why_no_start
from pipeline.models.loading import MAESpec, save_model
from pipeline.models.mae import MAE
from pipeline.models.pose import PoseModel
from pipeline.models.vit_config import ViTConfig
from pipeline.pose_training import initialise
from stages import KINDS, module_of
from tests.chain.running import TINY
from tests.faults.fixtures import BACKBONE, context, pose_spec, publish_at, publish_pose, publish_shards

LARGER = "[128, 96]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["finetune.model.backbone.heads=4"], "stages.finetune: inputs.init: mae is a vit .*: heads 2 instead of 4"),
        (["mae.model.backbone.size=mini"], "stages.finetune: inputs.init: mae is .*: width 64 instead of 32"),
        (["finetune.model.backbone.patch_size=16"], "mae is a vit .*: patch_size 8 instead of 16; train from scratch"),
        (
            [f"finetune.model.backbone.image_size={LARGER}"],
            "stages.distill: inputs.teacher: finetune has heatmaps 64x48 of 128x96 against heatmaps 32x24 of 64x48",
        ),
        (
            [f"student_alone.model.backbone.image_size={LARGER}", "evaluate.ensembles={two: [teacher, student_alone]}"],
            "stages.evaluate: ensembles.two: student_alone and teacher don't go together: heatmaps 64x48 of 128x96",
        ),
        (
            [
                f"student_alone.model.backbone.image_size={LARGER}",
                "evaluate.averages={two: [distilled, student_alone]}",
            ],
            "stages.evaluate: averages.two: student_alone and distilled don't go together",
        ),
    ],
)
def test_a_chain_whose_models_do_not_fit_is_refused_as_a_whole(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_pipeline(TINY, [f"stages.{override}" for override in overrides], KINDS)


def test_grids_padding_and_attention_may_differ() -> None:
    own = ViTConfig(size="B", image_size=(384, 288), feature_ratio=2, attention={"window": [8, 6], "shift": True})
    assert why_no_start(own, ViTConfig(size="B", patch_padding=0, positions="fixed")) is None
    convolution = ViTConfig(size="B", parallel_convolution=True)
    assert why_no_start(convolution, ViTConfig(size="B")) is None
    assert "parallel_convolution True instead of False" in str(why_no_start(ViTConfig(size="B"), convolution))


def test_a_vit_of_other_heads_does_not_start_one_although_every_tensor_fits(tmp_path: Path) -> None:
    source, spec = publish_pose(tmp_path / "source"), pose_spec(heads=4)
    model = PoseModel(spec.config, spec.keypoints)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match="source: a vit .*: heads 2 instead of 4"):
        initialise(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changed", ["heads", "decoder_heads"])
def test_an_autoencoder_of_other_heads_is_not_gone_on_from(changed: str, tmp_path: Path) -> None:
    backbone = {key: value for key, value in BACKBONE.items() if key != "patch_padding"}
    section: dict[str, Any] = {"backbone": backbone, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    config = MAEConfig.model_validate(section)
    init = publish_at(
        tmp_path / "mae", lambda staged: save_model(staged, MAESpec(config=config), MAE(config).state_dict())
    )
    shards = publish_shards(tmp_path / "shards")
    other = {"heads": section | {"backbone": backbone | {"heads": 4}}, "decoder_heads": section | {"decoder_heads": 4}}
    stage: dict[str, Any] = {"kind": "mae", "steps": 1, "global_batch_size": 2, "optimizer": {"lr": 0.1}}
    stage |= {"model": other[changed], "inputs": {"shards": str(shards.path), "init": str(init.path)}}
    running = context(tmp_path, stage)
    with pytest.raises(ArtifactError, match=f"inputs.init: .*{changed} 2 instead of 4"):
        module_of("mae").run(running, running.plan.config)
    stage["inputs"] = {"shards": str(shards.path), "init": "first"}
    file = tmp_path / "two.yaml"
    first = {**stage, "model": section, "inputs": {"shards": str(shards.path)}}
    file.write_text(yaml.safe_dump({"name": "two", "stages": {"first": first, "second": stage}}))
    with pytest.raises(ConfigError, match=f"stages.second: inputs.init: first is .*{changed} 2 instead of 4"):
        load_pipeline(file, [], KINDS)
