"""A masked autoencoder's .pth, pretrained or finetune-ready: facebookresearch/mae's names, or mmpretrain's.

mmpose loads its MAE weights (`mae_pretrain_vit_small_20230913.pth` and its like) into mmpretrain's VisionTransformer as
they are, so that they should have mmpretrain's names; none of these files has been read here.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.models.formats import encoder
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.mmpose import VIT
from pipeline.models.formats.pose import Imported, Wanted
from pipeline.models.formats.shapes import usual_grid

KEYS = KeyMap(tuple((name, name) for name in ("patch_embed.proj", "cls_token", "pos_embed", "blocks", "norm")))
MMPRETRAIN = KeyMap((*VIT, ("cls_token", "cls_token"), ("norm", "ln1"), ("norm", "norm1")))
DROPS = tuple(
    (name, "the decoder is of pretraining only")
    for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
)

_SPELLINGS = {"facebookresearch/mae": KEYS, "mmpretrain": MMPRETRAIN}
_WEIGHT = "patch_embed.proj.weight"


def read(path: Path, wanted: Wanted) -> Imported:
    """The encoder in a .pth of either spelling; one without a class token gets one of zeros.

    Raises ArtifactError for names of neither spelling, and ArtifactError and ConfigError as `encoder.finish`.
    """
    state = read_checkpoint(path)
    keys = _spelling(state, path.name)
    intake = Intake.of(path.name, state, keys, DROPS)
    if keys is MMPRETRAIN:
        encoder.clear_class_position(intake, _has_slot(intake, wanted), "mmpretrain")
    encoder.pad_patch(intake, wanted)
    return encoder.finish(intake, wanted)


def _spelling(state: Mapping[str, Tensor], where: str) -> KeyMap:
    """Whose names these are, told by the patch convolution."""
    names = {library: str(keys.to_theirs(_WEIGHT)) for library, keys in _SPELLINGS.items()}
    for library, name in names.items():
        if name in state:
            return _SPELLINGS[library]
    expected = " nor ".join(f"{name} ({library})" for library, name in names.items())
    raise ArtifactError(f"{where}: has neither {expected}; it has {', '.join(sorted(state)[:2])}")


def _has_slot(intake: Intake, wanted: Wanted) -> bool:
    """Whether the positions begin with the class token's; mmpretrain takes files that keep it without the token."""
    positions, patch = intake.take("pos_embed"), intake.take(_WEIGHT).shape[-1]
    if "cls_token" in intake.tensors or positions.ndim != 3:
        return True
    count = positions.shape[1]
    if wanted.model is not None:
        rows, columns = wanted.model.backbone.grid
    elif wanted.input_size is not None:
        rows, columns = (side // patch for side in wanted.input_size)
    else:
        return usual_grid(count) is None and usual_grid(count - 1) is not None
    return count == rows * columns + 1
