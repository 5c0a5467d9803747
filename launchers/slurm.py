"""`vitruvian submit`, `status` and `cancel`: the chain as jobs of Slurm, one a stage, each after those it reads from.

Beside the sbatch files `jobs.json` remembers which job is whose, so that a stage that waits or runs is not submitted
twice. Whether a stage is done is never asked of Slurm, which forgets jobs: its artifact says so.
"""

import logging
import os
import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import typer

from launchers.inputs import LAUNCHER_VARIABLES
from launchers.slurm_script import folder_of, render
from pipeline import graph
from pipeline.config import PipelineConfig
from pipeline.errors import ConfigError, VitruvianError
from pipeline.files import digest_of, read_json, write_json, write_text
from pipeline.status import held

logger = logging.getLogger("vitruvian")

_ENDED = re.compile("COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|BOOT_FAIL|DEADLINE|REVOKED")

Jobs = dict[str, dict[str, Any]]
"""By stage: `scripts`, the digest of its sbatch files, and `jobs`, in order of submission: `id` and `name` of each, and
of its `tasks` how many are in which state, as far as is known; none of a job that ended and that Slurm has forgotten."""


def submit(pipeline: PipelineConfig, names: list[str], source: str, overrides: list[str], *, dry_run: bool) -> None:
    """Submits the stages of `names` (parents first) that are not done and not in the queue; all of them, or none.

    dry_run prints the sbatch files and writes and submits nothing. Raises ConfigError where a stage is in the queue
    with other settings, DataError for missing raw data, VitruvianError where Slurm refuses.
    """
    plans = graph.plan(pipeline, names)
    scripts: dict[str, dict[str, str]] = {}
    for name in names:
        if plans[name].state == "done":
            logger.info("%s: skipped, %s (%s)", name, plans[name].reason, plans[name].run_dir)
            continue
        if not any(graph.mlflow_run(reference) for reference in plans[name].config.references().values()):
            graph.require_raw_data(plans[name])
        scripts[name] = _scripts(pipeline, name, source, overrides)
    if dry_run:
        _print(pipeline, scripts)
        return
    with held(folder_of(pipeline)):
        jobs = refreshed(pipeline, strictly=True)
        _refuse_other_settings(jobs, scripts)
        new: list[str] = []
        try:
            for name, files in scripts.items():
                if _in_queue(jobs.get(name)):
                    logger.info("%s: in the queue already, %s", name, describe(jobs[name]))
                    continue
                after = [_last(jobs[parent]) for parent in graph.parents(pipeline, name) if parent in scripts]
                jobs[name] = {"scripts": digest_of(files), "jobs": _submit_files(pipeline, files, after, new)}
                write_json(folder_of(pipeline) / "jobs.json", jobs)
                logger.info("%s: %s", name, describe(jobs[name]))
        except BaseException:
            if new:  # half a chain helps nobody
                _call("scancel", *new)
            raise


def cancel(pipeline: PipelineConfig, stage: str | None) -> list[str]:
    """Cancels the jobs of a stage, or of all, that wait or run; gives the names of their stages.

    Running stages save a resume point where Slurm's KillWait leaves them the time.
    """
    jobs = refreshed(pipeline, strictly=True)
    chosen = [name for name, record in jobs.items() if stage in (None, name) and _in_queue(record)]
    if chosen:
        _call("scancel", *(job["id"] for name in chosen for job in jobs[name]["jobs"] if _is_live(job)))
    return chosen


def refreshed(pipeline: PipelineConfig, *, strictly: bool = False) -> Jobs:
    """The recorded jobs, in the states that Slurm gives them. Where nothing was submitted, Slurm is not asked.

    strictly: raises VitruvianError where Slurm can't be asked; else they stand as submitted.
    """
    path = folder_of(pipeline) / "jobs.json"
    jobs: Jobs = read_json(path) if path.is_file() else {}
    if not strictly and (not jobs or shutil.which("squeue") is None):
        return jobs
    try:
        lines = _call("squeue", "--me", "-h", "-r", "-t", "all", "-o", "%F|%j|%T|%r").splitlines()
    except VitruvianError:
        if strictly:
            raise
        return jobs
    seen: dict[tuple[str, str], Counter[str]] = {}
    for job, name, state, reason in (line.split("|", 3) for line in lines):
        told = f"{state} ({reason})" if state == "PENDING" and reason != "None" else state
        seen.setdefault((job, name), Counter())[told] += 1
    for job in (job for record in jobs.values() for job in record["jobs"]):
        # With its name: a cluster that was set up anew counts from 1 again.
        if (job["id"], job["name"]) in seen:
            job["tasks"] = dict(seen[job["id"], job["name"]])
        elif _is_live(job):
            job["tasks"] = {}
    return jobs


