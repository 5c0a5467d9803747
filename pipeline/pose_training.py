"""What stages that train a pose model share: building it, initialising it, evaluating it on the way, saving it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts import Artifact
from pipeline.context import Context
from pipeline.data.annotations import read
from pipeline.data.codec import CodecConfig
from pipeline.data.collection import Collection, open_shards
from pipeline.data.loader import PoseView
from pipeline.distributed import autocast, loader_workers
from pipeline.errors import ArtifactError, ConfigError
from pipeline.evaluation.inference import predict, requests_from_ground_truth
from pipeline.evaluation.score import headline, score
from pipeline.models.experts import grow_experts
from pipeline.models.fit import why_no_start
from pipeline.models.loading import (
    EncoderSpec,
    MAESpec,
    PoseSpec,
    Spec,
    TokenSpec,
    load_pose,
    read_spec,
    read_tensors,
    require_fit,
    save_model,
)
from pipeline.models.mae import backbone_state
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.models.vit import interpolate_positions
from pipeline.recipe import PoseTrainingConfig
from pipeline.training import Evaluation, TrainingResult, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoseSetup:
    """A pose model about to be trained on shards."""

    context: Context
    config: PoseTrainingConfig
    collection: Collection
    spec: PoseSpec

    @classmethod
    def of(cls, context: Context, config: PoseTrainingConfig, unlabelled: bool = False) -> "PoseSetup":
        """Opens the shards and fixes the codec; `unlabelled`: they may hold people without keypoints.

        Raises ConfigError or ArtifactError where they do not fit.
        """
        input_hw = config.model.backbone.image_size
        collection = open_shards(context.artifact("shards"), input_hw, context.sample_cache)
        collection.require_keypoints(unlabelled)
        codec = CodecConfig(input_size=input_hw, heatmap_size=config.model.heatmap_size, sigma=config.sigma)
        spec = PoseSpec(config=config.model, datasets=collection.labelled, codec=codec)
        return cls(context, config, collection, spec)

    @property
    def codec(self) -> CodecConfig:
        """Between keypoints and heatmaps."""
        return self.spec.codec

    def with_tokens(self, count: int) -> "PoseSetup":
        """The same with room for a knowledge token in the model."""
        model = self.spec.config.model_copy(update={"knowledge_tokens": count})
        return replace(self, spec=self.spec.model_copy(update={"config": model}))

    def new_model(self, init: Artifact | None) -> PoseModel:
        """A freshly initialised model: the same for every stage of the pipeline; then, `init`'s tensors over it."""
        torch.manual_seed(self.context.seed)
        model = PoseModel(self.spec.config, self.spec.keypoints)
        model.init_weights()
        if init is not None:
            initialise(model, init)
        return model

    def train(self, objective: nn.Module, model: PoseModel, average_decay: float | None = None) -> TrainingResult:
        """Collective. Trains with layer-wise rates, evaluating on the way where the config says so."""
        optimizer = self.config.optimizer
        peak = optimizer.peak(self.config.global_batch_size)
        named = layer_decay_groups(model, peak, optimizer.weight_decay, optimizer.layer_decay)
        groups = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in named]
        view = PoseView(self.codec.input_size, self.collection.definitions, self.config.augmentation)
        return train(
            self.context,
            self.config,
            objective,
            groups,
            self.collection,
            view,
            weights=self.config.weights,
            evaluation=self._evaluation(),
            average_decay=average_decay,
            keep_best=self.config.keep == "best",
        )

    def save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the model artifact's files, after checking that the tensors fit the description."""
        with torch.device("meta"):
            expected = PoseModel(self.spec.config, self.spec.keypoints)
        require_fit(expected, tensors, "the trained model")
        save_model(folder, self.spec, tensors)

    def about(self) -> dict[str, Any]:
        """Lines for the card."""
        backbone = self.spec.config.backbone
        return {
            **self.collection.about(),
            "backbone": backbone.summary,
            "input": "x".join(map(str, backbone.image_size)),
        }

    def _evaluation(self) -> Evaluation | None:
        wanted = self.config.evaluation
        if wanted is None:
            return None
        annotations = read(wanted.source, self.context.data_root())
        definition = annotations.definition
        if definition.name not in self.spec.datasets:
            raise ConfigError(f"evaluation on {definition.name!r}, which is not among the datasets of the shards")
        requests = requests_from_ground_truth(annotations, self.codec.input_size)
        # Whole images only: a person without a request would count as missed.
        names = {request.image_id for request in requests[: wanted.people]}
        requests = [request for request in requests if request.image_id in names]

        workers = loader_workers(self.context.pipeline.runtime.workers, self.context.world, on_cpu=0)

        def evaluate(objective: nn.Module) -> dict[str, float]:
            with autocast(self.context.pipeline.engine.precision, self.context.world.device):
                predictions = predict(
                    objective.model,
                    definition,
                    requests,
                    self.codec,
                    flip=False,
                    workers=workers,
                    world=self.context.world,
                    max_bad_fraction=self.config.max_bad_fraction,
                    tick=self.context.tick,
                )
            return score(annotations, predictions, image_ids=names).metrics

        return wanted.every, evaluate, headline(definition)


