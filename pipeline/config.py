"""Strict typed configuration: the sections that every pipeline file has, frozen after validation."""

import re
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


_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:@+=/-]+$")]
_HeaderText = Annotated[str, Field(pattern=r"""^[^\x00-\x1f\x7f"'\\]*$""")]
_Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
_SIZES = ("nodes", "processes_per_node", "gpus_per_node")
_RENDERED = re.compile(
    "account|array|cpus-per-task|dependency|gpus-per-node|job-name|kill-on-invalid-dep|mem|(no-)?requeue|nodes|ntasks|"
    "ntasks-per-node|open-mode|output|parsable|partition|qos|signal|time|wait|wrap"
)
"""Options of sbatch that `submit` sets."""


class SlurmJob(Strict):
    """What a Slurm job asks for. An unset key is not in the sbatch file: the cluster's own default holds."""

    partition: _Word | None = None
    """Partition, or several with commas."""
    account: _Word | None = None
    """Who is charged."""
    qos: _Word | None = None
    """Quality of service."""
    nodes: int = Field(1, ge=1)
    """Nodes of a training stage."""
    processes_per_node: int | None = Field(None, ge=1)
    """Processes of a training stage on each node; unset: one a GPU, one without GPUs."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of a training stage on each node."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores a process."""
    memory: str | None = Field(None, pattern=r"^[1-9][0-9]*[KMGT]?$")
    """A node, such as 64G; in MB without a letter."""
    time: str | None = Field(None, pattern=r"^([0-9]+-[0-9]+(:[0-9]+){0,2}|[0-9]+(:[0-9]+){0,2})$")
    """Time limit in Slurm's words, such as 1-12:00:00 for 36 hours. The stage goes on in a new round after it."""
    signal_seconds: int = Field(120, ge=1, le=65535)
    """How long before the time limit the stage is asked to stop: a step and a resume point must fit in."""
    max_requeues: int = Field(100, ge=0)
    """How often a job may go back to the queue: bounds a stage that never gets on within its time limit."""
    array: int = Field(1, ge=1, le=1000)
    """Jobs that make shards, each a part of them."""
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], bool | int | _HeaderText] = {}
    """Other sbatch options by their long name; true for one without a value, false for none."""
    setup: list[_Line] = []
    """Shell lines that the job runs first, such as `module load cuda`."""
    wrapper: list[_Line] = []
    """Words before the interpreter, such as [apptainer, exec, --nv, image.sif]."""
    python: _Line | None = None
    """Interpreter, as the wrapper finds it, in which vitruvian is installed; unset: the one that submits."""
    srun: list[_Line] = []
    """Further arguments of srun."""

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 12:00:00 as a number
            raise ValueError("write the days, as in 0-12:00:00, or put it in quotes")
        return value

    @field_validator("options")
    @classmethod
    def _has_no_key_of_its_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = [name for name in value if _RENDERED.fullmatch(name)]
        if taken:
            raise ValueError(f"{taken[0]} is not for options: it has a key of its own, or submit sets it")
        return value


class SlurmConfig(SlurmJob):
    """How `vitruvian submit` runs the stages. Nothing here changes a result."""

    stages: dict[str, SlurmJob] = {}
    """What is different for single stages."""

    def job(self, stage: str, distributed: bool) -> SlurmJob:
        """What a stage's job asks for. One that is not distributed has one process, and a GPU only if its own section says so."""
        shared = {name: getattr(self, name) for name in self.model_fields_set & SlurmJob.model_fields.keys()}
        if not distributed:
            shared = {name: value for name, value in shared.items() if name not in _SIZES}
        own = self.stages.get(stage, SlurmJob())
        given = {name: getattr(own, name) for name in own.model_fields_set}
        return SlurmJob(**{**shared, **given, "options": {**self.options, **own.options}})


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
