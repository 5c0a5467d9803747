"""Which runs there are, which rows of the paper they stand for, and what each run's result depends on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.config_file import explain, load_pipeline, read_yaml
from pipeline.data.definitions import DatasetSource, load_definition
from pipeline.errors import ConfigError
from pipeline.files import digest_of
from pipeline.strict import Strict, fingerprint_view
from stages import KINDS

HERE = Path(__file__).parent
BASE, ROWS, RESULTS = HERE / "base.yaml", HERE / "rows.yaml", HERE / "results"
MODEL = "model"
"""The stage of base.yaml that a run changes and measures."""
EVALUATED = DatasetSource(name="coco", split="val")
RESAMPLES = 200
"""Of the images, for the part of the uncertainty that they alone make."""
MEASUREMENT = 1
"""Raised when `measure.py` computes something else than before: part of the fingerprint."""


class Run(Strict):
    """A training of the model, for one seed."""

    like: str | None = None
    """Another run whose words come first."""
    set: list[str] = []
    """Words as they are typed behind `vitruvian run`."""


class Row(Strict):
    """What a run stands for in a table of the paper."""

    name: str
    """As the report prints it."""
    paper: float | None
    """The paper's AP; null where the paper has no such row."""
    against: str | None = None
    """The run of the same table that this one is compared with; unset for the table's reference."""
    claim: Literal["above", "below"] | None = None
    """The side on which the paper, or its premise, puts the row; unset: as its figures say."""


class Table(Strict):
    """A table of the paper."""

    title: str
    """What is varied."""
    paper: str
    """How the paper's figures came about."""
    note: str = ""
    """What is different here, and how to read it."""
    rows: dict[str, Row] = Field(min_length=2)
    """Rows by run."""

    def side(self, run: str) -> Literal["above", "below"] | None:
        """Where the row should lie beside the one it is compared with; None for the reference."""
        row = self.rows[run]
        if row.against is None or row.claim is not None:
            return row.claim
        gap = self.paper_gap(run)
        assert gap, "checked below"
        return "above" if gap > 0 else "below"

    def paper_gap(self, run: str) -> float | None:
        """The paper's AP of a row minus that of the row it is compared with; None where it has not both."""
        row = self.rows[run]
        other = self.rows[row.against].paper if row.against else None
        return None if row.paper is None or other is None else round(row.paper - other, 1)

    @model_validator(mode="after")
    def _comparisons_have_a_side(self) -> "Table":
        for run, row in self.rows.items():
            if row.against is None and row.claim is not None:
                raise ValueError(f"rows.{run}: claim without against")
            if row.against is None:
                continue
            if row.against not in self.rows or row.against == run:
                raise ValueError(f"rows.{run}.against: no other row {row.against!r} among {', '.join(self.rows)}")
            if row.claim is None and not self.paper_gap(run):
                raise ValueError(f"rows.{run}: the paper's figures do not say above or below, so claim must")
        return self


class Miniature(Strict):
    """`rows.yaml`."""

    seeds: list[int] = Field(min_length=2)
    """Each draws people, initialisation, order, augmentation and masks of its own."""
    runs: dict[str, Run]
    """By name, which names the result files."""
    tables: dict[int, Table]
    """By the paper's number."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "Miniature":
        for name, run in self.runs.items():
            if run.like is not None and (run.like not in self.runs or self.runs[run.like].like is not None):
                raise ValueError(f"runs.{name}.like: expected a run that has no like itself, found {run.like!r}")
        for number, table in self.tables.items():
            if unknown := [run for run in table.rows if run not in self.runs]:
                raise ValueError(f"tables.{number}.rows: no run {unknown[0]!r}")
        if unused := self.runs.keys() - {run for table in self.tables.values() for run in table.rows}:
            raise ValueError(f"runs.{sorted(unused)[0]}: is in no table")
        return self

    def words(self, run: str, seed: int) -> list[str]:
        """What is typed behind `vitruvian run benchmarks/mini/base.yaml` for a run."""
        like = self.runs[run].like
        return [*(self.runs[like].set if like else ()), *self.runs[run].set, f"seed={seed}"]

    def pipeline(self, run: str, seed: int, extra: tuple[str, ...] = ()) -> PipelineConfig:
        """The pipeline of a run. Raises ConfigError for words that are no keys of it."""
        return load_pipeline(BASE, [*self.words(run, seed), *extra], KINDS)


@dataclass(frozen=True)
class Job:
    """A run of one seed that can be carried out."""

    run: str
    seed: int
    words: list[str]
    fingerprint: str


def load_miniature(path: Path = ROWS) -> Miniature:
    """Reads the tables. Raises ConfigError with one line per mistake."""
    try:
        return Miniature.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "\n  ".join(explain(error, Miniature, ""))) from None


def fingerprint(pipeline: PipelineConfig) -> str:
    """Digest of all that changes a run's result, known before anything ran.

    A stage's own fingerprint names the digests of its inputs, which only the machine that has them knows. Here the config
    of the stages above stands for them, without what is a default: a new key leaves finished results as good as before,
    and code that computes something else has another `version`.
    """
    names = [*graph.ancestors(pipeline, MODEL), MODEL]
    stages = {name: _identity(pipeline, name) for name in names}
    evaluation = [MEASUREMENT, EVALUATED.model_dump(), RESAMPLES]
    return digest_of([stages, pipeline.seed, pipeline.engine.precision, evaluation])


def _identity(pipeline: PipelineConfig, name: str) -> dict[str, Any]:
    config = pipeline.stages[name]
    sources = getattr(config, "sources", list)()
    return {
        "kind": config.kind,
        "version": type(config).version,
        "config": _chosen(config),
        "inputs": config.references(),
        "definitions": {source.name: fingerprint_view(load_definition(source.name)) for source in sources},
    }


def _chosen(config: Strict) -> dict[str, Any]:
    """What of a section changes the result and is not the default."""
    chosen: dict[str, Any] = {}
    for name, plain in fingerprint_view(config).items():
        value = getattr(config, name)
        if value == type(config).model_fields[name].get_default(call_default_factory=True):
            continue
        chosen[name] = _chosen(value) if isinstance(value, Strict) else plain
    return chosen


def in_order(miniature: Miniature, tables: list[int], seeds: list[int]) -> list[tuple[str, int]]:
    """(run, seed): one seed of all tables first, then the next; a run that several tables share is there once."""
    runs = dict.fromkeys(run for number in tables for run in miniature.tables[number].rows)
    return [(run, seed) for seed in seeds for run in runs]
