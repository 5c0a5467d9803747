"""Stage kind `finetune`: one shared ViT and a decoder for each dataset, on ground-truth heatmaps (ViTPose).

Reads shards, a pretrained backbone where one is given, and raw data where it evaluates on the way. Writes a pose model.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.errors import ConfigError
from pipeline.recipe import PoseTrainingConfig
from pipeline.strict import AddedLater, Strict


class Inputs(Strict):
    """What is read."""

    shards: str
    """Person crops with keypoints."""
    init: str | None = None
    """A masked autoencoder, imported weights or another pose model; unset: from scratch."""
    data: str | None = None
    """Raw data for the periodic evaluation."""


class Config(PoseTrainingConfig):
    """Supervised training on keypoints."""

    kind: Literal["finetune"]
    inputs: Inputs
    """Artifacts by role."""
    freeze: Annotated[Literal["attention", "ffn"] | None, AddedLater] = None
    """Partial finetuning (ViTPose, table 6). attention: attention and first norm of every block stay as they begin;
    ffn: positions, patch embedding, MLP and second norm of every block. Needs inputs.init."""
    average_decay: float | None = Field(None, gt=0, lt=1)
    """Publish an exponential moving average of the weights with this decay; not with ZeRO 3. The evaluation on the way
    is of the weights themselves."""

    @model_validator(mode="after")
    def _one_choice_of_weights(self) -> "Config":
        if self.average_decay is not None and self.keep == "best":
            raise ValueError("average_decay publishes the average, keep: best the best weights: choose one")
        return self

    @model_validator(mode="after")
    def _frozen_parts_were_trained(self) -> "Config":
        if self.freeze is not None and not self.model.backbone.decay_blocks:
            raise ValueError(f"freeze is of a ViT's blocks; leave it out for a {self.model.backbone.kind}")
        if self.freeze is not None and self.inputs.init is None:
            raise ValueError(f"freeze: {self.freeze} would freeze random weights: give inputs.init, or leave it out")
        return self

    def check(self, pipeline: PipelineConfig) -> None:
        """Adds that an average of the weights needs them whole."""
        super().check(pipeline)
        if self.average_decay is not None and pipeline.engine.zero_stage == 3:
            raise ConfigError("average_decay keeps whole weights, which ZeRO 3 does not hold: use engine.zero_stage=1")


def run(context: Context, config: Config) -> None:
    """Collective. Trains to the end and publishes."""
    from pipeline.models.parameter_groups import freeze
    from pipeline.objectives import PoseObjective
    from pipeline.pose_training import PoseSetup

    setup = PoseSetup.of(context, config)
    model = setup.new_model(context.artifact("init") if context.has("init") else None)
    if config.freeze is not None:
        freeze(model, config.freeze)
    objective = PoseObjective(model, setup.codec, setup.collection.names)
    result = setup.train(objective, model, average_decay=config.average_decay)

    def fill(staged: Path) -> None:
        setup.save(staged, result.tensors("model."))

    context.publish(fill, metrics=result.metrics, about=setup.about())
