"""The models of an evaluation by name, whether an artifact holds them or they are made of others."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.artifacts import Artifact
from pipeline.errors import ArtifactError
from pipeline.evaluation.combined import Ensemble, average_models, average_spec, ensemble_spec
from pipeline.models.loading import PoseSpec, load_pose, read_spec


class ModelSet:
    """Artifacts, averages of their weights, and ensembles of either. Weights are read when a model is first used."""

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        averages: Mapping[str, Sequence[str]],
        ensembles: Mapping[str, Sequence[str]],
        device: torch.device,
        border: str = "reference",
    ) -> None:
        """border: how their codecs decode there. Members name artifacts, those of ensembles also averages.

        Raises ArtifactError for what is no pose model, ConfigError for members that do not go together.
        """
        self.artifacts, self.averages, self.ensembles, self.device = artifacts, averages, ensembles, device
        self._models: dict[str, nn.Module] = {}
        self._specs = {name: _pose_spec(artifact, border) for name, artifact in artifacts.items()}
        for combinations, make in ((averages, average_spec), (ensembles, ensemble_spec)):
            for name, members in combinations.items():
                self._specs[name] = make(name, {member: self._specs[member] for member in members})

    @property
    def names(self) -> list[str]:
        """Artifacts, averages, ensembles."""
        return list(self._specs)

    @property
    def notes(self) -> list[str]:
        """What is made of what."""
        averages = [f"{name}: mean weights of {', '.join(members)}" for name, members in self.averages.items()]
        return averages + [f"{name}: mean heatmaps of {', '.join(members)}" for name, members in self.ensembles.items()]

    def spec(self, name: str) -> PoseSpec:
        """What a model is."""
        return self._specs[name]

    def model(self, name: str) -> nn.Module:
        """A model in eval mode on the device: images (B, 3, H, W) and names of datasets to heatmaps by dataset."""
        if name not in self._models:
            self._models[name] = self._make(name).to(self.device).eval()
        return self._models[name]

    def _make(self, name: str) -> nn.Module:
        if name in self.ensembles:
            return Ensemble([self.model(member) for member in self.ensembles[name]])
        if name in self.averages:
            members = [load_pose(self.artifacts[member])[0] for member in self.averages[name]]
            return average_models(self.spec(name), members)
        return load_pose(self.artifacts[name])[0]


def _pose_spec(artifact: Artifact, border: str) -> PoseSpec:
    spec = read_spec(artifact)
    if not isinstance(spec, PoseSpec):
        raise ArtifactError(f"{artifact.path}: holds a model of type {spec.model!r}, expected a pose model")
    return spec.model_copy(update={"codec": spec.codec.model_copy(update={"border": border})})
