"""Stage kind `distill`: a student taught by a frozen teacher's heatmaps, its knowledge token, both or neither.

Reads shards, and the teacher and the token that `distillation` asks for. Writes a pose model; one with a token carries
it, projected to the student's width. With neither term it is the same student trained alone, step for step.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.context import Context
from pipeline.recipe import PoseTrainingConfig
from pipeline.strict import Strict


class Inputs(Strict):
    """What is read."""

    shards: str
    """Person crops with keypoints."""
    init: str | None = None
    """A pretrained backbone for the student."""
    teacher: str | None = None
    """A pose model; needed by both kinds of distillation."""
    token: str | None = None
    """A knowledge token that was fitted on this teacher."""
    data: str | None = None
    """Raw data for the periodic evaluation."""


class Distillation(Strict):
    """What the teacher teaches (ViTPose, table 8)."""

    output: bool = False
    """The student imitates the teacher's heatmaps."""
    token: bool = False
    """The student carries the teacher's knowledge token, frozen."""
    output_weight: float = Field(1.0, gt=0)
    """Of the imitation term beside the ground truth's."""
    labelled_only: bool = False
    """Imitate labelled keypoints only; unset: all of the decoder's keypoints (the paper does not say)."""


class Config(PoseTrainingConfig):
    """Distillation."""

    kind: Literal["distill"]
    inputs: Inputs
    """Artifacts by role."""
    distillation: Distillation
    """The terms."""

    @model_validator(mode="after")
    def _inputs_fit_the_terms(self) -> "Config":
        if (self.distillation.output or self.distillation.token) and not self.inputs.teacher:
            raise ValueError("distillation needs inputs.teacher")
        if self.distillation.token != bool(self.inputs.token):
            raise ValueError("distillation.token and inputs.token go together")
        if self.distillation.token and not self.model.backbone.takes_tokens:
            raise ValueError(
                f"distillation.token: a {self.model.backbone.kind} takes no token; the student must be a ViT"
            )
        if self.model.knowledge_tokens:
            raise ValueError("model.knowledge_tokens is set by the token, leave it out")
        return self


def run(context: Context, config: Config) -> None:
    """Collective. Trains the student to the end and publishes it."""
    from pipeline.models.knowledge_token import bridge
    from pipeline.models.loading import load_pose, load_token
    from pipeline.objectives import DistillObjective
    from pipeline.pose_training import PoseSetup, require_compatible

    setup = PoseSetup.of(context, config)
    teacher = token = None
    if context.has("teacher"):
        teacher, spec = load_pose(context.artifact("teacher"))
        require_compatible(setup.spec, spec)
    if config.distillation.token:
        assert teacher is not None, "the config asks for both"
        width = teacher.config.backbone.width
        fitted = load_token(context.artifact("token"), context.artifact("teacher").digest, width)
        token = bridge(fitted, config.model.backbone.width, context.seed)
        setup = setup.with_tokens(token.shape[1])
    student = setup.new_model(context.artifact("init") if context.has("init") else None)
    if token is not None:
        assert student.knowledge_token is not None
        student.knowledge_token.copy_(token)
    objective = DistillObjective(
        student,
        setup.codec,
        setup.collection.names,
        teacher.to(context.world.device) if teacher is not None and config.distillation.output else None,
        output_weight=config.distillation.output_weight,
        labelled_only=config.distillation.labelled_only,
        precision=context.pipeline.engine.precision,
    )
    result = setup.train(objective, student)

    def fill(staged: Path) -> None:
        setup.save(staged, result.tensors("model."))

    context.publish(fill, metrics=result.metrics, about={**setup.about(), **config.distillation.model_dump()})
