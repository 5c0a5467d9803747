"""How long, how fast and in what batches a training stage learns: the config that all of them share."""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import PipelineConfig, StageConfig
from pipeline.config_file import did_you_mean
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import ConfigError
from pipeline.models.config import PoseConfig
from pipeline.models.fit import why_no_start
from pipeline.strict import NotInFingerprint, Strict


class Optimizer(Strict):
    """AdamW."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate for the global batch as it is."""
    base_lr: float | None = Field(None, gt=0)
    """Peak learning rate for a global batch of 256; scaled linearly (MAE, appendix A). Give this or `lr`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = Field(0.0, ge=0)
    """Not applied to biases, norms and position embeddings."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning-rate factor from a layer to the one below it; 1 is none (ViTPose, table 1)."""
    gradient_clipping: float | None = Field(None, gt=0)
    """Largest L2 norm of the gradient; null is none."""

    @model_validator(mode="after")
    def _one_rate(self) -> "Optimizer":
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError("give either lr or base_lr")
        return self

    def peak(self, global_batch_size: int) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * global_batch_size / 256


class Schedule(Strict):
    """Learning rate over the steps: a linear warm-up, then the shape."""

    shape: Literal["cosine", "step", "constant"] = "cosine"
    """Half a cosine down to zero; steps down by 10 at the milestones; or flat."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """The same in epochs; give one of them."""
    warmup_start: float = Field(0.0, ge=0, le=1)
    """The first step's factor."""
    milestones: list[float] = []
    """Where the rate falls by 10, as fractions of the whole length (ViTPose: 170/210 and 200/210)."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Schedule":
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("give warmup_steps or warmup_epochs, not both")
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError("milestones are fractions between 0 and 1")
        if bool(self.milestones) != (self.shape == "step"):
            raise ValueError("milestones and shape 'step' go together")
        return self

    def factor(self, step: int, total: int, steps_per_epoch: float) -> float:
        """The factor on the peak rate for optimizer step `step` (from 0)."""
        warmup = self.warmup_steps or self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup
        if self.shape == "cosine":
            progress = (step - warmup) / max(1.0, total - warmup)
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.shape == "step":
            return 0.1 ** sum(step >= round(milestone * total) for milestone in self.milestones)
        return 1.0


class Skipping(Strict):
    """Steps that are left out: all ranks decide together, the weights stay as they were, the schedule goes on."""

    max_in_a_row: Annotated[int, NotInFingerprint] = Field(10, ge=0)
    """A loss or gradient that is not finite skips its step; after more than so many in a row the stage stops."""
    spike_factor: float | None = Field(None, gt=1)
    """Skips a step whose loss is above so many times the median of the last 100; null: none is skipped for that."""


class TrainingConfig(StageConfig):
    """What every training stage's section has."""

    distributed: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    """True for kinds that know which layer a parameter is of."""

    steps: int | None = Field(None, ge=1, le=1_000_000_000)
    """Length in optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(None, gt=0, le=1_000_000)
    """Length in passes over the shards."""
    global_batch_size: int = Field(ge=1, le=10_000_000)
    """Samples per optimizer step over all ranks; per-rank batch and accumulation derive from it."""
    optimizer: Optimizer
    """Rates and decays."""
    schedule: Schedule = Schedule()
    """The rate over time."""
    skipping: Skipping = Skipping()
    """What to do about steps that would do harm."""
    save_every: Annotated[int | None, NotInFingerprint] = Field(None, ge=1)
    """Steps between resume points; unset: a tenth of the stage, at most 1,000 steps."""
    max_bad_fraction: Annotated[float, NotInFingerprint] = Field(0.001, ge=0, le=1)
    """Share of unreadable samples at which the stage stops."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    @model_validator(mode="after")
    def _layer_decay_needs_layers(self) -> "TrainingConfig":
        if self.optimizer.layer_decay != 1 and not self.layered:
            raise ValueError("optimizer.layer_decay is of stages that train a pose model; leave it out here")
        return self

    def total_steps(self, samples_per_epoch: int) -> int:
        """Optimizer steps of the whole stage."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        # Rounded first: 1.1 epochs of 100 samples are 110 samples, not 110.00000000000001.
        return max(1, math.ceil(round(self.epochs * samples_per_epoch / self.global_batch_size, 6)))

    def save_interval(self, total_steps: int) -> int:
        """Steps between two resume points."""
        return self.save_every or max(1, min(1000, total_steps // 10))

    def learning_rate(self, total_steps: int, samples_per_epoch: int) -> Callable[[int, dict[str, Any]], float]:
        """The rate of a parameter group at a step: peak x schedule x the group's `lr_scale`."""
        peak = self.optimizer.peak(self.global_batch_size)
        steps_per_epoch = samples_per_epoch / self.global_batch_size

        def rate(step: int, group: dict[str, Any]) -> float:
            return peak * self.schedule.factor(step, total_steps, steps_per_epoch) * group.get("lr_scale", 1.0)

        return rate


