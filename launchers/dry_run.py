"""`--dry-run`: resolves everything, builds models without memory, prints sizes and steps, starts nothing."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from launchers import chain
from launchers.console import table
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.data.collection import open_shards
from pipeline.data.definitions import load_definition
from pipeline.errors import ConfigError
from pipeline.memory import estimate
from pipeline.models.backbones import count_parameters
from pipeline.models.config import MAEConfig, PoseConfig
from pipeline.models.cost import mae_cost, pose_cost
from pipeline.models.loading import PoseSpec, read_spec
from pipeline.models.mae import describe as describe_mae
from pipeline.models.parameter_groups import freeze
from pipeline.models.pose import PoseModel
from pipeline.models.pose import describe as describe_pose
from pipeline.models.vit_config import ViTConfig
from pipeline.recipe import TrainingConfig, split_batch

ZERO_STAGES = (1, 2, 3)
GPUS = 8
"""Of a machine that one looks for, where there would be one process."""


def print_dry_run(pipeline: PipelineConfig, chosen: list[str] | None = None, *, fresh: bool = False) -> None:
    """Three tables: what would happen to each stage, the memory of each model under ZeRO, and what the model costs.

    They have the chosen stages, all unless given, and those that these need, which the title names. fresh: the chosen
    start over.
    """
    plans = graph.plan(pipeline, chosen, fresh=fresh)
    others = ", ".join(name for name in plans if chosen and name not in chosen)
    table(
        f"{pipeline.name}: what would run{f' (needed, but not chosen: {others})' if others else ''}",
        ["stage", "kind", "next", "reason", "run directory"],
        [
            [p.name, p.config.kind, p.state, p.reason, str(p.run_dir or "known when its inputs are")]
            for p in plans.values()
        ],
    )
    models = [_Model.of(pipeline, plan) for plan in plans.values() if isinstance(plan.config, TrainingConfig)]
    if not models:
        return
    processes = chain.processes(pipeline)
    sharing = processes if processes > 1 else GPUS  # alone, a process shares nothing
    table(
        f"memory per process with {sharing} processes ({pipeline.engine.precision})",
        ["stage", *[f"ZeRO {stage}" for stage in ZERO_STAGES]],
        [
            [model.plan.name, *[model.memory(stage, sharing) for stage in ZERO_STAGES]]
            for model in models
            if model.config
        ],
    )
    title = f"models (processes: {processes}, ZeRO {pipeline.engine.zero_stage}, {pipeline.engine.precision})"
    columns = ["stage", "backbone", "whole model", "GMACs", "global batch", "memory per process", "steps"]
    table(title, columns, [model.row(processes) for model in models])


@dataclass(frozen=True)
class _Model:
    """A training stage and the sizes of its model."""

    pipeline: PipelineConfig
    plan: graph.StagePlan
    config: PoseConfig | MAEConfig | None
    """None where another stage's artifact brings the model."""
    backbone: int = 0
    total: int = 0
    frozen: int = 0
    teacher: int = 0
    """Parameters of the model that teaches this one."""
    macs: tuple[int, int] = (0, 0)
    """Of backbone or encoder, and of one decoder."""

    @classmethod
    def of(cls, pipeline: PipelineConfig, plan: graph.StagePlan) -> "_Model":
        config = getattr(plan.config, "model", None)
        if config is None:
            return cls(pipeline, plan, None)
        if isinstance(config, MAEConfig):
            sizes = count_parameters(config.backbone), describe_mae(config)["total"]
            return cls(pipeline, plan, config, *sizes, macs=mae_cost(config))
        keypoints = _keypoints(plan, pipeline)
        sizes = describe_pose(config, keypoints)
        frozen = _frozen(config, keypoints, getattr(plan.config, "freeze", None))
        macs = pose_cost(config, max(keypoints.values()))
        teacher = _teacher(plan, pipeline, keypoints)
        return cls(pipeline, plan, config, sizes["backbone"], sizes["total"], frozen, teacher, macs)

    def memory(self, zero_stage: int, processes: int) -> str:
        """Per process; "-" where the batch does not divide over so many."""
        assert self.config is not None
        engine = self.pipeline.engine.model_copy(update={"zero_stage": zero_stage})
        try:
            micro, _ = self._split(processes)
        except ConfigError:
            return "-"
        found = estimate(self.config, self.total, micro, processes, engine, frozen=self.frozen, teacher=self.teacher)
        return f"{found / 2**30:.2f} GiB"

    def row(self, processes: int) -> list[Any]:
        config = self.plan.config
        assert isinstance(config, TrainingConfig)
        micro, accumulation = self._split(processes)
        batch = f"{config.global_batch_size} = {micro} x {accumulation} x {processes}"
        if self.config is None:
            return [self.plan.name, "-", "-", "-", batch, "-", _steps(config, self.plan)]
        return [
            self.plan.name,
            _millions(self.backbone),
            _millions(self.total),
            " + ".join(f"{macs / 1e9:,.3g}" if macs < 1e10 else f"{macs / 1e9:,.1f}" for macs in self.macs),
            batch,
            self.memory(self.pipeline.engine.zero_stage, processes),
            _steps(config, self.plan),
        ]

    def _split(self, processes: int) -> tuple[int, int]:
        config = self.plan.config
        assert isinstance(config, TrainingConfig)
        return split_batch(config.global_batch_size, self.pipeline.runtime.micro_batch_size, processes)


def _frozen(config: PoseConfig, keypoints: dict[str, int], part: Literal["attention", "ffn"] | None) -> int:
    """Parameters that don't train."""
    fixed = isinstance(config.backbone, ViTConfig) and config.backbone.positions == "fixed"
    if part is None and not fixed:
        return 0
    with torch.device("meta"):
        model = PoseModel(config, keypoints)
    if part is not None:
        freeze(model, part)
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


def _teacher(plan: graph.StagePlan, pipeline: PipelineConfig, keypoints: dict[str, int]) -> int:
    """Parameters of a teacher that runs beside the student, from its artifact or the stage that will make it; else 0."""
    source = plan.inputs.get("teacher")
    if source is None or not plan.config.distillation.teaches:
        return 0
    if source.artifact is not None:
        spec = read_spec(source.artifact)
        return describe_pose(spec.config, spec.keypoints)["total"] if isinstance(spec, PoseSpec) else 0
    config = getattr(pipeline.stages.get(plan.config.references()["teacher"]), "model", None)
    return describe_pose(config, keypoints)["total"] if isinstance(config, PoseConfig) else 0


def _keypoints(plan: graph.StagePlan, pipeline: PipelineConfig) -> dict[str, int]:
    """K by dataset of the shards that a stage reads."""
    shards = plan.inputs.get("shards")
    if shards is None or shards.artifact is None:
        return _keypoints_to_come(plan, pipeline)
    definitions = open_shards(shards.artifact).definitions
    return {name: d.num_keypoints for name, d in definitions.items() if d.num_keypoints}


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
