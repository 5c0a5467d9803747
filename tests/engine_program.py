"""Run by tests on two ranks: two ranks with disjoint datasets train under a ZeRO stage; prints the losses as JSON.

Each dataset has its expert in every block; nobody ever sees the third one.
"""

import json
import sys

import torch

from launchers.run_stage import leave
from pipeline.config import EngineConfig, RuntimeConfig
from pipeline.data.codec import CodecConfig
from pipeline.distributed import world_from_environment
from pipeline.engine import Engine
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.objectives import PoseObjective
from pipeline.process_group import shared_memory, start_process_group

NAMES = ["coco", "mpii"]
KEYPOINTS = {"coco": 17, "aic": 14, "mpii": 16}


def main() -> None:
    """Rank 0 only ever sees coco, rank 1 only mpii."""
    zero_stage = int(sys.argv[-1])
    world = world_from_environment(RuntimeConfig(device="cpu"))
    start_process_group(world)
    assert not shared_memory(world.rank), "a killed rank would leave it behind"
    torch.manual_seed(0)
    backbone = {"size": "micro", "image_size": (64, 48), "patch_size": 8, "expert_width": 8}
    model = PoseModel(PoseConfig(backbone=backbone, decoder={"filters": 16}), KEYPOINTS)
    model.init_weights()
    codec = CodecConfig(input_size=(64, 48), heatmap_size=(32, 24))
    named = layer_decay_groups(model, 1e-3, 0.1, 0.8)
    groups = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} | {"lr": 0.0} for group in named]
    engine = Engine(
        PoseObjective(model, codec, NAMES),
        groups,
        EngineConfig(zero_stage=zero_stage),
        world,
        betas=(0.9, 0.999),
        gradient_clipping=1.0,
        global_batch_size=8,
        micro_batch_size=None,
    )
    generator = torch.Generator().manual_seed(world.rank)
    batch = {
        "images": torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(4, 17, 2, generator=generator) * 40,
        "visible": torch.ones(4, 17),
        "dataset": torch.full((4,), world.rank),
        "weight": torch.ones(4),
    }
    losses = []
    for step in range(6):
        outcome = engine.train_step(
            iter([batch]), lambda group: 1e-3 * group["lr_scale"], lambda micro, step=step: step
        )
        losses.append(outcome.loss)
    buffers = engine.averaged_buffers()
    means = {name: buffers[f"model.decoders.{name}.deconv_layers.1.running_mean"].abs().sum().item() for name in NAMES}
    weights = engine.weights()
    if world.is_main:
        grown = {
            name: weights[f"model.backbone.blocks.1.mlp.experts.{name}.bias"].abs().sum().item() for name in KEYPOINTS
        }
        print(json.dumps({"losses": losses, "running_means": means, "experts": grown}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