def split_batch(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Micro-batch per rank and accumulation: global = micro x accumulation x world. Raises ConfigError if it can't be."""
    per_rank, rest = divmod(global_batch_size, world_size)
    if rest or per_rank == 0:
        counts = _nearest_counts(global_batch_size, micro_batch_size, world_size)
        raise ConfigError(
            f"global_batch_size {global_batch_size} does not divide over {world_size} processes"
            f"{f': use {counts} of them' if counts else ''}, or another global_batch_size"
        )
    micro = min(micro_batch_size or per_rank, per_rank)
    if per_rank % micro:
        raise ConfigError(
            f"runtime.micro_batch_size {micro} does not divide the {per_rank} samples per process "
            f"(global_batch_size {global_batch_size} over {world_size} processes)"
        )
    return micro, per_rank // micro


def _nearest_counts(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> str:
    """The next smaller and the next larger number of processes that work, in words."""

    def works(count: int) -> bool:
        per_rank, rest = divmod(global_batch_size, count)
        return not rest and not per_rank % min(micro_batch_size or per_rank, per_rank)

    smaller = next((count for count in range(min(world_size - 1, global_batch_size), 0, -1) if works(count)), None)
    larger = next((count for count in range(world_size + 1, global_batch_size + 1) if works(count)), None)
    return " or ".join(str(count) for count in (smaller, larger) if count is not None)


class PeriodicEvaluation(Strict):
    """Ground-truth boxes, no flip test: quick, for comparison along the way."""

    every: int = Field(ge=1)
    """Steps between evaluations; the last step is always evaluated."""
    source: DatasetSource
    """A validation split."""
    people: int | None = Field(None, ge=1)
    """Only the images of the first so many people."""


class PoseTrainingConfig(TrainingConfig):
    """What stages that train a pose model on shards share."""

    layered: ClassVar[bool] = True

    model: PoseConfig
    """Backbone and decoders."""
    augmentation: PoseAugmentation = PoseAugmentation()
    """Of windows; the released settings of ViTPose unless changed."""
    sigma: float | None = Field(None, gt=0)
    """Of target heatmaps, in heatmap pixels; unset: 2 at 64x48, scaled with the heatmap."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Sampling weights by dataset, with replacement; unset: every sample once an epoch."""
    evaluation: PeriodicEvaluation | None = None
    """Periodic evaluation; needs inputs.data."""
    keep: Literal["last", "best"] = "last"
    """Publish the last weights, or those of the best evaluation (which flatters on the split that chose them)."""

    @model_validator(mode="after")
    def _layer_decay_needs_blocks(self) -> "PoseTrainingConfig":
        backbone = self.model.backbone
        if self.optimizer.layer_decay != 1 and not backbone.decay_blocks:
            raise ValueError(f"optimizer.layer_decay is of ViTs; leave it out for a {backbone.kind}")
        return self

    @model_validator(mode="after")
    def _evaluation_is_possible(self) -> "PoseTrainingConfig":
        if self.keep == "best" and self.evaluation is None:
            raise ValueError("keep: best needs an evaluation")
        if self.evaluation is not None and "data" not in self.references():
            raise ValueError("evaluation needs inputs.data, the raw data to evaluate on")
        return self

    def check(self, pipeline: PipelineConfig) -> None:
        """The start fits, and weights are of datasets in the shards, as far as stages of this pipeline make either."""
        start = getattr(pipeline.stages.get(self.references().get("init", "")), "model", None)
        if start is not None and (reason := why_no_start(self.model.backbone, start.backbone)):
            raise ConfigError(f"inputs.init: {self.references()['init']} is {reason}")
        made = getattr(pipeline.stages.get(self.references()["shards"]), "datasets", None)
        if self.weights is None or made is None:
            return
        names = [load_definition(source.name).name for source in made]
        unknown = [name for name in self.weights if name not in names]
        if unknown:
            raise ConfigError(
                f"weights: {unknown[0]!r} is not among the datasets of the shards{did_you_mean(unknown[0], names)}"
            )
        if not sum(self.weights.values()):
            raise ConfigError("weights: at least one must be above 0")

    def sources(self) -> list[DatasetSource]:
        """Raw data that is read."""
        return [self.evaluation.source] if self.evaluation else []