def describe(record: dict[str, Any]) -> str:
    """A stage's jobs in words, such as `12 RUNNING`; with parts `11 COMPLETED 3, RUNNING 1; 12 PENDING (Dependency)`."""
    told = []
    for job in record["jobs"]:
        tasks = sorted(job["tasks"].items())
        counts = [state if len(tasks) == 1 else f"{state} {count}" for state, count in tasks]
        told.append(f"{job['id']} {', '.join(counts) or 'ended'}")
    return "; ".join(told)


def _is_live(job: dict[str, Any]) -> bool:
    """True if some of a job's tasks may still run."""
    return any(not _ENDED.fullmatch(state) for state in job["tasks"])


def _in_queue(record: dict[str, Any] | None) -> bool:
    """True if a stage has a job that waits or runs."""
    return record is not None and any(_is_live(job) for job in record["jobs"])


def _last(record: dict[str, Any]) -> str:
    return str(record["jobs"][-1]["id"])


def _scripts(pipeline: PipelineConfig, name: str, source: str, overrides: list[str]) -> dict[str, str]:
    """The sbatch files of a stage by name, in the order in which they run."""
    kind = type(pipeline.stages[name])
    parts = pipeline.slurm.job(name, kind.distributed).array if kind.divisible else 1
    first = {f"{name}.parts.sbatch": render(pipeline, name, source, overrides, parts=parts)} if parts > 1 else {}
    return {**first, f"{name}.sbatch": render(pipeline, name, source, overrides)}


def _print(pipeline: PipelineConfig, scripts: dict[str, dict[str, str]]) -> None:
    for name, files in scripts.items():
        after = [parent for parent in dict.fromkeys(graph.parents(pipeline, name)) if parent in scripts]
        for file, text in files.items():
            typer.echo(f"### {folder_of(pipeline) / file}{', after ' * bool(after)}{', '.join(after)}\n{text}")


def _submit_files(
    pipeline: PipelineConfig, files: dict[str, str], after: list[str], new: list[str]
) -> list[dict[str, Any]]:
    """Writes and submits a stage's files, each after the one before; gives their jobs, whose ids `new` gets at once."""
    jobs = []
    for file, text in files.items():
        path = folder_of(pipeline) / file
        write_text(path, text)
        new.append(_sbatch(str(path), after))
        after = new[-1:]
        jobs.append({"id": new[-1], "name": f"{pipeline.name}.{path.stem}", "tasks": {"submitted": 1}})
    return jobs


def _refuse_other_settings(jobs: Jobs, scripts: dict[str, dict[str, str]]) -> None:
    for name, files in scripts.items():
        if _in_queue(jobs.get(name)) and jobs[name]["scripts"] != digest_of(files):
            raise ConfigError(
                f"{name}: in the queue with other settings ({describe(jobs[name])}); cancel it first with "
                f"`vitruvian cancel`, or give this chain another name or workspace"
            )


def _sbatch(file: str, after: list[str]) -> str:
    """Submits a file and gives the job's id."""
    # Slurm takes an id that it has forgotten for one that is fine: only jobs of this chain that it knows are named.
    chained = [f"--dependency=afterok:{':'.join(dict.fromkeys(after))}", "--kill-on-invalid-dep=yes"] if after else []
    return _call("sbatch", "--parsable", *chained, file).strip().split(";")[0]


def _call(*command: str) -> str:
    """What a Slurm command prints. Raises VitruvianError with its own complaint."""
    # A surrounding job's variables would be taken for options of the new one, and a launcher's for ranks.
    foreign = ("SLURM_", "SBATCH_", "SRUN_")
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and (key == "SLURM_CONF" or not key.startswith(foreign))
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise VitruvianError(f"{command[0]}: not found: this machine has no Slurm") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise VitruvianError(f"{command[0]} failed: {said}")
    return done.stdout
