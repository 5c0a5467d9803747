"""The ResNet backbone of SimpleBaseline (Xiao et al., ECCV 2018), made of timm's stages."""

import timm
import torch
from torch import Tensor, nn

from pipeline.models.resnet_config import ResNetConfig
from pipeline.models.vit import check_images


class ResNet(nn.Module):
    """Images to features of stride 32. Names as in torchvision, timm and mmpose.

    Its batch norm sees all datasets, as all of the backbone does. `samples_seen` counts the training samples that
    moved the running statistics; averaging these over ranks weights by it. It is no part of the state dict.
    """

    experts = ()
    samples_seen: Tensor

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        whole = timm.create_model(f"resnet{config.layers}", pretrained=False, num_classes=0)
        for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(whole, name))
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place as torchvision does from scratch: He normal by fan-out, batch norm as new."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        self.samples_seen.zero_()

    def forward(self, images: Tensor, tokens: Tensor | None = None, owners: Tensor | None = None) -> Tensor:
        """Normalised images (B, 3, H, W) to features (B, 2048, H / 32, W / 32). Raises DataError for another size."""
        assert tokens is None and owners is None, "a ResNet takes no tokens and has no experts"
        check_images(images, self.config.image_size)
        if self.training:
            self.samples_seen += images.shape[0]
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
