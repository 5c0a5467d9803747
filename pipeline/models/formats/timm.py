"""A timm VisionTransformer as an encoder to start from (huggingface/pytorch-image-models)."""

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.models.formats import encoder
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.pose import Imported, Wanted

KEYS = KeyMap(tuple((name, name) for name in ("patch_embed.proj", "cls_token", "pos_embed", "blocks", "norm")))
DROPS = (("head", "the classifier"),)
_UNCLEAR_WIDTH = 384


def read(path: Path, wanted: Wanted) -> Imported:
    """The encoder in a timm state dict; a model without a class token gets one of zeros.

    Raises ArtifactError and ConfigError as `encoder.finish`, and ConfigError for a width of 384 without a number of heads.
    """
    intake = Intake.of(path.name, read_checkpoint(path), KEYS, DROPS)
    width = intake.take("patch_embed.proj.weight").shape[0]
    if width == _UNCLEAR_WIDTH and wanted.heads is None and wanted.model is None:
        raise ConfigError(
            f"{path.name}: timm's small ViTs have 6 heads, MAE's and ViTPose's S has 12, and the tensors look the same; "
            "give --heads"
        )
    encoder.clear_class_position(intake, "cls_token" in intake.tensors, "timm")
    encoder.pad_patch(intake, wanted)
    return encoder.finish(intake, wanted)
