"""Strict typed configuration: the sections that every pipeline file has, frozen after validation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """A configuration section: unknown keys are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class _NotInFingerprint:
    """Marks a field that does not change the result, so that changing it does not start a new run."""


NotInFingerprint = _NotInFingerprint()


class EngineConfig(Strict):
    """How a stage is spread over processes and in which precision it computes."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], NotInFingerprint] = 1
    """DeepSpeed ZeRO stage: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters are sharded."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes under autocast with float32 weights; reductions of gradients stay float32."""


class RuntimeConfig(Strict):
    """What machine the stage runs on. Nothing here changes the result."""

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


class TrackingConfig(Strict):
    """Where metrics and artifacts go besides the run directory."""

    uri: str | None = "auto"
    """MLflow tracking URI; `auto` is a sqlite file in the workspace, null is none."""
    experiment: str | None = None
    """MLflow experiment; unset: the pipeline's name."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics."""


class StageConfig(Strict):
    """What every stage kind's section has. Kinds derive from it and add their own keys and `inputs`."""

    version: ClassVar[int] = 1
    """Raised when the kind computes something else than before: part of the fingerprint."""
    prepares: ClassVar[bool] = False
    """True for kinds that only prepare data: a stage that needs one runs it first."""
    distributed: ClassVar[bool] = False
    """True for kinds that train under the engine, on any number of processes."""

    kind: str
    """The stage kind: a file of `stages/`."""
    description: str = Field("", exclude=False)
    """For people; shown in `vitruvian status`."""

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


def fingerprint_view(config: BaseModel) -> dict[str, Any]:
    """The part of a section that changes the result, as plain data."""
    view: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if any(isinstance(mark, _NotInFingerprint) for mark in field.metadata) or name in ("description", "inputs"):
            continue
        value = getattr(config, name)
        view[name] = fingerprint_view(value) if isinstance(value, BaseModel) else _plain(value)
    return view


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return fingerprint_view(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
