"""From a uint8 image to what a model eats."""

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's, in RGB on a scale of 0 to 1: what MAE and ViTPose were trained with."""


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 RGB to normalised float32."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() - mean) / std


def denormalise(images: Tensor) -> Tensor:
    """Normalised (B, 3, H, W) float back to uint8 RGB."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8)
