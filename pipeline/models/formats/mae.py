"""The official MAE's .pth, pretrained or finetune-ready (facebookresearch/mae); mmpose's host has one of size S."""

from pathlib import Path

from pipeline.models.formats import encoder
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.pose import Imported, Wanted

KEYS = KeyMap(tuple((name, name) for name in ("patch_embed.proj", "cls_token", "pos_embed", "blocks", "norm")))
DROPS = tuple(
    (name, "the decoder is of pretraining only")
    for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
)


def read(path: Path, wanted: Wanted) -> Imported:
    """The encoder in a .pth. Raises ArtifactError and ConfigError as `encoder.finish`."""
    intake = Intake.of(path.name, read_checkpoint(path), KEYS, DROPS)
    encoder.pad_patch(intake, wanted)
    return encoder.finish(intake, wanted)
