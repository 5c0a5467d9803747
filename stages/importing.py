"""Stage kind `import`: others' weights as an artifact, where a stage wants one.

Reads a file, or a Hugging Face folder, by path or URL with its sha256. Writes an encoder, as `mae` does, or a pose model,
as `finetune` does, depending on the format. The papers' main rows start from the ImageNet MAE weights that
facebookresearch/mae publishes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config import StageConfig
from pipeline.context import Context
from pipeline.models.config import EncoderConfig, MAEConfig, PoseConfig
from pipeline.strict import AddedLater, Strict


class Inputs(Strict):
    """Nothing of this pipeline."""


class Config(StageConfig):
    """Imported weights."""

    kind: Literal["import"]
    inputs: Inputs = Inputs()
    """No artifact is read."""
    source: str
    """Path or fsspec URL of the file; of the folder for huggingface."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """Of the file, or of the weights in a folder; anything else is refused. Needed for a URL; for a local file the
    digest found is recorded."""
    format: Literal["mae", "vitpose", "mmpose", "huggingface", "timm", "torchvision"] = "mae"
    """mae: a .pth or .safetensors of facebookresearch/mae, pretrained or finetune-ready; vitpose: the original ViTPose or
    ViTPose+; mmpose: 1.x; huggingface: VitPose or ViTMAE; timm: a plain VisionTransformer; torchvision: a
    ResNet-50, -101 or -152 of torchvision or timm."""
    datasets: Annotated[list[str], AddedLater] = []
    """Whose decoders a pose model has: names or YAML files of dataset definitions. Empty: those of the file, COCO's for a
    single one. ViTPose+ is split for exactly one."""
    model: EncoderConfig | MAEConfig | PoseConfig
    """What the weights are of: a pose model for vitpose and mmpose, an encoder for mae, timm and torchvision, and for
    huggingface a pose model if it has a `decoder`. An encoder's patch of 14 is padded to 16 with zeros, as in ViTPose."""
    licence: str
    """Of the weights."""

    @field_validator("model", mode="before")
    @classmethod
    def _of_the_format(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        format = info.data.get("format")
        pose = format in ("vitpose", "mmpose") or (format == "huggingface" and "decoder" in value)
        known = PoseConfig if pose else EncoderConfig if format == "torchvision" else MAEConfig
        return known.model_validate(value)

    @model_validator(mode="after")
    def _urls_are_pinned(self) -> "Config":
        if "://" in self.source and self.sha256 is None:
            raise ValueError("a URL needs the sha256 of what lies there")
        return self

    @model_validator(mode="after")
    def _experts_are_split(self) -> "Config":
        if self.model.backbone.expert_width:
            raise ValueError(
                "model.backbone.expert_width: ViTPose+ comes in as the plain model of one of its datasets; leave it out here "
                "and set it in the stage that starts from this one"
            )
        return self

    @model_validator(mode="after")
    def _datasets_are_of_decoders(self) -> "Config":
        if self.datasets and not isinstance(self.model, PoseConfig):
            raise ValueError("datasets name decoders, and an encoder has none; leave them out")
        return self

    def files(self) -> list[str]:
        """The weights, where they lie on this machine, and definitions of the user's own."""
        own = [name for name in self.datasets if name.endswith((".yaml", ".yml"))]
        if "://" in self.source:
            return own
        inside = ("config.json", "model.safetensors", "pytorch_model.bin") if self.format == "huggingface" else ("",)
        return [*own, *(str(Path(self.source) / name) if name else self.source for name in inside)]


def run(context: Context, config: Config) -> None:
    """Fetches, verifies, converts and publishes."""
    from pipeline.models.formats.pose import Wanted
    from pipeline.models.formats.registry import read_source
    from pipeline.models.loading import save_model

    wanted = Wanted(datasets=tuple(config.datasets), model=config.model)
    imported, digest = read_source(config.source, config.format, wanted, config.sha256)

    def fill(staged: Path) -> None:
        save_model(staged, imported.spec, imported.tensors)

    context.publish(fill, licences=[config.licence], about=imported.about(config.source, digest))
