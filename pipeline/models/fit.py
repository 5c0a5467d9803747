"""Whether a model can start from, learn from or be combined with another, as far as configurations tell.

Imports no torch: pipelines are checked by it before anything runs, artifacts before their weights are read.
"""

from pipeline.models.config import BackboneConfig, MAEConfig, PoseConfig
from pipeline.models.vit_config import ViTConfig

_OF_WEIGHTS = ("width", "depth", "heads", "mlp_width", "patch_size")
"""Of a ViT, what its weights depend on. Heads are in no tensor's shape: without them a ViT-S of 6 heads would load into
one of 12 in silence, and compute something else."""


def why_no_start(own: BackboneConfig, found: BackboneConfig) -> str | None:
    """Why weights of backbone `found` can't start backbone `own`, in words; None where they can.

    Grids, patch padding, positions and attention may differ, and `own` may have convolutions or experts of its own.
    """
    differing = ""
    if isinstance(own, ViTConfig) and isinstance(found, ViTConfig):
        names = [name for name in _OF_WEIGHTS if getattr(own, name) != getattr(found, name)]
        if found.parallel_convolution and not own.parallel_convolution:
            names.append("parallel_convolution")
        if not names:
            return None
        differing = ": " + ", ".join(f"{name} {getattr(found, name)} instead of {getattr(own, name)}" for name in names)
    elif own.summary == found.summary:
        return None
    return (
        f"a {found.kind} ({found.summary}) can't initialise a {own.kind} ({own.summary}){differing}; train from scratch or "
        "take another"
    )


def why_not_continued(own: MAEConfig, found: MAEConfig) -> str | None:
    """Why a masked autoencoder can't go on from `found`, in words; None where it can, if tensors fit."""
    if own.decoder_heads != found.decoder_heads:
        return f"an autoencoder of decoder_heads {found.decoder_heads} instead of {own.decoder_heads}; take another"
    return why_no_start(own.backbone, found.backbone)


def why_other_heatmaps(own: PoseConfig, found: PoseConfig) -> str | None:
    """How input and heatmap sizes of two models differ, in words; None where heatmaps mean the same pixels."""
    a, b = (f"heatmaps {_size(one.heatmap_size)} of {_size(one.backbone.image_size)}" for one in (found, own))
    return f"{a} against {b}" if a != b else None


def _size(sides: tuple[int, int]) -> str:
    return f"{sides[0]}x{sides[1]}"
