"""Hugging Face folders: `VitPoseForPoseEstimation` in and out, `ViTMAEForPreTraining` in."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.data.definitions import DatasetDefinition
from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import write_json
from pipeline.models.formats import encoder
from pipeline.models.formats.experts import split_experts
from pipeline.models.formats.files import read_checkpoint, read_config, weights_of
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Imported, Wanted, choose_heads, finish, fold_positions
from pipeline.models.preprocessing import MEAN, STD

EPS = 1e-6
"""Of the layer norms: what ViTPose and MAE were trained with, and all that models here have."""
_WRITTEN_EPS = (EPS, 1e-12)
"""The published folders say 1e-12, the library's default."""
_QKV = ("query", "key", "value")
_FILTERS = 256


def _block(ours: str, theirs: str, mlp: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The pairs of a transformer block; q, k and v are joined afterwards."""
    attention = tuple((f"{ours}.attn.{part}", f"{theirs}.attention.attention.{part}") for part in _QKV)
    return (
        (f"{ours}.norm1", f"{theirs}.layernorm_before"),
        *attention,
        (f"{ours}.attn.proj", f"{theirs}.attention.output.dense"),
        (f"{ours}.norm2", f"{theirs}.layernorm_after"),
        *((f"{ours}.mlp.{part}", f"{theirs}.{name}") for part, name in mlp.items()),
    )


VITPOSE = KeyMap(
    (
        ("backbone.pos_embed", "backbone.embeddings.position_embeddings"),
        ("backbone.patch_embed.proj", "backbone.embeddings.patch_embeddings.projection"),
        *_block(
            "backbone.blocks.*",
            "backbone.encoder.layer.*",
            {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "experts": "mlp.experts"},
        ),
        ("backbone.last_norm", "backbone.layernorm"),
        ("heads.0.deconv_layers.0", "head.deconv1"),
        ("heads.0.deconv_layers.1", "head.batchnorm1"),
        ("heads.0.deconv_layers.3", "head.deconv2"),
        ("heads.0.deconv_layers.4", "head.batchnorm2"),
        ("heads.0.final_layer", "head.conv"),
    )
)
_MAE_MLP = {"fc1": "intermediate.dense", "fc2": "output.dense"}
VITMAE = KeyMap(
    (
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        *_block("blocks.*", "vit.encoder.layer.*", _MAE_MLP),
        ("norm", "vit.layernorm"),
        ("mask_token", "decoder.mask_token"),
        ("decoder_pos_embed", "decoder.decoder_pos_embed"),
        ("decoder_embed", "decoder.decoder_embed"),
        *_block("decoder_blocks.*", "decoder.decoder_layers.*", _MAE_MLP),
        # transformers 5 reads the published name above, and writes this one.
        *_block("decoder_blocks.*", "decoder.decoder_encoder.layer.*", _MAE_MLP),
        ("decoder_norm", "decoder.decoder_norm"),
        ("decoder_pred", "decoder.decoder_pred"),
    )
)


def read(path: Path, wanted: Wanted) -> Imported:
    """The model in a folder of `config.json` and weights. Raises ArtifactError and ConfigError."""
    config = read_config(path)
    kinds = {"vitpose": _read_vitpose, "vit_mae": _read_vitmae}
    kind = config.get("model_type")
    if kind not in kinds:
        raise ArtifactError(f"{path.name}/config.json: model_type is {kind!r}, expected {' or '.join(kinds)}")
    return kinds[kind](path, config, wanted)


def _read_vitpose(path: Path, config: Mapping[str, Any], wanted: Wanted) -> Imported:
    backbone = config.get("backbone_config")
    if not isinstance(backbone, Mapping):
        raise ArtifactError(f"{path.name}/config.json: backbone_config is {backbone!r}, expected a mapping")
    wanted = _with_settings(wanted, backbone, (256, 192), f"{path.name}/config.json: backbone_config")
    if config.get("scale_factor", 4) != 4:
        raise ConfigError(
            f"{path.name}/config.json: scale_factor is {config['scale_factor']}; the simple decoder has 4"
        )
    intake = Intake.of(path.name, read_checkpoint(weights_of(path)), VITPOSE)
    _note_eps(intake, backbone)
    fold_positions(intake)
    _fuse(intake, "backbone.blocks")
    definitions = split_experts(intake, wanted.datasets) or choose_heads(intake, wanted.datasets)
    return finish(intake, definitions, wanted)


def _read_vitmae(path: Path, config: Mapping[str, Any], wanted: Wanted) -> Imported:
    wanted = _with_settings(wanted, config, (224, 224), f"{path.name}/config.json")
    intake = Intake.of(path.name, read_checkpoint(weights_of(path)), VITMAE)
    _note_eps(intake, config)
    if encoder.pad_patch(intake, wanted):
        wanted = replace(wanted, input_size=None)
        for name in [name for name in intake.tensors if name.startswith(encoder.DECODER)]:
            intake.drop(name, "the decoder predicts patches of another size than the padded ones")
    _fuse(intake, "blocks")
    _fuse(intake, "decoder_blocks")
    if not any(name.startswith(encoder.DECODER) for name in intake.tensors):
        return encoder.finish(intake, wanted)
    decoder = {
        "mask_ratio": config.get("mask_ratio", 0.75),
        "norm_pixels": config.get("norm_pix_loss", False),
        "decoder_width": config.get("decoder_hidden_size", 512),
        "decoder_depth": config.get("decoder_num_hidden_layers", 8),
        "decoder_heads": config.get("decoder_num_attention_heads", 16),
    }
    return encoder.finish(intake, wanted, decoder)


def _with_settings(wanted: Wanted, config: Mapping[str, Any], image_size: tuple[int, int], where: str) -> Wanted:
    """What the shapes do not tell, out of `config.json`, whose defaults may be unwritten. Raises ConfigError."""
    expected = {"hidden_act": "gelu", "qkv_bias": True}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{where}: {key} is {config[key]!r}, models here have {value!r}")
    if config.get("layer_norm_eps", 1e-12) not in _WRITTEN_EPS:
        raise ConfigError(f"{where}: layer_norm_eps is {config['layer_norm_eps']!r}, models here have {EPS}")
    size = config.get("image_size", image_size)
    sides = (size, size) if isinstance(size, int) else size
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(side, int) for side in sides)):
        raise ConfigError(f"{where}: image_size is {size!r}, expected two whole numbers")
    heads = config.get("num_attention_heads", 12)
    if not isinstance(heads, int):
        raise ConfigError(f"{where}: num_attention_heads is {heads!r}, expected a whole number")
    return replace(wanted, input_size=wanted.input_size or (sides[0], sides[1]), heads=heads)


def _note_eps(intake: Intake, config: Mapping[str, Any]) -> None:
    written = config.get("layer_norm_eps", 1e-12)
    if written != EPS:
        intake.changes.append(f"layer_norm_eps: {written} is written, {EPS} taken, which the weights were trained with")


def _fuse(intake: Intake, blocks: str) -> None:
    """Query, key and value of every block, one above the other, as one linear map."""
    for block in intake.numbers(blocks):
        for part in ("weight", "bias"):
            names = [f"{blocks}.{block}.attn.{name}.{part}" for name in _QKV]
            fused = torch.cat([intake.take(name) for name in names])
            for name in names:
                del intake.tensors[name]
            intake.tensors[f"{blocks}.{block}.attn.qkv.{part}"] = fused


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_fuse`, for all blocks."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." not in name:
            result[name] = tensor
            continue
        for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{part}.")] = rows.contiguous()
    return result


def write(outgoing: Outgoing, folder: Path) -> list[str]:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    Returns lines for people. Raises ConfigError for what the class can't hold.
    """
    _require_expressible(outgoing)
    dataset, definition = outgoing.one_dataset("huggingface")
    outgoing = replace(outgoing, tensors=_split(outgoing.tensors))
    state = outgoing.rename(VITPOSE, dataset)
    name = "backbone.embeddings.position_embeddings"
    state[name] = torch.cat([torch.zeros_like(state[name][:, :1]), state[name]], dim=1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(outgoing, definition))
    height, width = outgoing.spec.config.backbone.image_size
    preprocessing = {
        "image_processor_type": "VitPoseImageProcessor",
        "do_affine_transform": True,
        "size": {"height": height, "width": width},
        "normalize_factor": 200.0,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    write_json(folder / "preprocessor_config.json", preprocessing)
    return [f"{len(state)} tensors in model.safetensors, decoder of {dataset}"]


def _require_expressible(outgoing: Outgoing) -> None:
    """Raises ConfigError for knowledge tokens, another number or width of transposed convolutions, another padding of
    patches and a broken ratio of the MLP."""
    outgoing.require_plain("huggingface", tokens=0)
    decoder, backbone = outgoing.spec.config.decoder, outgoing.spec.config.backbone
    if decoder.kind == "classic" and (decoder.deconv_layers, decoder.filters) != (2, _FILTERS):
        raise ConfigError(
            f"{outgoing.where}: model.decoder has {decoder.deconv_layers} deconv_layers of {decoder.filters} filters; "
            f"huggingface has 2 of {_FILTERS}"
        )
    if backbone.mlp_width % backbone.width:
        raise ConfigError(
            f"{outgoing.where}: model.backbone.mlp_width {backbone.mlp_width} is no multiple of width {backbone.width}; "
            "huggingface knows whole ratios only"
        )


def _config(outgoing: Outgoing, definition: DatasetDefinition) -> dict[str, Any]:
    backbone = outgoing.spec.config.backbone
    names = dict(enumerate(definition.keypoints))
    return {
        "architectures": ["VitPoseForPoseEstimation"],
        "model_type": "vitpose",
        "backbone_config": {
            "model_type": "vitpose_backbone",
            "image_size": backbone.image_size,
            "patch_size": [backbone.patch_size, backbone.patch_size],
            "num_channels": 3,
            "hidden_size": backbone.width,
            "num_hidden_layers": backbone.depth,
            "num_attention_heads": backbone.heads,
            "mlp_ratio": backbone.mlp_width // backbone.width,
            "num_experts": 1,
            "hidden_act": "gelu",
            "layer_norm_eps": EPS,
            "qkv_bias": True,
            "out_features": [f"stage{backbone.depth}"],
            "out_indices": [backbone.depth],
        },
        "use_simple_decoder": outgoing.spec.config.decoder.kind == "simple",
        "scale_factor": 4,
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "edges": definition.skeleton_index.tolist(),
    }