def initialise(model: PoseModel, artifact: Artifact) -> None:
    """Loads what another model offers: an encoder, an autoencoder's, or a pose model's backbone and equal decoders.

    Positions are interpolated where the grid differs; experts of a model that has some come from a plain MLP's or from
    those of the same datasets (`grow_experts`). Logs what stays fresh. Raises ArtifactError where a tensor does not fit,
    ConfigError where the source has experts and the model none, or lacks one of its experts.
    """
    spec = read_spec(artifact)
    _require_architecture(model, spec, artifact)
    if isinstance(spec, MAESpec):
        state, dropped = backbone_state(read_tensors(artifact))
        grid = spec.config.backbone.grid
    elif isinstance(spec, EncoderSpec):
        state, dropped, grid = read_tensors(artifact), [], spec.config.backbone.grid
    elif isinstance(spec, PoseSpec):
        source = load_pose(artifact)[0]
        state, dropped = dict(source.backbone.state_dict()), _take_decoders(model, source, spec)
        dropped += _take_token(model, source)
        grid = spec.config.backbone.grid
    else:
        raise ArtifactError(f"{artifact.path}: a {spec.model} can't initialise a pose model")
    target = model.backbone.state_dict()
    if model.config.backbone.expert_width:
        state = grow_experts(state, target, str(artifact.path))
    elif spec.config.backbone.expert_width:
        raise ConfigError(
            f"{artifact.path}: has experts ({', '.join(spec.datasets)}), this model has none; take one of them out with "
            "`vitruvian split` and start from that, or set model.backbone.expert_width"
        )
    if "pos_embed" in state and grid != model.config.backbone.grid:
        state["pos_embed"] = interpolate_positions(state["pos_embed"], grid, model.config.backbone.grid)
    for name, value in state.items():
        if name not in target or target[name].shape != value.shape:
            expected = tuple(target[name].shape) if name in target else "no such tensor"
            raise ArtifactError(f"{artifact.path}: {name} {tuple(value.shape)} does not fit the backbone: {expected}")
    model.backbone.load_state_dict({**target, **state})
    fresh = sorted(target.keys() - state.keys())
    left = ", ".join(dropped) if isinstance(spec, PoseSpec) else f"{len(dropped)} tensors"
    logger.info("backbone from %s; fresh: %s; left out: %s", artifact.path, fresh or "nothing", left or "nothing")


def _require_architecture(model: PoseModel, spec: Spec, artifact: Artifact) -> None:
    """Raises ArtifactError for a backbone of another architecture, whether or not its tensors would fit."""
    if isinstance(spec, TokenSpec):
        return
    if reason := why_no_start(model.config.backbone, spec.config.backbone):
        raise ArtifactError(f"{artifact.path}: {reason}")


def _take_decoders(model: PoseModel, source: PoseModel, spec: PoseSpec) -> list[str]:
    """Loads the decoders of the same name and shape. Returns the names of those that stay behind."""
    left = []
    for name, decoder in source.decoders.items():
        own = dict(model.decoders.items()).get(name)
        shapes = {key: value.shape for key, value in decoder.state_dict().items()}
        if own is not None and {key: value.shape for key, value in own.state_dict().items()} == shapes:
            own.load_state_dict(decoder.state_dict())
        else:
            left.append(name)
    return left


def _take_token(model: PoseModel, source: PoseModel) -> list[str]:
    """Copies a knowledge token of the same shape. Returns its name where it stays behind."""
    own, token = model.knowledge_token, source.knowledge_token
    if token is None:
        return []
    if own is None or own.shape != token.shape:
        return ["knowledge_token"]
    with torch.no_grad():
        own.copy_(token)
    return []


def require_compatible(student: PoseSpec, teacher: PoseSpec) -> None:
    """Refuses a teacher whose heatmaps mean something else. Raises ConfigError."""
    shared = [name for name in student.datasets if name in teacher.datasets]
    if not shared:
        raise ConfigError(f"the teacher has no decoder for any of {', '.join(student.datasets)}")
    for name in shared:
        if student.datasets[name].keypoints != teacher.datasets[name].keypoints:
            raise ConfigError(f"dataset {name!r}: student and teacher have different keypoints")
    differing = [
        f"{key} {getattr(student.codec, key)} against {getattr(teacher.codec, key)}"
        for key in ("input_size", "heatmap_size", "spread", "blur", "target")
        if getattr(student.codec, key) != getattr(teacher.codec, key)
    ]
    if differing:
        raise ConfigError(f"student and teacher must share the codec; they differ in {', '.join(differing)}")
