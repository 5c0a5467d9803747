"""The sbatch file of a stage: what it asks for, how it meets its peers, how it stops and goes on."""

import os
import re
import shlex
import sys
from pathlib import Path

from pipeline.config import PipelineConfig
from pipeline.errors import EXIT_STOPPED, ConfigError
from pipeline.slurm_config import SlurmJob

_SCRIPT = """\
#!/bin/bash
# {what}, written by `vitruvian submit`.
{header}

job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
asked= step=

# Slurm warns this shell before the time limit or preemption; the processes save a resume point and leave with {stopped}.
trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1
trap 'asked=yes' TERM

# True if the stage ended because Slurm asked it to, perhaps by a signal to its processes alone.
interrupted() {{
  [[ $code -eq {stopped} || $code -ge 128 ]] &&
    [[ -n $asked || $(scontrol show job -o "$job") == *" PreemptTime="[0-9]* ]]
}}

requeue() {{
  # A job that was cancelled, or that lost a node, is not RUNNING any more.
  [[ $(scontrol show job -o "$job") == *" JobState=RUNNING "* ]] || return
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
    echo "went back to the queue {max_requeues} times (slurm.max_requeues): submit again to go on" >&2
    return 1
  fi
  scontrol requeue "$job"
}}

cd {folder} || exit 1
{body}
code={stopped}
if [ -z "$asked" ]; then
  {command} &
  step=$!
  [ -z "$asked" ] || kill -USR1 "$step"
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  code=$?
fi
if interrupted; then
  requeue && exit 0
fi
exit "$code"
"""

_RENDEZVOUS = """\

# The processes meet at the first node; srun tells each its rank.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT
"""


def folder_of(pipeline: PipelineConfig) -> Path:
    """Where a pipeline's sbatch files, the jobs' logs and the record of the jobs lie."""
    return pipeline.workspace.absolute() / pipeline.name / "slurm"


def render(pipeline: PipelineConfig, name: str, source: str, overrides: list[str], *, parts: int = 0) -> str:
    """The sbatch file of a stage; with `parts`, of the job array that makes as many parts of its work.

    Raises ConfigError for a workspace whose path sbatch can't take.
    """
    kind = type(pipeline.stages[name])
    job = pipeline.slurm.job(name, kind.distributed)
    # What the job asks for is in the header; for the stage it is nothing.
    words = ["--stage", name, "--config", source, *(word for word in overrides if not word.startswith("slurm."))]
    command = [*_srun(job), *job.wrapper, *_python(job), *words]
    line = shlex.join(command) + (f' --part "$SLURM_ARRAY_TASK_ID/{parts}"' if parts else "")
    setup = "".join(f"{entry}\n" for entry in ["", *job.setup] if job.setup)
    return _SCRIPT.format(
        what=f"{f'{parts} parts of stage' if parts else 'Stage'} {name} of the pipeline {pipeline.name}",
        header="\n".join(
            f"#SBATCH {_quoted(option)}" for option in _header(pipeline, name, job, kind.distributed, parts)
        ),
        stopped=EXIT_STOPPED,
        max_requeues=job.max_requeues,
        folder=shlex.quote(os.getcwd()),
        body=setup + (_RENDEZVOUS if kind.distributed else ""),
        command=line,
    )


def _header(pipeline: PipelineConfig, name: str, job: SlurmJob, distributed: bool, parts: int) -> list[str]:
    log = str(folder_of(pipeline)).replace("%", "%%") + (f"/{name}.part-%a.log" if parts else f"/{name}.log")
    processes = (job.processes_per_node or job.gpus_per_node or 1) if distributed else 1
    asked = {
        "job-name": f"{pipeline.name}.{name}{'.parts' if parts else ''}",
        "output": log,
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{job.signal_seconds}",
        "array": f"0-{parts - 1}" if parts else None,
        "nodes": job.nodes,
        "ntasks-per-node": processes,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node,
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        **job.options,
    }
    given = {option: value for option, value in asked.items() if value is not None and value is not False}
    return [f"--{option}" if value is True else f"--{option}={value}" for option, value in given.items()]


def _quoted(option: str) -> str:
    """An option as sbatch reads it: quotes and backslashes would mean something else to it than to a shell."""
    if re.search(r"""[\x00-\x1f\x7f"'\\]""", option):
        raise ConfigError(f"{option!r}: sbatch can't take quotes, backslashes or line breaks; choose another workspace")
    return shlex.quote(option)


def _srun(job: SlurmJob) -> list[str]:
    # A dead process ends the others: they would wait for it. srun does not inherit the cores of a task.
    cores = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    return ["srun", "--kill-on-bad-exit=1", *cores, *job.srun]


def _python(job: SlurmJob) -> list[str]:
    if job.python:
        return [job.python, "-m", "launchers.run_stage"]
    return [sys.executable, str(Path(__file__).with_name("run_stage.py").resolve())]


def take_ranks() -> None:
    """Under srun, which starts one task a process: its numbers are the ranks. MASTER_ADDR is the caller's to set."""
    if (
        "SLURM_STEP_ID" in os.environ
        and "RANK" not in os.environ
        and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    ):
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        os.environ |= {name: os.environ[slurm] for name, slurm in names.items()}
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
