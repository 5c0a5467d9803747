"""The shards that a stage trains on: opened from an artifact, with the definitions of the datasets in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from pipeline.artifacts import Artifact
from pipeline.data.cache import SampleCache
from pipeline.data.definitions import DatasetDefinition
from pipeline.data.shard_index import index_path
from pipeline.data.shards import ShardSet
from pipeline.errors import ArtifactError, ConfigError
from pipeline.files import read_json
from pipeline.strict import Strict

DESCRIPTION = "shards.json"


class ShardsDescription(Strict):
    """`shards.json` of an artifact of kind `shards`."""

    schema_version: Literal[1] = 1
    base: str
    """Folder or URL of the tars; a folder lies in the artifact."""
    shards: list[Annotated[str, Field(pattern=r"^shard-[0-9]{6,}\.tar$")]] = Field(min_length=1)
    """File names of the tars, in order."""
    mode: Literal["person", "image"]
    """person: wide crops; image: whole images."""
    max_input: tuple[int, int]
    """Largest input (H, W) that the stored crops serve without being enlarged."""
    samples: dict[str, int]
    """By dataset."""
    datasets: dict[str, DatasetDefinition]
    """As they were when the shards were made."""
    lost_pixels: float
    """Share of the training windows' pixels, inside the image, that the stored crops do not hold."""


@dataclass(frozen=True)
class Collection:
    """Shards and what they are of."""

    shards: ShardSet
    description: ShardsDescription
    digest: str

    @property
    def names(self) -> list[str]:
        """Dataset names, in the order that a sample's dataset index means."""
        return list(self.shards.datasets)

    @property
    def definitions(self) -> dict[str, DatasetDefinition]:
        """By name, in the order of `names`."""
        return {name: self.description.datasets[name] for name in self.names}

    @property
    def labelled(self) -> dict[str, DatasetDefinition]:
        """The definitions of datasets with keypoints."""
        return {name: definition for name, definition in self.definitions.items() if definition.num_keypoints}

    @property
    def learnable(self) -> list[str | None]:
        """`names`, with None for people without keypoints: what a sample's dataset index means to a pose model."""
        return [name if name in self.labelled else None for name in self.names]

    @property
    def is_remote(self) -> bool:
        """True where reading at random costs a request each."""
        return "://" in self.description.base

    def counts(self) -> dict[str, int]:
        """Samples by dataset."""
        numbers = np.bincount(self.shards.dataset_of, minlength=len(self.names))
        return {name: int(number) for name, number in zip(self.names, numbers, strict=True)}

    def about(self) -> dict[str, Any]:
        """Lines for a card."""
        return {"samples": ", ".join(f"{name} {count}" for name, count in self.counts().items())}

    def require_keypoints(self, unlabelled: bool = False) -> None:
        """Raises ConfigError if a dataset has no keypoints to learn from; with `unlabelled` only if none has any."""
        for name, definition in self.definitions.items():
            if not definition.num_keypoints and not unlabelled:
                raise ConfigError(
                    f"the shards hold {name!r}, people without keypoints: pretrain on them or distil with "
                    f"distillation.every_skeleton, but leave them out here"
                )
        if not self.labelled:
            raise ConfigError("the shards hold people without keypoints only: add a dataset that has some")

    def require_same(self, datasets: Mapping[str, DatasetDefinition], whose: str) -> None:
        """Raises ConfigError if a dataset's keypoints differ from those that a model was trained on, or are unknown to it."""
        for name, definition in self.definitions.items():
            if name not in datasets:
                raise ConfigError(
                    f"the shards hold {name!r}, for which {whose} has no decoder (it has {', '.join(datasets)})"
                )
            if datasets[name].keypoints != definition.keypoints:
                raise ConfigError(f"dataset {name!r}: {whose} was trained on other keypoints than the shards hold")


def open_shards(
    artifact: Artifact, needs: tuple[int, int] | None = None, cache: SampleCache | None = None
) -> Collection:
    """Opens the shards of an artifact; the index files' digests are checked now, each sample's when it is read.

    needs: the input (H, W) of the stage. cache: of samples, where the tars are remote. Raises ArtifactError if the
    crops were stored for a smaller input.
    """
    description = _described(artifact.file(DESCRIPTION))
    largest = description.max_input
    if needs is not None and (needs[0] > largest[0] or needs[1] > largest[1]):
        raise ArtifactError(
            f"{artifact.path}: its crops were stored for inputs up to {largest[0]}x{largest[1]}, this stage needs "
            f"{needs[0]}x{needs[1]}; raise input_size of the shards stage"
        )
    local = "://" not in description.base
    base = str(artifact.path / description.base) if local else description.base
    if local and not Path(base).resolve().is_relative_to(artifact.path.resolve()):
        raise ArtifactError(f"{artifact.path / DESCRIPTION}: its shards lie outside the artifact: {description.base!r}")
    indexes = [artifact.file(index_name(name)) for name in description.shards]
    collection = Collection(ShardSet(base, description.shards, indexes, cache), description, artifact.digest)
    counts = {name: count for name, count in collection.counts().items() if count}
    if counts != {name: count for name, count in description.samples.items() if count}:
        raise ArtifactError(f"{artifact.path / DESCRIPTION}: says {description.samples}, the indexes hold {counts}")
    if unknown := sorted(counts.keys() - description.datasets.keys()):
        raise ArtifactError(f"{artifact.path / DESCRIPTION}: does not say what dataset {unknown[0]!r} is")
    return collection


def _described(path: Path) -> ShardsDescription:
    try:
        return ShardsDescription.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path}: no description of shards that this program reads: {reason}") from None


def index_name(shard: str) -> str:
    """Where an artifact keeps the index of a shard."""
    return f"index/{index_path(shard)}"
