"""How much memory a training stage needs per process: states by ZeRO stage, activations by a formula."""

from pipeline.config import EngineConfig
from pipeline.models.config import MAEConfig, PoseConfig, ViTConfig

_OVERHEAD = 1.12
"""Between the formula and the peak memory in ViTPose's published training logs (B, L and H within 3 %)."""


def estimate(
    model: PoseConfig | MAEConfig, parameters: int, micro_batch: int, processes: int, engine: EngineConfig
) -> float:
    """Bytes per process: float32 weights, gradients and moments (ZeRO, table 1) and activations with fused attention."""
    element = 2 if engine.precision == "bf16" else 4
    backbone = model.backbone
    tokens = backbone.patches
    if isinstance(model, MAEConfig):
        decoder = ViTConfig(
            image_size=backbone.image_size,
            patch_size=backbone.patch_size,
            width=model.decoder_width,
            depth=model.decoder_depth,
            heads=model.decoder_heads,
            patch_padding=0,
        )
        activations = _blocks(backbone, model.visible + 1, element) + _blocks(decoder, tokens + 1, element)
    else:
        height, width = model.heatmap_size
        filters = model.decoder.filters if model.decoder.kind == "classic" else backbone.width
        activations = _blocks(backbone, tokens, element) + 3 * element * filters * height * width * 1.25
    return _OVERHEAD * (states(parameters, processes, engine.zero_stage) + micro_batch * activations)


def states(parameters: int, processes: int, zero_stage: int) -> float:
    """Bytes of weights (4), gradients (4) and moments (8) per process under ZeRO, in float32."""
    sharded = {0: 0, 1: 8, 2: 12, 3: 16}[zero_stage]
    return parameters * ((16 - sharded) + sharded / processes)


def _blocks(config: ViTConfig, tokens: int, element: int) -> float:
    """Bytes that a sample's forward keeps for the backward: all of it, or block inputs and one block."""
    block = element * tokens * (8 * config.width + 2 * config.mlp_width)
    if config.gradient_checkpointing:
        return config.depth * element * tokens * config.width + block
    return config.depth * block
