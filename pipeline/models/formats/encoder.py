"""An autoencoder's encoder out of a file's tensors, the same for every format that holds one."""

from typing import Any

import torch
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.models.config import MAEConfig
from pipeline.models.formats.keys import Intake
from pipeline.models.formats.pose import Imported, Wanted, require_settings
from pipeline.models.formats.shapes import backbone_shape, described
from pipeline.models.loading import MAESpec
from pipeline.models.mae import MAE

DECODER = ("decoder_", "mask_token")
"""How the names of an autoencoder's decoder begin."""
PADDED = {14: 16}
"""Patch sizes that ViTPose pads with zeros, and to which."""

_WEIGHT = "patch_embed.proj.weight"


def pad_patch(intake: Intake, wanted: Wanted) -> bool:
    """Centres a smaller patch in zeros, as ViTPose does with patches of 14; True if there was something to do."""
    weight = intake.take(_WEIGHT)
    patch = weight.shape[-1]
    target = PADDED.get(patch, patch) if wanted.model is None else wanted.model.backbone.patch_size
    gap = target - patch
    if gap <= 0 or weight.ndim != 4:
        return False
    before = gap // 2
    intake.tensors[_WEIGHT] = F.pad(weight, (before, gap - before, before, gap - before))
    intake.changes.append(f"{intake.theirs(_WEIGHT)}: patches of {patch} padded with zeros to {target}")
    return True


def clear_class_position(intake: Intake, slot: bool, library: str) -> None:
    """Makes positions and class token an autoencoder's, where the token's position is its own.

    ViTPose's convention, which `backbone_state` follows, adds that position to every patch, so it becomes zero. slot:
    whether the positions begin with it; without a slot one is put there, and without a class token one of zeros. Raises
    ArtifactError where there are no positions.
    """
    positions = intake.take("pos_embed")
    if positions.ndim != 3:  # `finish` says what they should be
        return
    zeros = torch.zeros_like(positions[:, :1])
    if slot:
        positions = positions[:, 1:]
        intake.changes.append(f"pos_embed: the class token's position was set to zero; no patch has it in {library}")
    intake.tensors["pos_embed"] = torch.cat([zeros, positions], dim=1)
    if "cls_token" not in intake.tensors:
        intake.tensors["cls_token"] = zeros
        intake.changes.append("cls_token: the model has none; one of zeros stands in its place")


def finish(intake: Intake, wanted: Wanted, decoder: dict[str, Any] | None = None) -> Imported:
    """The encoder, or the whole autoencoder if `decoder` has the other keys of its `MAEConfig`.

    Raises ConfigError or ArtifactError where the tensors are not the model that is wanted, or no encoder at all.
    """
    if wanted.model is None:
        backbone = backbone_shape(intake, "", 1, wanted.input_size, wanted.heads, padding=0)
        config = described(MAEConfig, {"backbone": backbone, **(decoder or {})}, intake.where)
    elif isinstance(wanted.model, MAEConfig):
        require_settings(wanted, intake.where)
        config = wanted.model
        if decoder is not None and decoder["decoder_heads"] != config.decoder_heads:
            raise ConfigError(
                f"{intake.where}: its config says {decoder['decoder_heads']} where model.decoder_heads is "
                f"{config.decoder_heads}"
            )
    else:
        raise ConfigError(f"{intake.where}: holds an encoder, no pose model; describe it without model.decoder")
    with torch.device("meta"):
        intake.require(MAE(config), ignored=DECODER if decoder is None else ())
    intake.changes.append("norm.* is the encoder's own: the last norm of a pose model that starts from it is fresh")
    spec = MAESpec(config=config, encoder_only=decoder is None)
    return Imported(spec, intake.tensors, intake.dropped, tuple(intake.changes))
