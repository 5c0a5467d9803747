"""Stage kind `distill`: a student taught by a frozen teacher's heatmaps, its knowledge token, both or neither.

Reads shards, and the teacher and the token that `distillation` asks for. Writes a pose model; one with a token carries
it, projected to the student's width. With neither term it is the same student trained alone, step for step. With
`every_skeleton` the teacher teaches all decoders on every crop, also on people without keypoints.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.data.definitions import load_definition
from pipeline.errors import ConfigError
from pipeline.models.config import PoseConfig
from pipeline.models.fit import why_other_heatmaps
from pipeline.recipe import PoseTrainingConfig
from pipeline.strict import AddedLater, Strict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.models.loading import PoseSpec
    from pipeline.models.pose import PoseModel
    from pipeline.pose_training import PoseSetup


class Inputs(Strict):
    """What is read."""

    shards: str
    """Person crops with keypoints; with `every_skeleton` also without."""
    init: str | None = None
    """A pretrained backbone for the student."""
    teacher: str | None = None
    """A pose model; needed by all but a student alone and a `learned` token."""
    token: str | None = None
    """A knowledge token that was fitted on this teacher."""
    data: str | None = None
    """Raw data for the periodic evaluation."""


class EverySkeleton(Strict):
    """The teacher's decoders teach the student's of the same name on every crop, where the teacher agrees with itself:
    keypoint by keypoint, its heatmaps of the crop and of its mirror image are compared."""

    agreement: float | None = Field(None, gt=0)
    """Heatmap pixels by which both peaks may differ; unset: the codec's sigma, 2 at 64x48."""
    floor: float = Field(0.2, gt=0, le=1)
    """Least height of both peaks; the evaluation's threshold for a keypoint that counts."""
    weight: float = Field(1.0, gt=0)
    """Of each decoder's term beside the ground truth's."""


class Distillation(Strict):
    """What the teacher teaches (ViTPose, table 8)."""

    output: bool = False
    """The student imitates the teacher's heatmaps."""
    token: bool = False
    """The student carries a knowledge token."""
    token_source: Annotated[Literal["fitted", "random", "learned"], AddedLater] = "fitted"
    """fitted: the teacher's, frozen; and the two controls: random, frozen, through the same bridge, and learned with the
    student. Given `inputs.token`, the controls have its number and its root mean square."""
    bridge: Annotated[Literal["orthogonal", "truncate"], AddedLater] = "orthogonal"
    """From the teacher's width to the student's: a seeded orthogonal projection, or the first channels."""
    output_weight: float = Field(1.0, gt=0)
    """Of the imitation term beside the ground truth's."""
    output_decay: Annotated[Literal["none", "linear"], AddedLater] = "none"
    """linear: the weight of the teacher's heatmaps falls to 0 over the stage (DWPose); the paper's is constant."""
    labelled_only: bool = False
    """Imitate labelled keypoints only; unset: all of the decoder's keypoints (the paper does not say)."""
    every_skeleton: Annotated[EverySkeleton | None, AddedLater] = None
    """In place of `output`: all decoders learn from the teacher on every crop."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "Distillation":
        if self.token_source != "fitted" and not self.token:
            raise ValueError(f"token_source {self.token_source!r} needs token: true")
        if self.bridge != "orthogonal" and (not self.token or self.token_source == "learned"):
            raise ValueError("bridge is of a token that comes from the teacher: fitted or random")
        if self.every_skeleton is not None and self.output:
            raise ValueError("every_skeleton teaches the crop's own decoder, too, in place of output: choose one")
        if self.every_skeleton is not None and self.labelled_only:
            raise ValueError("labelled_only is of output; every_skeleton teaches where the teacher agrees with itself")
        if self.output_decay != "none" and not self.teaches:
            raise ValueError("output_decay needs output or every_skeleton")
        return self

    @property
    def teaches(self) -> bool:
        """Whether the teacher's heatmaps are a target."""
        return self.output or self.every_skeleton is not None


