"""Models made of other models, for evaluation: mean heatmaps (an ensemble) and mean weights.

Both are refused unless they mean something: the specs are compared before any weight is read.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.loading import PoseSpec
from pipeline.models.pose import PoseModel

_OF_TRAINING = ("size", "positions", "drop_path", "gradient_checkpointing")
"""Of a backbone's configuration, what the weights do not depend on."""


class Ensemble(nn.Module):
    """Several pose models as one: the mean of their heatmaps (ViTPose, table 10).

    With the flip test this is the mean of each model's own flip test, which is linear.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor, datasets: Sequence[str]) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) to float32 heatmaps (B, K, h, w) of each of `datasets`."""
        found = [model(images, datasets) for model in self.models]
        return {name: sum(maps[name].float() for maps in found) / len(found) for name in datasets}


def ensemble_spec(name: str, specs: Mapping[str, PoseSpec]) -> PoseSpec:
    """What an ensemble of these models is: the first one's codec, and the decoders that all of them have.

    Raises ConfigError unless codecs are equal and there are common decoders, of equal keypoints.
    """
    first, *others = specs
    spec = specs[first]
    for other in others:
        if specs[other].codec != spec.codec:
            raise ConfigError(
                f"ensembles.{name}: {first} and {other} have different codecs: {_codecs(spec, specs[other])}"
            )
    shared = [dataset for dataset in spec.datasets if all(dataset in one.datasets for one in specs.values())]
    if not shared:
        raise ConfigError(f"ensembles.{name}: {', '.join(specs)} have no decoder in common")
    for other in others:
        _require_keypoints(f"ensembles.{name}", first, other, specs, shared)
    return spec.model_copy(update={"datasets": {dataset: spec.datasets[dataset] for dataset in shared}})


def average_spec(name: str, specs: Mapping[str, PoseSpec]) -> PoseSpec:
    """What the mean of these models' weights is. Raises ConfigError unless they differ in nothing but weights."""
    first, *others = specs
    spec = specs[first]
    for other in others:
        differing = [
            part for part in ("architecture", "decoders", "codec") if _parts(spec)[part] != _parts(specs[other])[part]
        ]
        if differing:
            raise ConfigError(
                f"averages.{name}: {first} and {other} differ in {', '.join(differing)}; only weights of one architecture "
                "have a mean"
            )
        _require_keypoints(f"averages.{name}", first, other, specs, list(spec.datasets))
    return spec


@torch.no_grad()
def average_models(spec: PoseSpec, models: Sequence[PoseModel]) -> PoseModel:
    """A model in eval mode whose tensors are the means of the models' (Izmailov et al., UAI 2018).

    Batch norm's running statistics are averaged like weights; the paper recomputes them in a pass over the training
    data. Counters are the largest.
    """
    states = [model.state_dict() for model in models]
    mean = {}
    for name, first in states[0].items():
        stacked = torch.stack([state[name] for state in states])
        mean[name] = stacked.double().mean(0).to(first.dtype) if first.is_floating_point() else stacked.amax(0)
    average = PoseModel(spec.config, spec.keypoints)
    average.load_state_dict(mean)
    return average.eval()


def _parts(spec: PoseSpec) -> dict[str, object]:
    config = spec.config.model_dump()
    backbone = {key: value for key, value in config["backbone"].items() if key not in _OF_TRAINING}
    return {"architecture": {**config, "backbone": backbone}, "decoders": spec.keypoints, "codec": spec.codec}


def _codecs(one: PoseSpec, other: PoseSpec) -> str:
    a, b = one.codec.model_dump(), other.codec.model_dump()
    return ", ".join(f"{key} {a[key]} against {b[key]}" for key in a if a[key] != b[key])


def _require_keypoints(
    where: str, first: str, other: str, specs: Mapping[str, PoseSpec], datasets: Sequence[str]
) -> None:
    for dataset in datasets:
        if specs[first].datasets[dataset].keypoints != specs[other].datasets[dataset].keypoints:
            raise ConfigError(f"{where}: {first} and {other} have different keypoints of {dataset!r}")
