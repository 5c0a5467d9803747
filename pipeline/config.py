"""Strict typed configuration: the sections that every pipeline file has, frozen after validation."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.slurm_config import SlurmConfig
from pipeline.strict import NotInFingerprint, Strict


class EngineConfig(Strict):
    """How a stage is spread over processes and in which precision it computes."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], NotInFingerprint] = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters are sharded."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes under autocast with float32 weights; reductions of gradients stay float32."""


class RuntimeConfig(Strict):
    """What machine the stage runs on. Nothing here is in a fingerprint.

    Nothing changes the result beyond the order of sums, except that the classic decoder's batch norm normalises over the
    samples of one micro-batch: see docs/numerics.md, "Not exact".
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    processes: int | None = Field(None, ge=1, le=1024)
    """Processes that `vitruvian run` starts for a training stage; unset: one per GPU, one on a CPU."""
    workers: int | None = Field(None, ge=0, le=1024)
    """Data loading processes per rank; unset: one on a CPU, beside a GPU the cores shared out, at most 8."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads per rank; unset: the cores shared out over the ranks of this machine."""
    deterministic: bool = False
    """Deterministic GPU kernels, for bitwise resume on a GPU. On a CPU resume is always bitwise."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per rank and forward; unset: the global batch over the ranks, without accumulation."""
    hang_minutes: float | None = Field(30.0, gt=0)
    """A rank without progress for so long ends the job with everybody's stacks; null: never. Longer than the longest save."""


class TrackingConfig(Strict):
    """Where metrics and artifacts go besides the run directory."""

    uri: str | None = "auto"
    """MLflow tracking URI; `auto` is a sqlite file in the workspace, null is none."""
    experiment: str | None = None
    """MLflow experiment; unset: the pipeline's name."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""


class StorageConfig(Strict):
    """Where copies of what a run keeps go, and how much of remote shards is kept here. Nothing here changes the result."""

    url: str | None = None
    """fsspec URL of a folder, such as s3://bucket/runs: artifacts and resume points are copied there; null: nowhere."""
    cache_gb: float | None = Field(None, gt=0)
    """Size in 10^9 bytes of this machine's cache of samples that were read from remote shards; null: no cache."""
    cache: Path | None = None
    """Its folder, on a disk of this machine at best; unset: `.cache` in the workspace."""

    @field_validator("url", mode="after")
    @classmethod
    def _without_credentials(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "://" not in value:
            raise ValueError(f"expected a URL such as s3://bucket/runs or file:///folder, found {value!r}")
        if re.search(r"://[^/@]*:[^/@]*@", value):
            raise ValueError("holds a password; give credentials by the backend's own environment variables")
        return value.rstrip("/")


class StageConfig(Strict):
    """What every stage kind's section has. Kinds derive from it and add their own keys and `inputs`."""

    version: ClassVar[int] = 1
    """Raised when the kind computes something else than before: part of the fingerprint."""
    prepares: ClassVar[bool] = False
    """True for kinds that only prepare data: a stage that needs one runs it first."""
    distributed: ClassVar[bool] = False
    """True for kinds that train under the engine, on any number of processes."""
    divisible: ClassVar[bool] = False
    """True for kinds of whose work `run_stage.py --part I/N` makes a part."""

    kind: str
    """The stage kind: a file of `stages/`."""
    description: str = Field("", exclude=False)
    """For people; on the artifact's card."""

    def files(self) -> list[str]:
        """Local files outside any artifact that change the result: their content is in the fingerprint."""
        return []

    def check(self, pipeline: "PipelineConfig") -> None:
        """Raises ConfigError for what does not go together with the rest of the pipeline. Starts and opens nothing."""

    def references(self) -> dict[str, str]:
        """The inputs by label: names of stages, paths or URIs. Unset ones are left out."""
        inputs = getattr(self, "inputs", None)
        found: dict[str, str] = {}
        for label, value in inputs or ():
            if isinstance(value, str):
                found[label] = value
            elif isinstance(value, Mapping):
                found |= {f"{label}.{key}": reference for key, reference in value.items()}
        return found


class PipelineConfig(Strict):
    """A whole pipeline file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=80)
    """Names the run directories and the MLflow experiment."""
    description: str = ""
    """What it is for: which paper row, which data, what was measured."""
    workspace: Path = Path("workspace")
    """Where runs live; relative to the current directory."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of initialisation, order, augmentation, masks and drop path."""
    engine: EngineConfig = EngineConfig()
    """Distribution and precision."""
    runtime: RuntimeConfig = RuntimeConfig()
    """The machine."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics and artifacts."""
    slurm: SlurmConfig = SlurmConfig()
    """Jobs of `vitruvian submit`."""
    storage: StorageConfig = StorageConfig()
    """Copies elsewhere."""
    stages: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=80)], Any]
    """Stage sections by name; a name is a folder of the workspace."""

    @field_validator("workspace", mode="after")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()

    @model_validator(mode="after")
    def _has_stages(self) -> "PipelineConfig":
        if not self.stages:
            raise ValueError("a pipeline needs at least one stage")
        return self

    @model_validator(mode="after")
    def _slurm_fits_the_stages(self) -> "PipelineConfig":
        for name, job in self.slurm.stages.items():
            if name not in self.stages:
                raise ValueError(f"slurm.stages: no stage {name!r} among {', '.join(self.stages)}")
            several = job.nodes > 1 or (job.processes_per_node or 1) > 1
            if several and not type(self.stages[name]).distributed:
                raise ValueError(f"slurm.stages.{name}: this kind of stage runs as one process on one node")
        return self
