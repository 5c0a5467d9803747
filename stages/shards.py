"""Stage kind `shards`: raw annotations and images to WebDataset shards of person crops, with an index.

Reads raw datasets. Writes tars, their indexes and `shards.json`. The order of the samples is a seeded permutation over
all datasets, so that neighbours are strangers. Evaluation images that also occur in training are found by their digest
and left out.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config import StageConfig
from pipeline.context import Context
from pipeline.data.augmentation import PoseAugmentation
from pipeline.data.crops import CropConfig
from pipeline.data.definitions import DatasetSource
from pipeline.strict import NotInFingerprint, Strict


class Inputs(Strict):
    """What is read."""

    data: str
    """A stage that makes raw datasets, or the folder (or fsspec URL) that holds them."""


class Config(StageConfig):
    """Shards of person crops."""

    prepares: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    kind: Literal["shards"]
    inputs: Inputs
    """Raw data."""
    datasets: list[DatasetSource] = Field(min_length=1)
    """What goes in."""
    exclude: list[DatasetSource] = []
    """Evaluation splits whose images must not be trained on."""
    crop: CropConfig = CropConfig()
    """Person crops or whole images, and for which input."""
    samples_per_shard: int = Field(4096, ge=1)
    """At about 60 kB a crop, 250 MB a shard."""
    max_bad_fraction: Annotated[float, NotInFingerprint] = Field(0.01, ge=0, le=1)
    """Share of malformed annotations, or of people whose image can't be read, above which the stage stops."""
    output: str | None = None
    """fsspec URL of a folder for the tars, below which each fingerprint has its own; unset: inside the artifact."""
    measured_people: int = Field(200, ge=0)
    """People on whom the share of lost pixels is measured, under this augmentation's windows."""
    measured_augmentation: PoseAugmentation = PoseAugmentation()
    """Whose training windows are compared with the stored crops."""

    def sources(self) -> list[DatasetSource]:
        """Raw data that is read."""
        return [*self.datasets, *self.exclude]


def run(context: Context, config: Config) -> None:
    """Makes the missing shards, or those of one part, on all cores that this process may use; publishes the whole."""
    from pipeline.data.sharding import make_shards, write_description
    from pipeline.distributed import cores

    work = context.run_dir / "work"
    report = make_shards(
        work,
        context.data_root(),
        config.datasets,
        config.exclude,
        config.crop,
        seed=context.seed,
        samples_per_shard=config.samples_per_shard,
        max_bad_fraction=config.max_bad_fraction,
        measured_people=config.measured_people,
        augmentation=config.measured_augmentation,
        output=f"{config.output.rstrip('/')}/{context.run_dir.name}" if config.output else None,
        workers=context.pipeline.runtime.workers or cores(),
        part=context.part,
    )
    if context.part is not None:
        return

    context.publish(
        lambda staged: write_description(work, staged, report),
        metrics=report.metrics(),
        licences=report.licences,
        about={"samples": sum(report.samples.values()), "lost pixels": f"{report.lost_pixels:.3%}"},
    )
