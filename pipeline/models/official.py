"""Others' checkpoint files, read without executing anything they contain."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ArtifactError
from pipeline.models.config import MAEConfig
from pipeline.models.mae import MAE

_DECODER = ("decoder_", "mask_token")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or .pth file, unwrapped from `model`, `state_dict` or `module`.

    A .pth is read with `weights_only=True`; the one harmless class that real files carry, argparse's Namespace, is
    allowed by name. Raises ArtifactError for anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ArtifactError(f"{path.name}: refused: {reason}") from None
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ArtifactError(f"{path.name}: holds no state dict")
    return content


def read_mae(path: Path, config: MAEConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder of an official MAE file, and the names that were left out: the decoder's.

    Raises ArtifactError if a tensor of the encoder is missing, surplus or of another shape.
    """
    source = read_checkpoint(path)
    dropped = sorted(name for name in source if name.startswith(_DECODER))
    tensors = {name: value.float() for name, value in source.items() if name not in dropped}
    patch = config.backbone.patch_size
    weight = tensors.get("patch_embed.proj.weight")
    if weight is not None and weight.shape[-1] < patch:
        gap = patch - weight.shape[-1]
        before = gap // 2
        tensors["patch_embed.proj.weight"] = F.pad(weight, (before, gap - before, before, gap - before))
    with torch.device("meta"):
        expected = {
            name: value.shape for name, value in MAE(config).state_dict().items() if not name.startswith(_DECODER)
        }
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"surplus {name}" for name in tensors.keys() - expected.keys()]
    faults += [
        f"{name} {tuple(value.shape)} instead of {tuple(expected[name])}"
        for name, value in tensors.items()
        if name in expected and value.shape != expected[name]
    ]
    if faults:
        raise ArtifactError(
            f"{path.name}: not the configured encoder: {'; '.join(sorted(faults)[:5])} ({len(faults)} in all)"
        )
    return tensors, dropped
