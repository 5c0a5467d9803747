"""One file a run: what was measured, on what, under which conditions."""

from pathlib import Path

from pydantic import Field, ValidationError

from benchmarks.mini.tables import RESAMPLES
from pipeline.config_file import explain
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from pipeline.strict import Strict


class Measurement(Strict):
    """What a model reached on its seed's evaluation people."""

    metrics: dict[str, float]
    """In percent."""
    resampled: list[float] = Field(min_length=RESAMPLES, max_length=RESAMPLES)
    """AP on resamples of the images, the same for every run of a seed."""
    people: int
    """With keypoints."""
    images: int
    """That they are in."""
    evaluated: str
    """Digest of the annotations: who they are."""
    steps: int
    """Optimizer steps of the measured stage."""
    samples: int
    """People seen in them, repeats counted."""
    machine: str
    """Processor, cores, threads and the version of torch."""


class Result(Measurement):
    """A run's committed file."""

    run: str
    """Its name in rows.yaml."""
    seed: int
    """Of everything."""
    words: list[str]
    """What is typed behind `vitruvian run benchmarks/mini/base.yaml` to have it again."""
    fingerprint: str
    """Of all that changes the result."""
    seconds: float
    """Of the run's process from start to end: imports, training, publishing, evaluation."""
    cpu_seconds: float
    """Of that process and those that it waited for."""
    shared: dict[str, float] = {}
    """Seconds of each stage that was missing and made first; later runs share them."""
    conditions: dict[str, str]
    """Load of the machine as it began, and niceness."""

    @property
    def ap(self) -> float:
        """Of ground-truth boxes, with the flip test, in percent."""
        return self.metrics["AP"]

    @property
    def file(self) -> str:
        """Its name among the results."""
        return file_name(self.run, self.seed)


def file_name(run: str, seed: int) -> str:
    """Of a run's result."""
    return f"{run}-seed{seed}.json"


def read_result(folder: Path, run: str, seed: int) -> Result | None:
    """The result of a run; None where there is none. Raises DataError for a file that is no result of it."""
    path = folder / file_name(run, seed)
    if not path.is_file():
        return None
    try:
        result = Result.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        what = "; ".join(explain(error, Result, "")) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path}: no result of a run: {what}; remove it, and the run starts over") from None
    if (result.run, result.seed) != (run, seed):
        raise DataError(f"{path}: holds run {result.run!r} of seed {result.seed}; each file is named after its own")
    return result


def write_result(folder: Path, result: Result) -> Path:
    """Writes a run's file, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result.file
    write_json(path, result.model_dump(mode="json"))
    return path