class Config(PoseTrainingConfig):
    """Distillation."""

    kind: Literal["distill"]
    inputs: Inputs
    """Artifacts by role."""
    distillation: Distillation
    """The terms."""

    @model_validator(mode="after")
    def _inputs_fit_the_terms(self) -> "Config":
        terms = self.distillation
        if terms.every_skeleton and self.model.backbone.expert_width:
            raise ValueError("every_skeleton needs a backbone without experts: their features belong to one dataset")
        bridged = terms.token and terms.token_source != "learned"
        if (terms.teaches or bridged or self.inputs.token) and not self.inputs.teacher:
            raise ValueError("distillation needs inputs.teacher")
        needed = terms.token and terms.token_source == "fitted"
        if needed and not self.inputs.token or self.inputs.token and not terms.token:
            raise ValueError("distillation.token and inputs.token go together")
        if self.distillation.token and not self.model.backbone.takes_tokens:
            raise ValueError(
                f"distillation.token: a {self.model.backbone.kind} takes no token; the student must be a ViT"
            )
        if self.model.knowledge_tokens:
            raise ValueError("model.knowledge_tokens is set by the token, leave it out")
        return self

    def check(self, pipeline: PipelineConfig) -> None:
        """Adds the teacher's heatmaps, and people without keypoints, whom somebody must teach; as far as stages of this
        pipeline make teacher and shards."""
        super().check(pipeline)
        teacher = getattr(pipeline.stages.get(self.inputs.teacher or ""), "model", None)
        if isinstance(teacher, PoseConfig) and (reason := why_other_heatmaps(self.model, teacher)):
            raise ConfigError(f"inputs.teacher: {self.inputs.teacher} has {reason}; the student's must be the same")
        made = getattr(pipeline.stages.get(self.inputs.shards), "datasets", None) or ()
        definitions = [load_definition(source.name) for source in made]
        without = [definition.name for definition in definitions if not definition.num_keypoints]
        if without and self.distillation.every_skeleton is None:
            raise ConfigError(
                f"inputs.shards: {self.inputs.shards} holds {without[0]!r}, people without keypoints, whom only "
                f"distillation.every_skeleton teaches"
            )
        if without and len(without) == len(definitions):
            raise ConfigError(f"inputs.shards: {self.inputs.shards} holds people without keypoints only")


def run(context: Context, config: Config) -> None:
    """Collective. Trains the student to the end and publishes it."""
    from pipeline.models.loading import load_pose
    from pipeline.pose_training import PoseSetup, require_compatible

    setup = PoseSetup.of(context, config, unlabelled=config.distillation.every_skeleton is not None)
    teacher = None
    if context.has("teacher"):
        teacher, spec = load_pose(context.artifact("teacher"))
        require_compatible(setup.spec, spec)
    token = _token(context, config, spec if teacher is not None else None)
    if token is not None:
        setup = setup.with_tokens(token.shape[1])
    student = setup.new_model(context.artifact("init") if context.has("init") else None)
    if token is not None:
        assert student.knowledge_token is not None
        student.knowledge_token.copy_(token)
        if config.distillation.token_source == "learned":
            student.learn_token()
    if teacher is not None:
        teacher = teacher.to(context.world.device) if config.distillation.teaches else None
    result = setup.train(_objective(setup, config, student, teacher), student)

    def fill(staged: Path) -> None:
        setup.save(staged, result.tensors("model."))

    context.publish(fill, metrics=result.metrics, about={**setup.about(), **config.distillation.model_dump()})


def _token(context: Context, config: Config, teacher: "PoseSpec | None") -> "Tensor | None":
    """The student's knowledge token (1, T, C) as training starts, in its width."""
    from pipeline.models.knowledge_token import bridge, control_token
    from pipeline.models.loading import load_token

    terms, width = config.distillation, config.model.backbone.width
    if not terms.token:
        return None
    token = None
    if context.has("token"):
        assert teacher is not None, "the config asks for both"
        token = load_token(context.artifact("token"), context.artifact("teacher").digest, teacher.config.backbone.width)
    if terms.token_source == "learned":
        return control_token(token, width, context.seed)
    assert teacher is not None, "the config asks for it"
    if terms.token_source == "random":
        token = control_token(token, teacher.config.backbone.width, context.seed)
    assert token is not None, "the config asks for it"
    return bridge(token, width, context.seed, terms.bridge)


def _objective(setup: "PoseSetup", config: Config, student: "PoseModel", teacher: "PoseModel | None") -> "nn.Module":
    """What is minimised."""
    from pipeline.every_skeleton import EverySkeletonObjective
    from pipeline.objectives import DistillObjective, TeacherWeight

    terms, every = config.distillation, config.distillation.every_skeleton
    size = config.global_batch_size
    samples = size * config.total_steps(len(setup.collection.shards))
    weight = TeacherWeight(
        terms.output_weight if every is None else every.weight,
        samples if terms.output_decay == "linear" else None,
        size,
    )
    precision = setup.context.pipeline.engine.precision
    shared = student, setup.codec, setup.collection.learnable, teacher
    if every is None:
        return DistillObjective(*shared, weight=weight, labelled_only=terms.labelled_only, precision=precision)
    assert teacher is not None, "the config asks for it"
    return EverySkeletonObjective(
        *shared,
        setup.spec.datasets,
        distance=every.agreement if every.agreement is not None else setup.codec.spread,
        floor=every.floor,
        weight=weight,
        precision=precision,
    )
