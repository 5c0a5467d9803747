"""What `vitruvian submit` asks of a Slurm cluster."""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from pipeline.strict import Strict

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
