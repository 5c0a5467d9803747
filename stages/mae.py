"""Stage kind `mae`: masked-autoencoder pretraining of a plain ViT on person crops (He et al. 2022).

Reads shards. Writes the whole autoencoder, and pictures of its reconstructions. The decoder is kept so that pretraining
can go on; `finetune` takes the encoder.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import PipelineConfig
from pipeline.context import Context
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models.config import MAEConfig
from pipeline.models.fit import why_not_continued
from pipeline.recipe import TrainingConfig
from pipeline.strict import NotInFingerprint, Strict


class Inputs(Strict):
    """What is read."""

    shards: str
    """Person crops."""
    init: str | None = None
    """An autoencoder to go on from."""


class Config(TrainingConfig):
    """Masked autoencoder."""

    kind: Literal["mae"]
    inputs: Inputs
    """Artifacts by role."""
    model: MAEConfig
    """Encoder, decoder, mask."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the person's window that a random resized crop covers (MAE, appendix A)."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a mirror image."""
    pictures: Annotated[int, NotInFingerprint] = Field(8, ge=0)
    """Reconstructions to draw."""

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> "Config":
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} is not a range of shares between 0 and 1")
        return self

    def check(self, pipeline: PipelineConfig) -> None:
        """The autoencoder to go on from is of the same architecture, as far as a stage of this pipeline makes it."""
        start = getattr(pipeline.stages.get(self.inputs.init or ""), "model", None)
        if isinstance(start, MAEConfig) and (reason := why_not_continued(self.model, start)):
            raise ConfigError(f"inputs.init: {self.inputs.init} is {reason}")


def run(context: Context, config: Config) -> None:
    """Collective. Trains to the end and publishes."""
    import torch

    from pipeline.data.collection import open_shards
    from pipeline.data.loader import MaeView
    from pipeline.models.loading import MAESpec, load_mae, load_strictly, save_model
    from pipeline.models.mae import MAE
    from pipeline.models.parameter_groups import plain_groups
    from pipeline.objectives import MAEObjective
    from pipeline.training import train

    image_size = config.model.backbone.image_size
    collection = open_shards(context.artifact("shards"), image_size, context.sample_cache)
    torch.manual_seed(context.seed)
    model = MAE(config.model)
    model.init_weights()
    if context.has("init"):
        start, spec = load_mae(context.artifact("init"))
        if reason := why_not_continued(config.model, spec.config):
            raise ArtifactError(f"inputs.init: {reason}")
        load_strictly(model, start.state_dict(), "inputs.init")
    view = MaeView(image_size, config.model.backbone.patches, config.crop_scale, config.flip)
    groups = plain_groups(model, config.optimizer.weight_decay)
    result = train(context, config, MAEObjective(model), groups, collection, view)

    def fill(staged: Path) -> None:
        tensors = result.tensors("model.")
        # Not the trained module: under ZeRO 3 it holds shards, and its forward is collective.
        whole = MAE(config.model)
        load_strictly(whole, tensors, "the trained autoencoder")
        save_model(staged, MAESpec(config=config.model), tensors)
        if config.pictures:
            _draw(whole.eval(), next(result.batches(view, config.pictures)), staged / "pictures")

    context.publish(fill, metrics=result.metrics, about=collection.about())


def _draw(model: "torch.nn.Module", batch: dict, folder: Path) -> None:  # noqa: F821
    """Image, what the encoder saw, and the reconstruction, side by side."""
    from pipeline.evaluation.pictures import contact_sheet, save_jpg
    from pipeline.models.preprocessing import denormalise, normalise

    images = normalise(batch["images"])
    rows = [
        batch["images"],
        denormalise(model.masked(images, batch["noise"])),
        denormalise(model.reconstruct(images, batch["noise"])),
    ]
    enlarge = max(1, 192 // images.shape[2])
    cells = [
        row[i].permute(1, 2, 0).numpy().repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        for i in range(len(images))
        for row in rows
    ]
    folder.mkdir()
    save_jpg(contact_sheet(cells, columns=6), folder / "reconstructions.jpg")
