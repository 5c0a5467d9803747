"""A slice of the 1B model: two blocks at its full width train under every ZeRO stage, with gradient checkpointing."""

import json
import subprocess
import sys

import pytest

from tests.chain.running import ROOT, environment

_PROGRAM = """
import json, sys, torch
from pipeline.config import EngineConfig, RuntimeConfig
from pipeline.data.codec import CodecConfig
from pipeline.distributed import world_from_environment
from pipeline.engine import Engine
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.objectives import PoseObjective
from pipeline.process_group import start_process_group

world = world_from_environment(RuntimeConfig(device="cpu"))
start_process_group(world)
torch.manual_seed(0)
backbone = {"size": "1B", "depth": 2, "image_size": (64, 48), "gradient_checkpointing": True}
model = PoseModel(PoseConfig(backbone=backbone, decoder={"filters": 32}), {"coco": 17})
model.init_weights()
groups = [{k: g[k] for k in ("params", "weight_decay", "lr_scale")} | {"lr": 0.0}
          for g in layer_decay_groups(model, 1e-4, 0.1, 0.85)]
engine = Engine(PoseObjective(model, CodecConfig(input_size=(64, 48), heatmap_size=(16, 12)), ["coco"]), groups,
                EngineConfig(zero_stage=int(sys.argv[-1])), world, betas=(0.9, 0.999), gradient_clipping=1.0,
                global_batch_size=4, micro_batch_size=None)
batch = {"images": torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8), "keypoints": torch.rand(4, 17, 2) * 40,
         "visible": torch.ones(4, 17), "dataset": torch.zeros(4, dtype=torch.int64), "weight": torch.ones(4)}
losses = [engine.train_step(iter([batch]), lambda g: 1e-3 * g["lr_scale"], lambda m: s).loss for s in range(4)]
print(json.dumps(losses))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_blocks_of_the_1b_model_train(zero_stage: int) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(zero_stage)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    assert losses[-1] < losses[0]
