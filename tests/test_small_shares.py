"""A dataset that is a small share of the mix: most micro-batches hold one sample of it or none."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.data.codec import CodecConfig
from pipeline.models.config import PoseConfig
from pipeline.models.parameter_groups import layer_decay_groups
from pipeline.models.pose import PoseModel
from pipeline.objectives import PoseObjective

NAMES = ["coco", "aic", "mpii"]
KEYPOINTS = {"coco": 17, "aic": 14, "mpii": 16}
MICRO = 2


def objective(kind: str, seed: int = 0) -> PoseObjective:
    decoder = {"kind": "simple"} if kind == "simple" else {"filters": 8}
    backbone = {"size": "micro", "image_size": (64, 48), "expert_width": 8}
    torch.manual_seed(seed)
    model = PoseModel(PoseConfig.model_validate({"backbone": backbone, "decoder": decoder}), KEYPOINTS)
    model.init_weights()
    for parameter in model.decoders.parameters():
        if parameter.ndim == 4:
            torch.nn.init.normal_(parameter, std=0.1)  # heatmaps that are not all but zero
    return PoseObjective(model, CodecConfig(input_size=(64, 48), heatmap_size=(16, 12)), NAMES)


def batch_of(size: int = 24, seed: int = 1) -> dict[str, Any]:
    """A sixth is MPII."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (size, 3, 64, 48), dtype=torch.uint8, generator=generator),
        "keypoints": torch.rand(size, 17, 2, generator=generator) * 40,
        "visible": (torch.rand(size, 17, generator=generator) > 0.2).float(),
        "dataset": torch.tensor([0, 1, 0, 1, 1, 2] * (size // 6))[torch.randperm(size, generator=generator)],
        "weight": torch.ones(size),
    }


def micro_batches(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(batch["images"]), MICRO):
        yield {name: value[start : start + MICRO] for name, value in batch.items()}


def train(pose: PoseObjective, accumulated: bool, steps: int = 2) -> dict[str, torch.Tensor]:
    """Gradients of the first step, and the weights after some; an accumulated step is the mean over micro-batches."""
    groups = layer_decay_groups(pose.model, 1e-3, 0.1, 0.8)
    optimizer = torch.optim.AdamW([{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups])
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        parts = list(micro_batches(batch_of(seed=step))) if accumulated else [batch_of(seed=step)]
        for part in parts:
            (pose(part)[0] / len(parts)).backward()
        if step == 0:
            found = {f"gradient of {name}": value.grad.clone() for name, value in pose.named_parameters()}
        optimizer.step()
    return found | dict(pose.named_parameters())


def test_many_micro_batches_hold_nothing_of_the_small_one() -> None:
    shares = [int((part["dataset"] == 2).sum()) for part in micro_batches(batch_of())]
    assert shares.count(0) >= len(shares) / 2 and 1 in shares


@pytest.mark.parametrize("kind", ["simple", "classic"])
def test_gradients_and_weights_do_not_depend_on_how_the_samples_are_grouped(kind: str) -> None:
    """Exact up to rounding wherever batch norm does not look at the batch; the classic decoder's is frozen here."""
    whole, tiny = objective(kind), objective(kind)
    for pose in (whole, tiny):
        pose.model.decoders.eval()
    expected, found = train(whole, accumulated=False), train(tiny, accumulated=True)
    gradients = [name for name in expected if name.startswith("gradient")]
    assert all(expected[name].any() for name in gradients if ".mpii." in name)
    for name in gradients:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
    for name, value in tiny.named_parameters():
        # Adam divides by the gradient's size: where that is rounding noise, the step is noise, too, of at most the rate.
        close = torch.isclose(value, expected[name], rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.99 and (value - expected[name]).abs().max() < 5e-3, name


def test_a_micro_batch_without_its_samples_leaves_a_decoder_as_if_it_had_not_been() -> None:
    pose, alone = objective("classic").train(), objective("classic").train()
    decoder, held = alone.model.decoders["mpii"], 0
    for part in micro_batches(batch_of()):
        pose(part)
        if (part["dataset"] == 2).any():
            only = {name: value[part["dataset"] == 2] for name, value in part.items()}
            alone(only)
            held += 1
    assert (
        held
        == decoder.deconv_layers[1].num_batches_tracked
        == pose.model.decoders["mpii"].deconv_layers[1].num_batches_tracked
    )
    for (name, mine), (_, own) in zip(
        pose.model.decoders["mpii"].named_buffers(), decoder.named_buffers(), strict=True
    ):
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-6, msg=name)
    assert pose.model.decoders["mpii"].samples_seen == 4


@torch.no_grad()
def test_statistics_of_single_samples_average_to_those_of_large_batches() -> None:
    """Not exact: a sample alone has its own mean and variance, and the running ones lack what differs between samples."""
    decoder = objective("classic").model.decoders["mpii"].train()
    features = torch.randn(64, 32, 4, 3, generator=torch.Generator().manual_seed(0))
    features += 0.1 * torch.randn(64, 32, 1, 1, generator=torch.Generator().manual_seed(1))
    found = []
    for size in (1, 32):
        one = copy.deepcopy(decoder)
        for _ in range(2 * size):
            for part in features.split(size):
                one(part)
        found.append(one.eval()(features))
    typical = found[1].std()
    assert (found[0] - found[1]).abs().mean() < 0.05 * typical
