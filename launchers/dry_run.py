"""`--dry-run`: resolves everything, builds models without memory, prints sizes and steps, starts nothing."""

from typing import Any

from launchers.console import table
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.data.collection import open_shards
from pipeline.data.definitions import load_definition
from pipeline.memory import estimate
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.mae import describe as describe_mae
from pipeline.models.pose import describe as describe_pose
from pipeline.models.vit import count_parameters
from pipeline.recipe import TrainingConfig, split_batch


def print_dry_run(pipeline: PipelineConfig, only: list[str] | None = None) -> None:
    """Two tables: what would happen to each stage, and what each model costs."""
    plans = graph.plan(pipeline, only)
    table(
        f"{pipeline.name}: what would run",
        ["stage", "kind", "next", "reason", "run directory"],
        [
            [p.name, p.config.kind, p.state, p.reason, str(p.run_dir or "known when its inputs are")]
            for p in plans.values()
        ],
    )
    rows = [_model_row(pipeline, plan) for plan in plans.values() if isinstance(plan.config, TrainingConfig)]
    columns = ["stage", "backbone", "whole model", "global batch", "memory per process", "steps"]
    if rows:
        processes = pipeline.runtime.processes or 1
        title = f"models (processes: {processes}, ZeRO {pipeline.engine.zero_stage}, {pipeline.engine.precision})"
        table(title, columns, rows)


def _model_row(pipeline: PipelineConfig, plan: graph.StagePlan) -> list[Any]:
    config = plan.config
    assert isinstance(config, TrainingConfig)
    processes = pipeline.runtime.processes or 1
    micro, accumulation = split_batch(config.global_batch_size, pipeline.runtime.micro_batch_size, processes)
    batch = f"{config.global_batch_size} = {micro} x {accumulation} x {processes}"
    model = getattr(config, "model", None)
    if model is None:
        return [plan.name, "-", "-", batch, "-", _steps(config, plan)]
    backbone, total = _parameters(model, plan, pipeline)
    memory = estimate(model, total, micro, processes, pipeline.engine)
    return [
        plan.name,
        _millions(backbone),
        _millions(total),
        batch,
        f"{memory / 2**30:.2f} GiB",
        _steps(config, plan),
    ]


def _parameters(model: PoseConfig | MAEConfig, plan: graph.StagePlan, pipeline: PipelineConfig) -> tuple[int, int]:
    """Of the backbone and of the whole model."""
    if isinstance(model, MAEConfig):
        return count_parameters(model.backbone), describe_mae(model)["total"]
    shards = plan.inputs.get("shards")
    if shards is not None and shards.artifact is not None:
        keypoints = {
            name: d.num_keypoints for name, d in open_shards(shards.artifact).definitions.items() if d.num_keypoints
        }
    else:
        keypoints = _keypoints_to_come(plan, pipeline)
    counts = describe_pose(model, keypoints)
    return counts["backbone"], counts["total"]


def _keypoints_to_come(plan: graph.StagePlan, pipeline: PipelineConfig) -> dict[str, int]:
    """K by dataset of shards that are not made yet, from the stage that will make them."""
    shards = pipeline.stages.get(plan.config.references().get("shards", ""))
    definitions = [load_definition(source.name) for source in getattr(shards, "datasets", ())]
    return {definition.name: definition.num_keypoints for definition in definitions if definition.num_keypoints}


def _steps(config: TrainingConfig, plan: graph.StagePlan) -> str:
    if config.steps is not None:
        return f"{config.steps:,}"
    shards = plan.inputs.get("shards")
    if shards is None or shards.artifact is None:
        return f"{config.epochs:g} epochs of shards not made yet"
    return f"{config.total_steps(len(open_shards(shards.artifact).shards)):,}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M"
