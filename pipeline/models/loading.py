"""Model artifacts: `model.safetensors` and a `model.json` that says how to build what they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.artifacts import Artifact, read_artifact
from pipeline.data.codec import CodecConfig
from pipeline.data.definitions import DatasetDefinition
from pipeline.errors import ArtifactError
from pipeline.files import read_json, write_json
from pipeline.models.config import EncoderConfig, MAEConfig, PoseConfig
from pipeline.models.mae import MAE
from pipeline.models.pose import PoseModel
from pipeline.strict import Strict

WEIGHTS = "model.safetensors"
SPEC = "model.json"


class PoseSpec(Strict):
    """`model.json` of a pose model."""

    schema_version: Literal[1] = 1
    model: Literal["pose"] = "pose"
    config: PoseConfig
    datasets: dict[str, DatasetDefinition] = Field(min_length=1)
    """Each decoder's keypoints, pairs and sigmas, as they were in training."""
    codec: CodecConfig

    @property
    def keypoints(self) -> dict[str, int]:
        """K by dataset."""
        return {name: definition.num_keypoints for name, definition in self.datasets.items()}


class MAESpec(Strict):
    """`model.json` of a masked autoencoder, or of its encoder alone."""

    schema_version: Literal[1] = 1
    model: Literal["mae"] = "mae"
    config: MAEConfig
    encoder_only: bool = False
    """True for imported weights that came without their decoder."""


class EncoderSpec(Strict):
    """`model.json` of a backbone alone: imported weights of an image classifier."""

    schema_version: Literal[1] = 1
    model: Literal["encoder"] = "encoder"
    config: EncoderConfig


class TokenSpec(Strict):
    """`model.json` of a knowledge token."""

    schema_version: Literal[1] = 1
    model: Literal["token"] = "token"
    teacher: str
    """Digest of the artifact of the teacher that it was fitted on."""
    tokens: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=65_536)


Spec = PoseSpec | MAESpec | EncoderSpec | TokenSpec
_SPECS: dict[str, type[Spec]] = {"pose": PoseSpec, "mae": MAESpec, "encoder": EncoderSpec, "token": TokenSpec}


def save_model(folder: Path, spec: Spec, tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of a model artifact."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_json(folder / SPEC, spec.model_dump(mode="json"))


def read_spec(artifact: Artifact) -> Spec:
    """The `model.json` of an artifact. Raises ArtifactError."""
    path = artifact.file(SPEC)
    try:
        raw = read_json(path)
        return _SPECS[raw["model"]].model_validate(raw)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArtifactError(f"{path}: not a model description: {' '.join(str(error).split())[:200]}") from None


def read_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The verified weights of an artifact, on the CPU. Raises ArtifactError."""
    path = artifact.file(WEIGHTS)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a safetensors file: {error}") from None


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Loads a state dict in which every tensor fits. Raises ArtifactError that names the first that do not."""
    require_fit(module, tensors, where)
    module.load_state_dict(dict(tensors))


def require_fit(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ArtifactError unless names and shapes are those of the module, which may lie on the meta device."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = [f"missing {name}" for name in missing] + [f"surplus {name}" for name in surplus] + reshaped
    if faults:
        raise ArtifactError(
            f"{where}: the weights do not fit the model: {'; '.join(faults[:5])} ({len(faults)} in all)"
        )


def load_pose(artifact: Artifact) -> tuple[PoseModel, PoseSpec]:
    """A pose model in eval mode on the CPU, and its description. Raises ArtifactError for any other artifact."""
    spec = read_spec(artifact)
    if not isinstance(spec, PoseSpec):
        raise ArtifactError(f"{artifact.path}: holds a model of type {spec.model!r}, expected a pose model")
    with torch.device("meta"):
        model = PoseModel(spec.config, spec.keypoints)
    tensors = read_tensors(artifact)
    require_fit(model, tensors, str(artifact.path))  # before memory is taken for what a description says
    model.to_empty(device="cpu")
    load_strictly(model, tensors, str(artifact.path))
    for name, buffer in model.named_buffers():
        if name.endswith("samples_seen"):
            buffer.zero_()
    return model.eval(), spec


def load_mae(artifact: Artifact) -> tuple[MAE, MAESpec]:
    """A whole masked autoencoder in eval mode. Raises ArtifactError for any other artifact."""
    spec = read_spec(artifact)
    if not isinstance(spec, MAESpec) or spec.encoder_only:
        raise ArtifactError(f"{artifact.path}: does not hold a whole masked autoencoder")
    tensors = read_tensors(artifact)
    with torch.device("meta"):
        require_fit(MAE(spec.config), tensors, str(artifact.path))
    model = MAE(spec.config)
    model.init_weights()
    load_strictly(model, tensors, str(artifact.path))
    return model.eval(), spec


def load_token(artifact: Artifact, teacher: str, width: int) -> Tensor:
    """The knowledge token (1, T, width) in an artifact. Raises ArtifactError unless it was fitted on this teacher.

    teacher: digest of the teacher's artifact; width: of the teacher's backbone.
    """
    spec = read_spec(artifact)
    if not isinstance(spec, TokenSpec):
        raise ArtifactError(f"{artifact.path}: holds a model of type {spec.model!r}, expected a knowledge token")
    if spec.teacher != teacher:
        raise ArtifactError(
            f"inputs.token was fitted on {spec.teacher[:12]}, not on inputs.teacher {teacher[:12]}; fit one on it"
        )
    token = read_tensors(artifact).get("token")
    found = None if token is None else tuple(token.shape)
    if token is None or found != (1, spec.tokens, width) or spec.width != width or not token.isfinite().all():
        raise ArtifactError(
            f"{artifact.path}: expected a finite token of shape {(1, spec.tokens, width)}, as wide as its teacher; "
            f"found {found}, described with width {spec.width}"
        )
    return token


def load_model(artifact: str | Path | Artifact) -> PoseModel:
    """The torch module in an artifact's folder, in eval mode on the CPU.

    Call it with normalised images (B, 3, H, W) (`pipeline.models.preprocessing.normalise`); it gives heatmaps
    (B, K, h, w) by dataset. Imports neither DeepSpeed nor MLflow. Raises ArtifactError.
    """
    opened = artifact if isinstance(artifact, Artifact) else read_artifact(Path(artifact))
    model, _ = load_pose(opened)
    return model


def summary(spec: Spec) -> dict[str, Any]:
    """A description in a few words, for cards."""
    if isinstance(spec, PoseSpec):
        backbone = spec.config.backbone
        return {
            "backbone": backbone.summary,
            "input": "x".join(map(str, backbone.image_size)),
            "datasets": ", ".join(spec.datasets),
        }
    if isinstance(spec, EncoderSpec):
        return {"model": spec.model, "backbone": spec.config.backbone.summary}
    return {"model": spec.model}
