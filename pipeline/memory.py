"""How much memory a training stage needs per process: states by ZeRO stage, activations by a formula."""

from pipeline.config import EngineConfig
from pipeline.models.config import BackboneConfig, MAEConfig, PoseConfig
from pipeline.models.cost import attended
from pipeline.models.resnet_config import ResNetConfig
from pipeline.models.vit_config import ViTConfig

_OVERHEAD = 1.12
"""Between the formula and the peak memory in ViTPose's published training logs (B, L and H within 3 %)."""


def estimate(
    model: PoseConfig | MAEConfig,
    parameters: int,
    micro_batch: int,
    processes: int,
    engine: EngineConfig,
    *,
    frozen: int = 0,
    teacher: int = 0,
    materialised: bool = False,
) -> float:
    """Bytes per process: float32 weights, gradients and moments (ZeRO, table 1), and activations.

    frozen: how many of the parameters have weights alone; teacher: parameters of a frozen model beside this one, which no
    ZeRO stage shares out. Attention is fused; with `materialised` each block keeps its
    attention map, as the framework of ViTPose's paper did.
    """
    element = 2 if engine.precision == "bf16" else 4
    backbone = model.backbone
    if isinstance(model, MAEConfig):
        decoder = ViTConfig(
            image_size=model.backbone.image_size,
            patch_size=model.backbone.patch_size,
            width=model.decoder_width,
            depth=model.decoder_depth,
            heads=model.decoder_heads,
            patch_padding=0,
        )
        activations = _blocks(model.backbone, model.visible + 1, element, materialised)
        activations += _blocks(decoder, model.backbone.patches + 1, element, materialised)
    else:
        height, width = model.heatmap_size
        filters = model.decoder.filters if model.decoder.kind == "classic" else backbone.width
        activations = _backbone(backbone, element, materialised) + 3 * element * filters * height * width * 1.25
    kept = states(parameters, processes, engine.zero_stage, frozen) + 4 * teacher
    return _OVERHEAD * (kept + micro_batch * activations)


def states(parameters: int, processes: int, zero_stage: int, frozen: int = 0) -> float:
    """Bytes of weights (4), gradients (4) and moments (8) per process under ZeRO, in float32; frozen: weights alone."""
    sharded = {0: 0, 1: 8, 2: 12, 3: 16}[zero_stage]
    still = frozen * 4 / (processes if zero_stage == 3 else 1)
    return still + (parameters - frozen) * ((16 - sharded) + sharded / processes)


def _backbone(config: BackboneConfig, element: int, materialised: bool) -> float:
    """Bytes that a sample's forward through the backbone keeps for the backward."""
    if isinstance(config, ResNetConfig):
        return element * _resnet(config)
    return _blocks(config, config.patches, element, materialised)


def _resnet(config: ResNetConfig) -> int:
    """Elements that a sample's forward keeps: what enters each convolution, batch norm and ReLU, which is in place."""
    height, width = config.image_size
    pixels = height * width
    kept = 3 * pixels + 2 * 64 * pixels // 4 + 3 * 64 * pixels // 16  # the image, the stem, max pooling and its indices
    for stage, blocks in enumerate(config.bottlenecks):
        narrow, area = 64 * 2**stage, pixels // 16 // 4**stage
        for block in range(blocks):
            # The stride is in the second convolution: the first still works on the larger map.
            first = 4 * area if stage and not block else area
            kept += 2 * narrow * (first + area) + 2 * 4 * narrow * area + (not block) * 4 * narrow * area
    return kept


def _blocks(config: ViTConfig, tokens: int, element: int, materialised: bool) -> float:
    """Bytes that a sample's forward keeps for the backward: all of it, or block inputs and one block."""
    blocks = [_block(config, index, tokens, element, materialised) for index in range(config.depth)]
    if config.gradient_checkpointing:
        return config.depth * element * tokens * config.width + max(blocks)
    return sum(blocks)


def _block(config: ViTConfig, index: int, tokens: int, element: int, materialised: bool) -> float:
    """Bytes of one block. Windows keep padded queries and answers, keys and values as often as they are seen, and the
    answers once more in the order of the patches."""
    values, pairs = tokens * (8 * config.width + 2 * config.mlp_width), tokens**2
    if config.attention.window_of(index, config.depth) is not None:
        seen = attended(config, index)
        pairs = seen.pairs
        values += config.width * (2 * seen.windows * (seen.queries + seen.keys) - 3 * tokens)
    if config.parallel_convolution:
        values += 12 * tokens * config.width  # what its norm, activation and second convolution take in
    # Softmax runs in float32; under autocast its result is kept a second time, in 16 bits.
    kept = config.heads * pairs * (6 if element == 2 else 4) if materialised else 0
    return element * values + kept
