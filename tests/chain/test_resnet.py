"""A backbone with batch norm, from torchvision's file through the whole machinery: two ranks, killed and resumed."""

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torchvision.models import resnet50

from pipeline.artifacts import read_artifact
from tests.chain.running import TINY, kill_when, last_step, metrics, only_run, run_stage, succeeded, vitruvian

MODEL = "{backbone: {kind: resnet, layers: 50}}"
CHANGES = (
    "stages.shards.crop.input_size=[64,64]",
    "stages.finetune.inputs.init=imagenet",
    "stages.finetune.model.backbone={kind: resnet, layers: 50, image_size: [64, 64]}",
    "stages.finetune.model.decoder.deconv_layers=3",
    "stages.finetune.optimizer.layer_decay=1",
    "stages.finetune.average_decay=null",
    "stages.finetune.steps=6",
    "stages.finetune.save_every=2",
    "stages.finetune.global_batch_size=8",
    "stages.finetune.evaluation.every=3",
    "stages.evaluate.inputs.models={resnet: finetune}",
    "stages.evaluate.compare=[]",
    *(f"stages.{name}=null" for name in ("mae", "token", "student_alone", "distill")),
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_resnet_ends_like_one_never_killed_statistics_included(tmp_path: Path) -> None:
    torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
    imported = f"{{kind: import, source: {tmp_path}/resnet50.pth, format: torchvision, licence: none, model: {MODEL}}}"
    common = [*CHANGES, f"stages.imagenet={imported}", f"workspace={tmp_path}"]
    command = ["--stage", "finetune", "--config", str(TINY), *common]
    succeeded(vitruvian("run", str(TINY), "--until", "shards", *common))
    succeeded(vitruvian("run", str(TINY), "--only", "imagenet", *common))
    succeeded(run_stage(2, *command))
    undisturbed = only_run(tmp_path, "finetune").rename(tmp_path / "undisturbed")
    kill_when(lambda: last_step(tmp_path, "finetune") >= 4, *command)
    done = succeeded(run_stage(2, *command))
    assert "resumes, resume point of step" in done.stderr
    resumed = only_run(tmp_path, "finetune")
    assert read_artifact(resumed / "artifact").digest == read_artifact(undisturbed / "artifact").digest
    assert [line["loss"] for line in metrics(resumed)] == [line["loss"] for line in metrics(undisturbed)]
    weights = load_file(resumed / "artifact" / "model.safetensors")
    assert weights["backbone.bn1.running_mean"].any() and weights["backbone.bn1.num_batches_tracked"] == 6
    succeeded(vitruvian("run", str(TINY), "--only", "evaluate", *common))
