"""A pose model out of a file's tensors, the same for every format that holds one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import DatasetDefinition, load_definition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import EncoderConfig, MAEConfig, PoseConfig
from pipeline.models.formats.keys import Intake
from pipeline.models.formats.shapes import backbone_shape, decoder_shape, described
from pipeline.models.loading import EncoderSpec, MAESpec, PoseSpec
from pipeline.models.pose import PoseModel
from pipeline.models.vit_config import ViTConfig

VITPOSE_ORDER = ("coco", "aic", "mpii", "ap10k", "apt36k", "wholebody")
"""The datasets of ViTPose+, in the order of its heads and experts."""
PADDING = 2
"""Of the patch convolution in every format of ViTPose."""


@dataclass(frozen=True)
class Wanted:
    """What to make of a file, where it does not say so itself."""

    datasets: tuple[str, ...] = ()
    """Names or YAML files of the dataset definitions whose decoders to take; none: those that the file has."""
    input_size: tuple[int, int] | None = None
    """Height and width of the input."""
    heads: int | None = None
    """Attention heads."""
    model: EncoderConfig | MAEConfig | PoseConfig | None = None
    """The model that it has to be; unset: told by the shapes."""


@dataclass(frozen=True)
class Imported:
    """A file's weights under our names, and what happened to the others."""

    spec: EncoderSpec | MAESpec | PoseSpec
    tensors: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)
    """The file's names of what was left out on purpose, with the reason."""
    changes: tuple[str, ...] = ()
    """What was done to values."""

    def about(self, source: str, digest: str) -> dict[str, str]:
        """Lines for the card of what the weights were made from."""
        left = ", ".join(sorted(self.dropped)) or "nothing"
        return {"source": source, "sha256": digest, "changed": "; ".join(self.changes) or "nothing", "left out": left}

    def report(self) -> list[str]:
        """Lines for people: how many tensors were loaded, what was changed, what was left out and why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            by_reason.setdefault(reason, []).append(name)
        left = [
            f"left out {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
            for reason, names in by_reason.items()
        ]
        return [f"{len(self.tensors)} tensors loaded", *self.changes, *(left or ["nothing left out"])]


def choose_heads(
    intake: Intake, wanted: Sequence[str], order: Sequence[str] = VITPOSE_ORDER
) -> list[DatasetDefinition]:
    """The definitions of the decoders to take, in the file's order; the tensors of the others are dropped.

    A file with one decoder may be of any dataset that is wanted, and is of the first in `order` if none is. Raises
    ConfigError where a definition is missing or a dataset is no decoder's, ArtifactError where the number of keypoints is
    another.
    """
    numbers = intake.numbers("heads")
    if not numbers:
        intake.take("heads.0.final_layer.weight")
    definitions = [load_definition(name) for name in wanted]
    if len(numbers) == 1:
        chosen = {numbers[0]: definitions[0] if definitions else load_definition(order[0])}
    else:
        chosen = {index: found for index in numbers if (found := _definition(intake, index, order, definitions))}
    unmatched = [found.name for found in definitions if found not in chosen.values()]
    if unmatched:
        has = ", ".join(order[: len(numbers)]) if len(numbers) > 1 else "a single decoder"
        raise ConfigError(f"{intake.where}: no decoder for dataset {unmatched[0]!r}; the file has {has}")
    for index in numbers:
        if index not in chosen:
            intake.drop(
                f"heads.{index}", f"the decoder of {order[index] if index < len(order) else index}, not asked for"
            )
    for index, definition in chosen.items():
        _require_keypoints(intake, index, definition)
    return list(chosen.values())


def _definition(
    intake: Intake, index: int, order: Sequence[str], wanted: Sequence[DatasetDefinition]
) -> DatasetDefinition | None:
    """The dataset of one of several heads; None where it is not wanted."""
    if wanted:
        return next((found for found in wanted if index < len(order) and found.name == order[index]), None)
    if index >= len(order):
        raise ConfigError(
            f"{intake.where}: decoder {index} is of an unknown dataset; choose (--dataset) among {', '.join(order)}"
        )
    try:
        return load_definition(order[index])
    except ConfigError as error:
        raise ConfigError(f"{intake.where}: {error}; or choose the decoders to take (--dataset)") from None


def _require_keypoints(intake: Intake, index: int, definition: DatasetDefinition) -> None:
    name = f"heads.{index}.final_layer.weight"
    found = intake.take(name).shape[0]
    if found != definition.num_keypoints:
        raise ArtifactError(
            f"{intake.where}: {intake.theirs(name)} is of {found} keypoints, dataset {definition.name!r} has "
            f"{definition.num_keypoints}; name the dataset that the decoder was trained on"
        )


def finish(intake: Intake, definitions: Sequence[DatasetDefinition], wanted: Wanted, tokens: int = 0) -> Imported:
    """The whole model, from tensors of which `pos_embed` has no slot of a class token any more.

    Raises ConfigError or ArtifactError where the tensors are not the model that is wanted, or no model at all.
    """
    heads = intake.numbers("heads")
    if wanted.model is None:
        backbone = backbone_shape(intake, "backbone.", 0, wanted.input_size, wanted.heads, PADDING)
        decoder = decoder_shape(intake, heads[0])
        values = {"backbone": backbone, "decoder": decoder, "knowledge_tokens": tokens}
        config = described(PoseConfig, values, intake.where)
    else:
        config = _as_described(wanted, intake.where, tokens)
    for index, definition in zip(heads, definitions, strict=True):
        intake.move(f"heads.{index}", f"decoders.{definition.name}")
    datasets = {definition.name: definition for definition in definitions}
    with torch.device("meta"):
        intake.require(PoseModel(config, {name: found.num_keypoints for name, found in datasets.items()}))
    sizes = {"input_size": config.backbone.image_size, "heatmap_size": config.heatmap_size}
    codec = described(CodecConfig, sizes, intake.where)
    spec = PoseSpec(config=config, datasets=datasets, codec=codec)
    return Imported(spec, intake.tensors, intake.dropped, tuple(intake.changes))


def _as_described(wanted: Wanted, where: str, tokens: int) -> PoseConfig:
    """The configured model, where it can be one of ViTPose's formats at all."""
    model = wanted.model
    if not isinstance(model, PoseConfig) or not isinstance(model.backbone, ViTConfig):
        raise ConfigError(f"{where}: holds a pose model with a ViT; describe it: model.backbone and model.decoder")
    if model.backbone.patch_padding != PADDING:
        raise ConfigError(
            f"{where}: its format has model.backbone.patch_padding {PADDING}, found {model.backbone.patch_padding}"
        )
    if model.knowledge_tokens != tokens:
        raise ConfigError(
            f"{where}: has {tokens} knowledge tokens, found model.knowledge_tokens {model.knowledge_tokens}"
        )
    require_settings(wanted, where)
    return model


def require_settings(wanted: Wanted, where: str) -> None:
    """Compares a described model with what the file's own config says and no shape tells. Raises ConfigError."""
    assert wanted.model is not None
    backbone = wanted.model.backbone
    for name, told, configured in (
        ("heads", wanted.heads, backbone.heads),
        ("image_size", wanted.input_size, backbone.image_size),
    ):
        if told is not None and told != configured:
            raise ConfigError(f"{where}: its config says {told} where model.backbone.{name} is {configured}")


def fold_positions(intake: Intake) -> None:
    """Adds the position of the class token to the others, as ViTPose's forward does: (1, 1 + N, C) to (1, N, C)."""
    name = "backbone.pos_embed"
    positions = intake.take(name)
    if positions.ndim == 3 and positions.shape[1] > 1:
        intake.tensors[name] = positions[:, 1:] + positions[:, :1]
        intake.changes.append(f"{intake.theirs(name)}: the class token's position was added to all others")
