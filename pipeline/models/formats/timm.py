"""A timm VisionTransformer as an encoder to start from (huggingface/pytorch-image-models)."""

from pathlib import Path

import torch

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

    In timm the class token's position is its own, while ViTPose's convention, which `backbone_state` follows, adds it to
    every patch: it is set to zero. Raises ArtifactError and ConfigError as `encoder.finish`, and ConfigError for a width
    of 384 without a number of heads.
    """
    intake = Intake.of(path.name, read_checkpoint(path), KEYS, DROPS)
    weight, positions = intake.take("patch_embed.proj.weight"), intake.take("pos_embed")
    if weight.shape[0] == _UNCLEAR_WIDTH and wanted.heads is None and wanted.model is None:
        raise ConfigError(
            f"{path.name}: timm's small ViTs have 6 heads, MAE's and ViTPose's S has 12, and the tensors look the same; "
            "give --heads"
        )
    slot = torch.zeros_like(positions[:, :1])
    if "cls_token" in intake.tensors:
        intake.tensors["pos_embed"] = torch.cat([slot, positions[:, 1:]], dim=1)
        intake.changes.append("pos_embed: the class token's position was set to zero; no patch has it in timm")
    else:
        intake.tensors["pos_embed"] = torch.cat([slot, positions], dim=1)
        intake.tensors["cls_token"] = slot.clone()
        intake.changes.append("cls_token: the model has none; one of zeros stands in its place")
    encoder.pad_patch(intake, wanted)
    return encoder.finish(intake, wanted)
