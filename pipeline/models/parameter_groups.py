"""Which parameter learns how fast and decays how much: groups for the optimizer.

A group is a dict with `params`, `names` (in the same order), `lr_scale` and `weight_decay`, and with `lr` where the
base rate is known; a schedule multiplies its rate by `lr_scale`. Build groups before ZeRO partitions the parameters:
the rules look at their shapes.
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from pipeline.models.pose import PoseModel


def layer_decay_groups(model: PoseModel, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Layer-wise learning rate decay as in ViTPose's public optimizer constructor.

    A ViT of n = depth + 2 layers: layer 0 is the patch and position embedding, layer i + 1 is block i, and layer n - 1 is
    the rest (last norm, decoders); lr_scale = layer_decay ** (n - 1 - layer). A backbone without such blocks has one
    rate. Frozen parameters are left out. No weight decay for 1-D parameters, biases, the position embedding and relative
    positions (Swin's code). A learned knowledge token, which enters beside the patches, is treated as the position
    embedding.
    """
    last = model.config.backbone.decay_blocks + 1

    def lr_scale(name: str) -> float:
        return layer_decay ** (last - _layer(name, last))

    groups = _group(model, weight_decay, lr_scale)
    return [{**group, "lr": lr * group["lr_scale"]} for group in groups]


def plain_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """One rate for all, no weight decay for 1-D parameters and biases, as in MAE's public pretraining code (class and
    mask token are 3-D and decay). Frozen parameters are left out."""
    return _group(module, weight_decay, lambda name: 1.0)


def freeze(model: PoseModel, part: Literal["attention", "ffn"]) -> None:
    """Partial finetuning (ViTPose, table 6), in place: the parameters that the public code freezes, and no others.

    attention: every block's attention and first norm. ffn: positions, patch embedding, every block's MLP and second
    norm; so the patch embedding still learns where attention is frozen, and last norm and decoders always do.
    """
    backbone = model.backbone
    for block in backbone.blocks:
        for module in (block.attn, block.norm1) if part == "attention" else (block.mlp, block.norm2):
            module.requires_grad_(False)
    if part == "ffn":
        backbone.patch_embed.requires_grad_(False)
        backbone.pos_embed.requires_grad_(False)


def _layer(name: str, last: int) -> int:
    if name in ("backbone.pos_embed", "knowledge_token") or name.startswith("backbone.patch_embed."):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return last


def _group(module: nn.Module, weight_decay: float, lr_scale: Callable[[str], float]) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        positions = "pos_embed" in name or name.endswith("relative_positions") or name == "knowledge_token"
        plain = parameter.ndim == 1 or name.endswith(".bias") or positions
        key = lr_scale(name), 0.0 if plain else weight_decay
        empty = {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]}
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
