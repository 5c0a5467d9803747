"""The two decoders of ViTPose (section 3.1): features of a backbone to heatmaps of one dataset's keypoints."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.config import DecoderConfig
from pipeline.models.vit_config import SIMPLE_SCALE


class ClassicDecoder(nn.Module):
    """Transposed convolutions with batch norm, then a 1 x 1 convolution. Names as in the public ViTPose checkpoints.

    `samples_seen` counts the training samples that moved the running statistics; averaging these over ranks weights by
    it. It is no part of the state dict.
    """

    samples_seen: Tensor

    def __init__(self, channels: int, keypoints: int, config: DecoderConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(config.deconv_layers):
            layers += [
                nn.ConvTranspose2d(channels, config.filters, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(config.filters),
                nn.ReLU(inplace=True),
            ]
            channels = config.filters
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(channels, keypoints, kernel_size=1)
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place: convolutions normal(0.001), zero bias, batch norm as new, no samples seen."""
        _init_decoder(self)
        self.samples_seen.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, Hp, Wp) to heatmaps (B, K, Hp * 2^layers, Wp * 2^layers)."""
        if self.training:
            self.samples_seen += features.shape[0]
        return self.final_layer(self.deconv_layers(features))


class SimpleDecoder(nn.Module):
    """ReLU, bilinear upsampling, one 3 x 3 convolution: ViTPose, equation 3, which the public code follows."""

    def __init__(self, channels: int, keypoints: int, config: DecoderConfig, upsampling: int = SIMPLE_SCALE) -> None:
        super().__init__()
        assert config.kind == "simple"
        self.upsampling = upsampling
        self.final_layer = nn.Conv2d(channels, keypoints, kernel_size=3, padding=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise in place: convolution normal(0.001), zero bias."""
        _init_decoder(self)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, Hp, Wp) to heatmaps (B, K, u * Hp, u * Wp), u being the upsampling."""
        upsampled = F.interpolate(F.relu(features), scale_factor=self.upsampling, mode="bilinear", align_corners=False)
        return self.final_layer(upsampled)


def make_decoder(
    channels: int, keypoints: int, config: DecoderConfig, upsampling: int = SIMPLE_SCALE
) -> ClassicDecoder | SimpleDecoder:
    """The configured decoder, C channels to K heatmaps; upsampling: of a simple one, as the backbone wants it."""
    if config.kind == "classic":
        return ClassicDecoder(channels, keypoints, config)
    return SimpleDecoder(channels, keypoints, config, upsampling)


def _init_decoder(decoder: nn.Module) -> None:
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.001)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
