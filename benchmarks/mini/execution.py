"""A run carried out: the shared stages that it lacks, then its own process, timed."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.mini.results import Measurement, Result
from benchmarks.mini.tables import BASE, MODEL, Job
from pipeline import graph
from pipeline.config_file import load_pipeline
from pipeline.errors import EXIT_FAILURE, VitruvianError
from pipeline.files import read_json
from stages import KINDS

_ROOT = Path(__file__).resolve().parents[2]


def execute(job: Job, workspace: Path) -> Result:
    """Trains and measures a run. Its seconds are of its own process; the shared stages' stand beside them.

    Raises VitruvianError with the exit code of a process that failed; its message is on stderr.
    """
    words = [*job.words, f"workspace={workspace}"]
    pipeline = load_pipeline(BASE, words, KINDS)
    shared: dict[str, float] = {}
    for name in graph.ancestors(pipeline, MODEL):
        if graph.plan(pipeline, [name])[name].state != "done":
            shared[name] = round(_timed("launchers.run_stage", "--stage", name, "--config", str(BASE), *words), 1)
    conditions = {"load": f"{os.getloadavg()[0]:.1f}", "nice": str(os.nice(0))}
    before = os.times()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measurement.json"
        seconds = _timed("benchmarks.mini.one_run", str(out), *words)
        found = Measurement.model_validate(read_json(out))
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Result(
        **found.model_dump(),
        run=job.run,
        seed=job.seed,
        words=job.words,
        fingerprint=job.fingerprint,
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu, 1),
        shared=shared,
        conditions=conditions,
    )


def _timed(module: str, *arguments: str) -> float:
    """Runs a module of ours to its end and gives its seconds."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(_ROOT)}
    begun = time.monotonic()
    code = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, cwd=_ROOT).returncode
    if code:
        error = VitruvianError(f"{module} ended with exit code {code}; its message is above")
        error.exit_code = code if code > 0 else EXIT_FAILURE
        raise error
    return time.monotonic() - begun
