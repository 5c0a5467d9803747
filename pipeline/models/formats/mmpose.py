"""mmpose 1.x: its .pth, whose backbone is mmpretrain's VisionTransformer, in and out."""

import pprint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ArtifactError
from pipeline.files import write_text
from pipeline.models.formats.files import read_checkpoint
from pipeline.models.formats.keys import Intake, KeyMap
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Imported, Wanted, choose_heads, finish
from pipeline.models.preprocessing import MEAN, STD

VIT = (
    ("patch_embed.proj", "patch_embed.projection"),
    ("pos_embed", "pos_embed"),
    ("blocks.*.norm1", "layers.*.ln1"),
    ("blocks.*.attn.qkv", "layers.*.attn.qkv"),
    ("blocks.*.attn.proj", "layers.*.attn.proj"),
    ("blocks.*.norm2", "layers.*.ln2"),
    ("blocks.*.mlp.fc1", "layers.*.ffn.layers.0.0"),
    ("blocks.*.mlp.fc2", "layers.*.ffn.layers.1"),
)
"""Our names of a plain ViT's parts and mmpretrain's, but for the last norm and the class token."""
KEYS = KeyMap(
    (
        *((f"backbone.{ours}", f"backbone.{theirs}") for ours, theirs in VIT),
        ("backbone.last_norm", "backbone.ln1"),
        ("backbone.last_norm", "backbone.norm1"),
        ("heads.0.deconv_layers", "head.deconv_layers"),
        ("heads.0.final_layer", "head.final_layer"),
        ("knowledge_token", "backbone.cls_token"),
    )
)
DROPS = (
    ("data_preprocessor.mean", "images are normalised outside the model, by the same mean"),
    ("data_preprocessor.std", "images are normalised outside the model, by the same deviation"),
)
FILE = "model.pth"


def read(path: Path, wanted: Wanted) -> Imported:
    """The model in a .pth. A class token is one knowledge token: mmpretrain gives it a position and drops it at the end.

    Raises ArtifactError and ConfigError as `choose_heads` and `finish`.
    """
    state = read_checkpoint(path)
    _require_same_normalisation(state, path.name)
    intake = Intake.of(path.name, state, KEYS, DROPS)
    tokens = 0
    if "knowledge_token" in intake.tensors:
        positions = intake.take("backbone.pos_embed")
        intake.tensors["knowledge_token"] = intake.tensors["knowledge_token"] + positions[:, :1]
        intake.tensors["backbone.pos_embed"] = positions[:, 1:]
        intake.changes.append("backbone.cls_token became a knowledge token, its position added")
        tokens = 1
    return finish(intake, choose_heads(intake, wanted.datasets), wanted, tokens)


def _require_same_normalisation(state: dict[str, Tensor], where: str) -> None:
    for name, ours in {"mean": MEAN, "std": STD}.items():
        theirs = state.get(f"data_preprocessor.{name}")
        expected = torch.tensor(ours) * 255
        if theirs is not None and (theirs.numel() != 3 or not torch.allclose(theirs.flatten(), expected, atol=0.01)):
            raise ArtifactError(
                f"{where}: data_preprocessor.{name} is {theirs.flatten().tolist()[:3]}; models here take images "
                f"normalised by {expected.tolist()}"
            )


def write(outgoing: Outgoing, folder: Path) -> list[str]:
    """Writes `model.pth`, tensors only, and `model.py`, the `model` section of an mmpose config that it fits.

    A knowledge token goes in as mmpretrain's class token with position zero: attention does not see the order of tokens,
    so that it makes no difference that theirs comes first. Returns lines for people. Raises ConfigError for what the
    format can't hold.
    """
    outgoing.require_plain("mmpose", tokens=1)
    dataset, definition = outgoing.one_dataset("mmpose")
    state = outgoing.rename(KEYS, dataset)
    token = outgoing.spec.config.knowledge_tokens
    if token:
        positions = state["backbone.pos_embed"]
        state["backbone.pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    torch.save({"meta": {}, "state_dict": state}, folder / FILE)
    section = _model_section(outgoing, definition.num_keypoints)
    text = "# The `model` section of an mmpose 1.x config for model.pth; it needs mmpretrain.\nmodel = "
    write_text(folder / "model.py", text + pprint.pformat(section, sort_dicts=False, width=110) + "\n")
    return [f"{len(state)} tensors in {FILE}, decoder of {dataset}; model.py is the config that they fit"]


def _model_section(outgoing: Outgoing, keypoints: int) -> dict[str, Any]:
    backbone, decoder, codec = outgoing.spec.config.backbone, outgoing.spec.config.decoder, outgoing.spec.codec
    classic = decoder.kind == "classic"
    udp = {
        "type": "UDPHeatmap",
        "input_size": codec.input_size[::-1],
        "heatmap_size": codec.heatmap_size[::-1],
        "sigma": codec.spread,
        "blur_kernel_size": codec.blur,
    }
    head: dict[str, Any] = {
        "type": "HeatmapHead",
        "in_channels": backbone.width,
        "out_channels": keypoints,
        "deconv_out_channels": (decoder.filters,) * decoder.deconv_layers if classic else [],
        "deconv_kernel_sizes": (4,) * decoder.deconv_layers if classic else [],
    }
    if not classic:
        head["final_layer"] = {"kernel_size": 3, "padding": 1}
    return {
        "type": "TopdownPoseEstimator",
        "data_preprocessor": {
            "type": "PoseDataPreprocessor",
            "mean": [round(value * 255, 3) for value in MEAN],
            "std": [round(value * 255, 3) for value in STD],
            "bgr_to_rgb": True,
        },
        "backbone": {
            "type": "mmpretrain.VisionTransformer",
            "arch": {
                "embed_dims": backbone.width,
                "num_layers": backbone.depth,
                "num_heads": backbone.heads,
                "feedforward_channels": backbone.mlp_width,
            },
            "img_size": backbone.image_size,
            "patch_size": backbone.patch_size,
            "qkv_bias": True,
            "with_cls_token": bool(outgoing.spec.config.knowledge_tokens),
            "out_type": "featmap",
            "patch_cfg": {"padding": backbone.patch_padding},
        },
        **({} if classic else {"neck": {"type": "FeatureMapProcessor", "scale_factor": 4.0, "apply_relu": True}}),
        "head": {**head, "loss": {"type": "KeypointMSELoss", "use_target_weight": True}, "decoder": udp},
        "test_cfg": {"flip_test": True, "flip_mode": "heatmap", "shift_heatmap": False},
    }
