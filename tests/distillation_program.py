"""Run by a test on two ranks: every-skeleton distillation of a student with a learned token under a ZeRO stage.

Rank 0 sees COCO only, rank 1 only people without keypoints. Prints losses, and those after going back to a resume point,
as JSON.
"""

import json
import sys
from collections.abc import Iterator

import torch

from launchers.run_stage import leave
from pipeline.config import EngineConfig, RuntimeConfig
from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import load_definition
from pipeline.distributed import gather_objects, leave_process_group, world_from_environment
from pipeline.engine import Batch, Engine
from pipeline.every_skeleton import EverySkeletonObjective
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.objectives import TeacherWeight
from pipeline.process_group import start_process_group

DEFINITIONS = {name: load_definition(name) for name in ("coco", "mpii")}
TOKEN = "weight/model.knowledge_token"


def _model(seed: int, tokens: int) -> PoseModel:
    torch.manual_seed(seed)
    backbone = {"size": "micro", "image_size": (64, 48), "patch_size": 8}
    config = PoseConfig(backbone=backbone, decoder={"filters": 16}, knowledge_tokens=tokens)
    model = PoseModel(config, {name: definition.num_keypoints for name, definition in DEFINITIONS.items()})
    model.init_weights()
    return model


def main() -> None:
    """Three steps, a resume point, three steps; back to the point, and the same three steps again."""
    zero_stage = int(sys.argv[-1])
    world = world_from_environment(RuntimeConfig(device="cpu"))
    start_process_group(world)
    teacher, student = _model(1, 0), _model(0, 1)
    for model, std in ((teacher, 30.0), (student, 0.1)):
        for decoder in model.decoders.values():
            torch.nn.init.normal_(decoder.final_layer.weight, std=std)
    assert student.knowledge_token is not None
    torch.nn.init.normal_(student.knowledge_token)
    student.learn_token()
    named = layer_decay_groups(student, 1e-3, 0.1, 0.8)
    groups = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} | {"lr": 0.0} for group in named]
    objective = EverySkeletonObjective(
        student,
        CodecConfig(input_size=(64, 48), heatmap_size=(32, 24)),
        ["coco", None],
        teacher,
        DEFINITIONS,
        distance=12,
        floor=1e-4,
        weight=TeacherWeight(1.0),
        precision="float32",
    )
    options = {"betas": (0.9, 0.999), "gradient_clipping": 1.0, "global_batch_size": 8, "micro_batch_size": 2}
    engine = Engine(objective, groups, EngineConfig(zero_stage=zero_stage), world, **options)
    shared: dict[str, float] = {}

    def train(steps: range) -> list[float]:
        losses = []
        for step in steps:
            outcome = engine.train_step(
                _batches(world.rank), lambda group: 1e-3 * group["lr_scale"], lambda micro, step=step: step
            )
            losses.append(outcome.loss)
            shared.update({name: float(value) for name, value in outcome.scalars.items()})
        return losses

    first = train(range(3))
    point = {name: value for share in gather_objects(engine.state()) for name, value in share.items()}
    buffers = gather_objects(engine.buffers())[world.rank]
    second = train(range(3, 6))
    engine.load(point, _batches(world.rank))
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(buffers[name])
    again = train(range(3, 6))
    weights = engine.weights()
    if world.is_main:
        moved = (weights["model.knowledge_token"] - point[TOKEN]).abs().max().item()
        moments = point[TOKEN.replace("weight", "exp_avg_sq")].abs().max().item()
        print(json.dumps({"losses": first + second, "again": again, "moved": moved, "moments": moments, **shared}))
    leave_process_group()


def _batches(rank: int) -> Iterator[Batch]:
    """Two micro-batches of two crops."""
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        yield {
            "images": torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=generator),
            "keypoints": torch.rand(2, 17, 2, generator=generator) * 40,
            "visible": torch.full((2, 17), 1.0 - rank),
            "dataset": torch.full((2,), rank),
            "weight": torch.ones(2),
        }


if __name__ == "__main__":
    main()
    leave(0)
