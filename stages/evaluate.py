"""Stage kind `evaluate`: what finished models reach on held-out people, as a table, numbers and pictures.

Reads pose models and raw data. Writes `table.json`, metrics with bootstrap intervals, pictures of the best, the worst
and random predictions, and results files as the COCO server wants them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import PipelineConfig, StageConfig
from pipeline.context import Context
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.models.config import PoseConfig
from pipeline.models.fit import why_other_heatmaps
from pipeline.strict import AddedLater, NotInFingerprint, Strict

Boxes = Literal["ground_truth", "detector"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Members = Annotated[list[str], Field(min_length=2)]


class Inputs(Strict):
    """What is read."""

    data: str
    """Raw datasets: a stage that makes them, or a folder."""
    models: dict[Name, str] = Field(min_length=1)
    """Pose models by the name that the table gives them."""


class Config(StageConfig):
    """Evaluation."""

    kind: Literal["evaluate"]
    inputs: Inputs
    """Models and data."""
    datasets: list[DatasetSource] = Field(min_length=1)
    """Splits to evaluate on."""
    boxes: list[Boxes] = ["ground_truth"]
    """Annotated boxes, a detector's, or both; a dataset without detections is evaluated on annotated ones only."""
    flip: bool = True
    """Average the heatmaps of an image and its mirror image."""
    batch_size: Annotated[int, NotInFingerprint] = Field(64, ge=1)
    """People per forward."""
    max_bad_fraction: Annotated[float, NotInFingerprint] = Field(0.001, ge=0, le=1)
    """Share of people whose image can't be read at which the stage stops; below it they count as not found."""
    bootstrap: int = Field(1000, ge=0)
    """Resamplings of the images for 95 % intervals; 0 is none."""
    averages: Annotated[dict[Name, Members], AddedLater] = {}
    """More models, by name: each the mean of the weights of several of inputs.models, batch-norm statistics included."""
    ensembles: Annotated[dict[Name, Members], AddedLater] = {}
    """More models, by name: each the mean of the heatmaps of several of inputs.models and averages."""
    border: Annotated[Literal["reference", "exact"], AddedLater] = "reference"
    """Decoding near the border: as published results are decoded, up to 1.4 heatmap pixels off there, or exact."""
    compare: list[tuple[str, str]] = []
    """Pairs of models whose difference gets an interval of its own; averages and ensembles count."""
    pictures: Annotated[int, NotInFingerprint] = Field(8, ge=0)
    """People per picture of best, worst and random predictions."""

    @model_validator(mode="after")
    def _names_are_of_models(self) -> "Config":
        known = list(self.inputs.models)
        # In this order nothing can be made of itself.
        for label, combinations in (("averages", self.averages), ("ensembles", self.ensembles)):
            for name, members in combinations.items():
                if name in known:
                    raise ValueError(f"{label}: there is a model {name!r} already; choose another name")
                if len(set(members)) < len(members):
                    raise ValueError(f"{label}.{name}: names a model twice")
                _require_known(f"{label}.{name}", members, known)
            known += combinations
        for pair in self.compare:
            _require_known("compare", pair, known)
        return self

    def check(self, pipeline: PipelineConfig) -> None:
        """Models that are combined have heatmaps of one size, as far as stages of this pipeline make them."""
        made = {name: getattr(pipeline.stages.get(stage), "model", None) for name, stage in self.inputs.models.items()}
        for label, combinations in (("averages", self.averages), ("ensembles", self.ensembles)):
            for name, members in combinations.items():
                known = [(one, made[one]) for one in members if isinstance(made.get(one), PoseConfig)]
                for other, model in known[1:]:
                    if reason := why_other_heatmaps(known[0][1], model):
                        raise ConfigError(f"{label}.{name}: {other} and {known[0][0]} don't go together: {reason}")

    def sources(self) -> list[DatasetSource]:
        """Raw data that is read."""
        return self.datasets


def _require_known(where: str, names: Sequence[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: no model {name!r} among {', '.join(known)}")


def run(context: Context, config: Config) -> None:
    """Evaluates every model on every split and publishes."""
    from pipeline.distributed import loader_workers
    from pipeline.evaluation.model_set import ModelSet
    from pipeline.evaluation.report import EvaluationReport

    artifacts = {name: context.artifact(f"models.{name}") for name in config.inputs.models}
    report = EvaluationReport(
        root=context.data_root(),
        models=ModelSet(artifacts, config.averages, config.ensembles, context.world.device, config.border),
        flip=config.flip,
        batch_size=config.batch_size,
        bootstrap=config.bootstrap,
        seed=context.seed,
        workers=loader_workers(context.pipeline.runtime.workers, context.world, on_cpu=0),
        max_bad_fraction=config.max_bad_fraction,
    )
    names = [load_definition(source.name).name for source in config.datasets]
    for name, source in zip(names, config.datasets, strict=True):
        label = name if names.count(name) == 1 else f"{name}-{source.split}"
        report.evaluate(label, source, config.boxes, config.compare)

    def fill(staged: Path) -> None:
        write_json(staged / "table.json", report.table())
        report.write_files(staged, config.pictures)

    context.publish(fill, metrics=report.metrics)
