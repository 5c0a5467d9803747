"""Run by tests on two ranks: frozen parameters through training, a resume point and another engine; prints JSON.

Arguments: the part that is frozen, attention or ffn; ZeRO stage; precision; a folder for resume points.
The second engine starts from other weights, frozen ones too: whatever it ends with came from the resume point.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch

from launchers.run_stage import leave
from pipeline.checkpoint import ResumePoints, load_tensors
from pipeline.config import EngineConfig, RuntimeConfig
from pipeline.data.codec import CodecConfig
from pipeline.distributed import World, world_from_environment
from pipeline.engine import Engine
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import freeze, layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.objectives import PoseObjective
from pipeline.process_group import start_process_group

Part = Literal["attention", "ffn"]

BACKBONE = {
    "size": "micro",
    "image_size": (64, 48),
    "patch_size": 8,
    "attention": {"window": (3, 4), "shift": True, "pool": True, "relative_positions": True},
}
FROZEN = {
    "attention": (".attn.", ".norm1.", "backbone.pos_embed"),
    "ffn": (".mlp.", ".norm2.", "backbone.patch_embed.", "backbone.pos_embed"),
}
"""What the names of frozen parameters contain. Positions are frozen with either part: attention's model has fixed ones."""
POSITIONS = {"attention": "fixed", "ffn": "learned"}


def build(seed: int, part: Part, world: World, config: EngineConfig) -> tuple[Engine, dict[str, torch.Tensor]]:
    """An engine of a model of which one part is frozen, and what its weights were before."""
    torch.manual_seed(seed)
    backbone = {**BACKBONE, "positions": POSITIONS[part]}
    model = PoseModel(PoseConfig(backbone=backbone, decoder={"filters": 16}), {"coco": 17})
    model.init_weights()
    freeze(model, part)
    named = layer_decay_groups(model, 1e-3, 0.1, 0.8)
    groups = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} | {"lr": 0.0} for group in named]
    before = {f"model.{name}": each.detach().clone() for name, each in model.named_parameters()}
    engine = Engine(
        PoseObjective(model, CodecConfig(input_size=(64, 48), heatmap_size=(32, 24)), ["coco"]),
        groups,
        config,
        world,
        betas=(0.9, 0.999),
        gradient_clipping=1.0,
        global_batch_size=8,
        micro_batch_size=None,
    )
    return engine, before


def train(engine: Engine, batch: dict[str, Any], steps: range) -> None:
    """So many steps on one batch."""
    for step in steps:
        engine.train_step(iter([batch]), lambda group: 1e-3 * group["lr_scale"], lambda micro, step=step: step)


def main() -> None:
    """Five steps; and from the resume point after three, two more."""
    part, stage, precision, folder = cast(Part, sys.argv[-4]), int(sys.argv[-3]), sys.argv[-2], Path(sys.argv[-1])
    world = world_from_environment(RuntimeConfig(device="cpu"))
    start_process_group(world)
    generator = torch.Generator().manual_seed(world.rank)
    batch = {
        "images": torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(4, 17, 2, generator=generator) * 40,
        "visible": torch.ones(4, 17),
        "dataset": torch.zeros(4, dtype=torch.int64),
        "weight": torch.ones(4),
    }
    config = EngineConfig.model_validate({"zero_stage": stage, "precision": precision})
    engine, before = build(0, part, world, config)
    train(engine, batch, range(3))
    points = ResumePoints(folder, world)
    points.save(3, engine.state(), engine.buffers(), {})
    train(engine, batch, range(3, 5))
    expected = engine.weights()
    gradients = [
        name for name, each in engine.module.named_parameters() if not each.requires_grad and each.grad is not None
    ]

    other, _ = build(1, part, world, config)
    point = points.newest()
    assert point is not None
    tensors = load_tensors(point)
    other.load(tensors, iter([batch]))
    resumed = other.weights()
    train(other, batch, range(3, 5))
    final = other.weights()
    if world.is_main:
        frozen = [name for name in before if any(each in name for each in FROZEN[part])]
        report = {
            "names": sorted(expected) == sorted(before) == sorted(final),
            "frozen": len(frozen),
            "moved": [name for name in frozen if not torch.equal(expected[name], before[name])],
            "still": [name for name in before if name not in frozen and torch.equal(expected[name], before[name])],
            "lost": [name for name in frozen if not torch.equal(resumed[name], before[name])],
            "differing": [name for name in before if not torch.equal(final[name], expected[name])],
            "moments": [key for key in tensors if key.split("/")[1] in frozen and not key.startswith("weight/")],
            "gradients": gradients,
        }
        print(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
