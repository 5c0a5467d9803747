"""Stage kind `token`: a knowledge token fitted on a frozen teacher (ViTPose, eq. 5).

Reads shards and a pose model. Writes the token, which names its teacher by digest, and the teacher's loss without and
with it. The teacher's weights and batch-norm statistics are digested before and after: nothing but the token changes.
"""

from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.data.augmentation import PoseAugmentation
from pipeline.errors import ConfigError
from pipeline.models.config import PoseConfig
from pipeline.recipe import TrainingConfig
from pipeline.strict import Strict


class Inputs(Strict):
    """What is read."""

    shards: str
    """Person crops with keypoints, of the teacher's datasets."""
    teacher: str
    """A pose model."""


class Config(TrainingConfig):
    """Knowledge token."""

    kind: Literal["token"]
    inputs: Inputs
    """Artifacts by role."""
    tokens: int = Field(1, ge=1)
    """Number of tokens; the paper's memory figures suggest one."""
    augmentation: PoseAugmentation = PoseAugmentation()
    """Of windows; the released settings unless changed, whatever the teacher had."""
    measured_batches: int = Field(16, ge=1)
    """Batches, without augmentation, on which the loss before and after is measured."""

    def check(self, pipeline: PipelineConfig) -> None:
        """The teacher takes tokens, as far as a stage of this pipeline makes it."""
        model = getattr(pipeline.stages.get(self.inputs.teacher), "model", None)
        if isinstance(model, PoseConfig):
            _require_tokens(model)


def _require_tokens(teacher: PoseConfig) -> None:
    if not teacher.backbone.takes_tokens:
        raise ConfigError(
            f"inputs.teacher: a {teacher.backbone.kind} takes no knowledge token; the teacher must be a ViT"
        )


def run(context: Context, config: Config) -> None:
    """Collective. Fits the token and publishes it."""
    import torch

    from pipeline.data.collection import open_shards
    from pipeline.data.loader import PoseView
    from pipeline.models.loading import PoseSpec, TokenSpec, load_pose, read_spec, save_model
    from pipeline.objectives import TokenObjective
    from pipeline.training import mean_loss, state_digest, train

    artifact = context.artifact("teacher")
    described = read_spec(artifact)
    if isinstance(described, PoseSpec):
        _require_tokens(described.config)
    teacher, spec = load_pose(artifact)
    input_hw = spec.config.backbone.image_size
    collection = open_shards(context.artifact("shards"), input_hw, context.sample_cache)
    collection.require_same(spec.datasets, "the teacher")
    before = state_digest(teacher)
    torch.manual_seed(context.seed)
    teacher.to(context.world.device)
    objective = TokenObjective(teacher, spec.codec, collection.names, config.tokens)
    view = PoseView(input_hw, collection.definitions, config.augmentation)
    groups = [{"params": [objective.token], "weight_decay": config.optimizer.weight_decay}]
    result = train(context, config, objective, groups, collection, view)

    token = result.tensors()["token"].to(context.world.device) if context.world.is_main else None
    assert state_digest(teacher.cpu()) == before, "the teacher changed while the token was fitted"
    metrics = dict(result.metrics)
    if token is not None:
        plain = PoseView(input_hw, collection.definitions, None)
        batches = list(islice(result.batches(plain), config.measured_batches))
        teacher.to(context.world.device)
        metrics["teacher_loss_without_token"] = mean_loss(teacher, None, spec.codec, collection.names, batches)
        metrics["teacher_loss_with_token"] = mean_loss(teacher, token, spec.codec, collection.names, batches)

    def fill(staged: Path) -> None:
        assert token is not None
        description = TokenSpec(teacher=artifact.digest, tokens=config.tokens, width=token.shape[-1])
        save_model(staged, description, {"token": token})

    about = {**collection.about(), "teacher": artifact.digest, "teacher state before and after": before}
    context.publish(fill, metrics=metrics, about=about)
