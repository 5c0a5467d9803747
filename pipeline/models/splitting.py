"""One dataset's plain model out of a model of several: fewer decoders, and no experts."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.experts import merge_expert
from pipeline.models.loading import PoseSpec

_BACKBONE, _DECODERS = "backbone.", "decoders."


def split(
    spec: PoseSpec, tensors: Mapping[str, Tensor], dataset: str, source: str
) -> tuple[PoseSpec, dict[str, Tensor]]:
    """The description and weights of the plain model that computes what this one does for `dataset`.

    The dataset's expert is joined to the shared part of each MLP (ViTPose+'s way to ordinary ViTs), its decoder stays,
    the other ones go; a knowledge token stays. `source` names the model in messages. Raises ConfigError for a dataset
    without a decoder, ArtifactError for tensors that are not of one model.
    """
    if dataset not in spec.datasets:
        raise ConfigError(f"{source}: no decoder for dataset {dataset!r}; it has {', '.join(spec.datasets)}")
    backbone = {name.removeprefix(_BACKBONE): value for name, value in tensors.items() if name.startswith(_BACKBONE)}
    kept = {name: value for name, value in tensors.items() if not name.startswith((_BACKBONE, _DECODERS))}
    kept |= {f"{_BACKBONE}{name}": value for name, value in merge_expert(backbone, dataset, source).items()}
    kept |= {name: value for name, value in tensors.items() if name.startswith(f"{_DECODERS}{dataset}.")}
    config = spec.config
    if config.backbone.expert_width:
        plain = config.backbone.model_copy(update={"expert_width": 0})
        config = config.model_copy(update={"backbone": plain})
    return spec.model_copy(update={"config": config, "datasets": {dataset: spec.datasets[dataset]}}), kept
