"""Small models in which every tensor is random, and how close two results are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.codec import CodecConfig, decode
from pipeline.data.definitions import load_definition
from pipeline.models.config import PoseConfig
from pipeline.models.formats.outgoing import Outgoing
from pipeline.models.formats.pose import Imported
from pipeline.models.loading import PoseSpec
from pipeline.models.pose import PoseModel

BACKBONE: dict[str, Any] = {"width": 48, "depth": 2, "heads": 4, "image_size": [64, 48]}
SIMPLE, CLASSIC = {"kind": "simple"}, {"kind": "classic"}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Fills everything that a state dict holds: weights, statistics, positions with the class token's slot. Eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(noise.abs() + 0.5)
        elif tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.ndim > 1 and name.endswith("weight"):
            tensor.copy_(noise * (1.5 / tensor[0].numel() ** 0.5))
        else:
            tensor.copy_(0.5 * noise)
    return module.eval()


def spec_of(decoder: dict[str, Any], datasets: Sequence[str] = ("coco",), tokens: int = 0, **backbone: Any) -> PoseSpec:
    """The description of a small pose model."""
    config = PoseConfig.model_validate(
        {"backbone": {**BACKBONE, **backbone}, "decoder": decoder, "knowledge_tokens": tokens}
    )
    codec = CodecConfig(input_size=config.backbone.image_size, heatmap_size=config.heatmap_size)
    return PoseSpec(config=config, datasets={name: load_definition(name) for name in datasets}, codec=codec)


def outgoing_of(spec: PoseSpec, dataset: str | None = None) -> tuple[Outgoing, PoseModel]:
    """A model with random tensors, ready to be exported."""
    model = randomise(PoseModel(spec.config, spec.keypoints))
    return Outgoing(spec, model.state_dict(), "artifact", dataset), model


def built(imported: Imported) -> PoseModel:
    """The pose model that was imported."""
    assert isinstance(imported.spec, PoseSpec)
    model = PoseModel(imported.spec.config, imported.spec.keypoints)
    model.load_state_dict(imported.tensors)
    return model.eval().requires_grad_(False)


def images(count: int = 3, size: tuple[int, int] = (64, 48)) -> Tensor:
    """Normalised images (B, 3, H, W)."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def heatmap_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in parts of the largest value; `pytest -s` shows it."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    found = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"heatmap error {found:.1e}")
    return found


def keypoint_error(ours: Tensor, theirs: Tensor, codec: CodecConfig) -> float:
    """The largest difference of decoded coordinates, input pixels, over the maps of theirs that have a real peak.

    Maps of random weights are partly flat or negative at their maximum; a Newton step from there goes anywhere, be the
    maps as equal as float32 allows. A peak is real where it goes less than a heatmap's pixel. There must be some.
    """
    expected, found = decode(theirs, codec)[..., :2], decode(ours, codec)[..., :2]
    index = theirs.flatten(2).argmax(-1)
    corner = torch.stack([index % theirs.shape[-1], index // theirs.shape[-1]], -1) * torch.tensor(codec.stride)
    real = ((expected - corner).abs() < torch.tensor(codec.stride)).all(-1)
    assert real.sum() >= 15, f"{int(real.sum())} of {real.numel()} maps have a peak"
    worst = float((expected - found)[real].abs().max())
    print(f"keypoint error {worst:.1e} px")
    return worst


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
