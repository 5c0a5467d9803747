"""The models that exist here, and what was published about them on COCO val2017 at 256x192."""

from dataclasses import dataclass

from pipeline.models.config import PoseConfig

_TABLE_2 = "ViTPose (NeurIPS 2022), table 2"
_RELEASED = "README of ViTAE-Transformer/ViTPose"
_XIAO = "README of microsoft/human-pose-estimation.pytorch"


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    model: PoseConfig
    ap: float | None
    """Published AP with a detector of 56.4 person AP, flip test; None where nothing was published."""
    source: str
    """Of the AP."""
    images_per_second: float | None = None
    """Published, on an A100 at batch 64 (ViTPose, table 9)."""
    ap_several: float | None = None
    """Published AP after training on COCO, AI Challenger and MPII (ViTPose, table 9)."""


def _vit(size: str, decoder: str, convolution: bool = False) -> PoseConfig:
    backbone = {"size": size, "parallel_convolution": convolution}
    return PoseConfig.model_validate({"backbone": backbone, "decoder": {"kind": decoder}})


def _resnet(layers: int, decoder: str) -> PoseConfig:
    return PoseConfig.model_validate({"backbone": {"kind": "resnet", "layers": layers}, "decoder": {"kind": decoder}})


MODELS: tuple[Entry, ...] = (
    Entry("vitpose-s", _vit("S", "classic"), 73.8, _RELEASED),
    Entry("vitpose-s-simple", _vit("S", "simple"), 73.5, _RELEASED),
    Entry("vitpose-b", _vit("B", "classic"), 75.8, _TABLE_2, 944, 77.1),
    Entry("vitpose-b-simple", _vit("B", "simple"), 75.5, _TABLE_2),
    Entry("vitpose-l", _vit("L", "classic"), 78.3, _TABLE_2, 411, 78.7),
    Entry("vitpose-l-simple", _vit("L", "simple"), 78.2, _TABLE_2),
    Entry("vitpose-h", _vit("H", "classic"), 79.1, _TABLE_2, 241, 79.5),
    Entry("vitpose-h-simple", _vit("H", "simple"), 78.9, _TABLE_2),
    Entry("vitpose-1b", _vit("1B", "classic"), None, "none: a plain ViT in place of ViTAE-G"),
    Entry("vitpose-1b-simple", _vit("1B", "simple"), None, "none: a plain ViT in place of ViTAE-G"),
    Entry(
        "vitpose-1b-convolution", _vit("1B", "classic", convolution=True), None, "none: blocks as ViTAE's, not its G"
    ),
    Entry("resnet-50", _resnet(50, "classic"), 70.4, _XIAO),
    Entry("resnet-50-simple", _resnet(50, "simple"), 53.1, _TABLE_2),
    Entry("resnet-101", _resnet(101, "classic"), 71.4, _XIAO),
    Entry("resnet-101-simple", _resnet(101, "simple"), None, "none"),
    Entry("resnet-152", _resnet(152, "classic"), 72.0, _XIAO, 829),
    Entry("resnet-152-simple", _resnet(152, "simple"), 55.3, _TABLE_2),
)
