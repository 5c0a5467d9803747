"""Which network a backbone's configuration means. Another backbone is another line here and in `models.config`.

Each maps normalised images (B, 3, H, W) to features (B, width, *grid), takes `tokens` (None where its configuration does
not `takes_tokens`) and `owners` (None without `experts`), and initialises itself in place by `init_weights`. One with
batch norm counts `samples_seen`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.models.config import BackboneConfig
from pipeline.models.resnet import ResNet
from pipeline.models.vit import ViT, count
from pipeline.models.vit_config import ViTConfig


def make_backbone(config: BackboneConfig, datasets: Sequence[str] = ()) -> ViT | ResNet:
    """The configured backbone, with torch's default weights; `datasets` have an expert each where there are any."""
    if isinstance(config, ViTConfig):
        return ViT(config, datasets if config.expert_width else ())
    return ResNet(config)


def count_parameters(config: BackboneConfig, datasets: Sequence[str] = ()) -> int:
    """Number of parameters of the backbone, with the experts of `datasets`, without allocating it."""
    with torch.device("meta"):
        backbone: nn.Module = make_backbone(config, datasets)
    return count(backbone)
